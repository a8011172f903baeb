"""Channels in another dimension than 1, without a transpose or a copy."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import truenorm

CASES = [
    (truenorm.BatchNorm1d, (7, 11, 5), -1),
    (truenorm.BatchNorm1d, (7, 11, 5), 2),
    (truenorm.BatchNorm2d, (3, 6, 7, 5), -1),
    (truenorm.BatchNorm2d, (3, 6, 5, 7), 2),
    (truenorm.BatchNorm3d, (3, 2, 3, 4, 5), -1),
    (truenorm.SyncBatchNorm, (3, 6, 7, 5), -1),
    (truenorm.InstanceNorm1d, (7, 11, 5), -1),
    (truenorm.InstanceNorm2d, (3, 6, 7, 5), -1),
    (truenorm.InstanceNorm3d, (3, 2, 3, 4, 5), -1),
    (lambda c, **k: truenorm.GroupNorm(1, c, **k), (3, 6, 7, 5), -1),
]


@pytest.mark.parametrize(("make", "shape", "axis"), CASES)
@pytest.mark.parametrize("training", [True, False])
def test_as_the_moved_channels(
    make: Any, shape: tuple[int, ...], axis: int, training: bool
) -> None:
    ours, plain = make(5, channel_axis=axis).train(training), make(5).train(training)
    x, grad = torch.randn(shape) + 2, torch.randn(shape)
    leaf, moved = (x.clone().requires_grad_() for _ in range(2))
    y, expected = ours(leaf), plain(moved.movedim(axis, 1)).movedim(1, axis)
    y.backward(grad)
    expected.backward(grad)
    assert torch.equal(y, expected)
    if axis == -1:
        assert y.stride() == x.stride()
    assert torch.equal(leaf.grad, moved.grad)  # type: ignore[arg-type]
    assert all(torch.equal(v, plain.state_dict()[k]) for k, v in ours.state_dict().items())


@pytest.mark.parametrize("make", [truenorm.InstanceNorm1d, truenorm.BatchNorm1d])
def test_nothing_is_copied(make: Any) -> None:
    x = torch.randn(8, 64, 128)
    layer = make(128, channel_axis=-1)
    # without acc_events torch 2.11 warns
    with torch.profiler.profile(profile_memory=True, acc_events=True) as profile:
        layer(x)
    names = {event.name for event in profile.events() or []}
    assert not names & {"aten::copy_", "aten::clone", "aten::contiguous"}


def test_unbatched_and_masked() -> None:
    layer = truenorm.InstanceNorm1d(5, channel_axis=-1)
    x, mask = torch.randn(3, 11, 5), torch.rand(3, 11) < 0.5
    assert torch.equal(layer(x[1]), layer(x)[1])
    moved = truenorm.InstanceNorm1d(5)(x.movedim(-1, 1), mask=mask).movedim(1, -1)
    assert torch.equal(layer(x, mask=mask), moved)
    assert torch.equal(layer(x, mask=mask.unsqueeze(2)), moved)


def test_local_response_norm() -> None:
    x = torch.randn(3, 6, 7, 5)
    y: Tensor = truenorm.LocalResponseNorm(3, channel_axis=-1)(x)
    expected = truenorm.LocalResponseNorm(3)(x.movedim(-1, 1)).movedim(1, -1)
    assert torch.equal(y, expected)


def test_it_is_part_of_the_layer() -> None:
    layer = truenorm.BatchNorm2d(5, channel_axis=-1)
    assert "channel_axis=-1" in repr(layer)
    assert copy.deepcopy(layer).channel_axis == -1
    layer.channel_axis = 1
    assert "channel_axis" not in vars(layer)
    compiled = torch.compile(
        truenorm.BatchNorm2d(5, channel_axis=-1), fullgraph=True, backend="aot_eager"
    )
    assert compiled(torch.randn(3, 6, 7, 5)).shape == (3, 6, 7, 5)


def test_bad_axes() -> None:
    with pytest.raises(TypeError, match=r"`channel_axis` must be an integer, but got 1.5"):
        truenorm.BatchNorm1d(5, channel_axis=1.5)
    for axis in (0, 3, -3):
        layer = truenorm.BatchNorm1d(5, channel_axis=axis)
        with pytest.raises(ValueError, match=rf"`channel_axis` is {axis}, but an input of 3"):
            layer(torch.randn(2, 3, 5))
        assert layer.num_batches_tracked == 0


def test_tools_for_whole_models_follow_it() -> None:
    model = torch.nn.Sequential(
        torch.nn.Conv1d(3, 5, 1), truenorm.BatchNorm1d(5, channel_axis=-1), torch.nn.Conv1d(5, 2, 1)
    )
    x = torch.randn(4, 3, 5) * 3 + 2
    truenorm.recalibrate(model, [x])
    seen = model[0](x).detach()
    torch.testing.assert_close(model[1].running_mean, seen.mean((0, 1)))
    torch.testing.assert_close(model[1].running_var, seen.var((0, 1)))
    (layer,) = truenorm.inspect(model, x).layers
    torch.testing.assert_close(torch.tensor(layer.channels.mean).float(), seen.mean((0, 1)))
    model.eval()
    expected = model(x)
    report = truenorm.fold(model)
    assert "its channels are dimension -1" in str(report)
    assert torch.equal(model(x), expected)
    with pytest.raises(
        ValueError, match=r"`channel_axis` other than 1, the first '1'.*before revert"
    ):
        truenorm.revert(model)
    assert type(model[1]) is truenorm.BatchNorm1d


@pytest.mark.parametrize("affine", [True, False])
def test_lazy_layers_read_the_channels_there(affine: bool) -> None:
    x = torch.randn(3, 7, 6, 4)
    batch = truenorm.LazyBatchNorm2d(affine=affine, channel_axis=-1)
    instance = truenorm.LazyInstanceNorm2d(affine=affine, channel_axis=3)
    for layer, full in ((batch, truenorm.BatchNorm2d(4)), (instance, truenorm.InstanceNorm2d(4))):
        expected = full(x.movedim(-1, 1)).movedim(1, -1)
        assert torch.equal(layer(x), expected)
        assert layer.num_features == 4
    with pytest.raises(ValueError, match="`channel_axis` is 7"):
        truenorm.LazyBatchNorm2d(channel_axis=7)(x)
