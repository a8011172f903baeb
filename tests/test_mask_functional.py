"""Masks and lengths of the functions: as in the layers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import truenorm
import truenorm.functional as F


def statistics() -> tuple[Tensor, Tensor]:
    return torch.randn(4), torch.rand(4) + 0.5


def test_batch_norm() -> None:
    x, lengths, (mean, var) = torch.randn(3, 4, 9) + 2, torch.tensor([9, 5, 2]), statistics()
    layer = truenorm.BatchNorm1d(4)
    layer.running_mean, layer.running_var = mean.clone(), var.clone()
    torch.nn.init.normal_(layer.weight)
    torch.nn.init.normal_(layer.bias)
    parameters = layer.weight.detach(), layer.bias.detach()
    y = F.batch_norm(x, mean, var, *parameters, training=True, lengths=lengths, padding_value=2.0)
    assert torch.equal(y, layer(x, lengths=lengths, padding_value=2.0))
    assert torch.equal(mean, layer.running_mean)
    assert torch.equal(var, layer.running_var)
    assert (y[2, :, 2:] == 2).all()
    mask = torch.rand(3, 9) < 0.5
    y = F.batch_norm(x, mean, var, *parameters, mask=mask)
    assert torch.equal(y, layer.eval()(x, mask=mask))


def test_instance_norm() -> None:
    x, mask, (mean, var) = torch.randn(3, 4, 9) + 2, torch.rand(3, 9) < 0.5, statistics()
    mask[:, :2] = True
    layer = truenorm.InstanceNorm1d(4, track_running_stats=True)
    layer.running_mean, layer.running_var = mean.clone(), var.clone()
    y = F.instance_norm(x, mean, var, mask=mask)
    assert torch.equal(y, layer(x, mask=mask))
    assert torch.equal(mean, layer.running_mean)
    assert torch.equal(var, layer.running_var)
    assert torch.equal(F.instance_norm(x, mask=mask), y)
    y = F.instance_norm(x, mean, var, use_input_stats=False, mask=mask)
    assert torch.equal(y, layer.eval()(x, mask=mask))


def test_group_norm() -> None:
    x, mask = torch.randn(3, 4, 5, 6), torch.rand(3, 5, 6) < 0.5
    expected = truenorm.GroupNorm(2, 4)(x, mask=mask)
    assert torch.equal(F.group_norm(x, 2, mask=mask), expected)


def test_what_does_not_fit_changes_nothing() -> None:
    x, (mean, var) = torch.randn(3, 4, 9), statistics()
    before = mean.clone(), var.clone()
    with pytest.raises(ValueError, match=r"`lengths` holds 10, .*0 to 9"):
        F.batch_norm(x, mean, var, training=True, lengths=torch.tensor([10, 1, 1]))
    with pytest.raises(ValueError, match=r"`mask` has shape \(3, 8\)"):
        F.instance_norm(x, mean, var, mask=torch.ones(3, 8, dtype=torch.bool))
    for call in (F.batch_norm, F.instance_norm):
        with pytest.raises(TypeError, match=r"`padding_value` must be a number.*'0'"):
            call(x, mean, var, padding_value="0")
    with pytest.raises(TypeError, match=r"`padding_value` must be a number.*'0'"):
        F.group_norm(x, 2, padding_value="0")
    assert torch.equal(mean, before[0])
    assert torch.equal(var, before[1])


def test_a_call_traced_by_fx_keeps_its_mask() -> None:
    class Net(torch.nn.Module):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return F.group_norm(x, 2, mask=mask)

    x, mask = torch.randn(3, 4, 9), torch.rand(3, 9) < 0.5
    traced = torch.fx.symbolic_trace(Net())
    assert torch.equal(traced(x, mask), Net()(x, mask))
