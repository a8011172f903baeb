"""inspect of layers that are called with a mask or lengths: what is valid is seen, and no more."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import truenorm
from truenorm import inspect


def table(layer: nn.Module, x: Tensor, **given: Any) -> Any:
    result = inspect(nn.Sequential(layer), x, call=lambda model, x: model[0](x, **given))
    return result.layers[0]


@pytest.mark.parametrize(
    ("build", "shape", "axis"),
    [
        (lambda: truenorm.BatchNorm1d(5), (3, 5, 40), 1),
        (lambda: truenorm.BatchNorm2d(5, channel_axis=-1), (3, 6, 7, 5), -1),
        (lambda: truenorm.InstanceNorm1d(5), (3, 5, 40), 1),
        (lambda: truenorm.InstanceNorm2d(5), (3, 5, 6, 7), 1),
        (lambda: truenorm.GroupNorm(1, 5), (3, 5, 40), 1),
        (lambda: truenorm.LayerNorm(5), (3, 40, 5), -1),
        (lambda: truenorm.RMSNorm(5), (3, 40, 5), -1),
    ],
)
def test_padding_is_not_seen(build: Any, shape: tuple[int, ...], axis: int) -> None:
    values = torch.randn(shape) * 2 + 3
    mask = torch.rand(values.movedim(axis, 1)[:, 0].shape) < 0.5
    mask[1] = False
    x = torch.where(mask.unsqueeze(axis), values, float("nan"))
    seen = table(build(), x, mask=mask)
    valid = values.movedim(axis, -1)[mask].double()
    assert seen.values_seen == len(valid)
    assert seen.shape == shape
    assert seen.calls == 1
    assert seen.nan == 0
    assert seen.channels.mean == pytest.approx(valid.mean(0).tolist(), rel=1e-6)
    assert seen.channels.std == pytest.approx(valid.std(0, correction=0).tolist(), rel=1e-6)


def test_lengths() -> None:
    x = torch.randn(3, 5, 40)
    given = torch.tensor([40, 3, 0])
    seen = table(truenorm.InstanceNorm1d(5), x, lengths=given)
    assert seen.values_per_statistic == 3
    assert seen.values_seen == 43
