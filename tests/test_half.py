"""Half precision rounds once: where weight · x̂ and bias cancel, at infinities, at a tie."""

from __future__ import annotations

import pytest
import torch
from promises import (
    cancelling_channels,
    cancelling_rows,
    rounded_together,
    rounded_together_below_the_normal_floats,
    same_values,
)
from tolerances import assert_output

import truenorm
from truenorm import reference

HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


@HALVES
@pytest.mark.parametrize("offset", [0.0, 0.4, 40.0])
def test_layer_norm_where_weight_and_bias_cancel(dtype: torch.dtype, offset: float) -> None:
    x, weight, bias = cancelling_rows(dtype, offset)
    x_hat = reference.layer_norm(x.double(), (96,))
    assert (x_hat * weight + bias)[::2].abs().max() < 1e-6
    y = truenorm.functional.layer_norm(x, (96,), weight, bias)
    exact = reference.layer_norm(x.double(), (96,), weight.double(), bias.double())
    # what is smaller still of a weight of 1 is known to 2^-36, and rounded, to float16's last place
    near = exact.abs() < 2.0**-19
    assert near.any()
    assert_output(y[~near], exact[~near])
    last_place = 2.0**-24 if dtype == torch.float16 else 2.0**-27
    assert (y.double() - exact)[near].abs().max() <= 0.501 * last_place


@HALVES
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("offset", [0.0, 0.4, 40.0])
def test_batch_norm_where_weight_and_bias_cancel(
    dtype: torch.dtype, memory_format: torch.memory_format, offset: float
) -> None:
    x, weight, bias = cancelling_channels(dtype, offset)
    y = truenorm.functional.batch_norm(
        x.contiguous(memory_format=memory_format), None, None, weight, bias, training=True
    )
    exact = reference.batch_norm(
        x.double(), None, None, weight.double(), bias.double(), training=True
    )
    assert_output(y, exact)


@HALVES
def test_an_infinite_value_stays_infinite_in_evaluation(dtype: torch.dtype) -> None:
    layer = truenorm.BatchNorm2d(70).eval()
    for held in (layer.weight, layer.running_var):
        held.data.uniform_(0.3, 3.0)
    layer.running_mean.normal_()
    x = torch.randn(2, 70, 9, 5).to(dtype)
    x[0, ::3, 4, 2], x[1, 1::3, 0, 0], x[1, 2::3, 8, 4] = torch.inf, -torch.inf, torch.nan
    for memory_format in (torch.contiguous_format, torch.channels_last):
        y = layer(x.contiguous(memory_format=memory_format))
        assert torch.equal(y.isnan(), x.isnan())
        assert torch.equal(y.isinf(), x.isinf())
        assert torch.equal(y.sign()[x.isinf()], x.sign()[x.isinf()])


@HALVES
def test_equal_values_leave_exactly_the_bias(dtype: torch.dtype) -> None:
    x, weight, bias = same_values(dtype)
    y = truenorm.functional.instance_norm(x, weight=weight, bias=bias)
    assert torch.equal(y, bias.to(dtype).view(1, 4, 1, 1).expand(3, 4, 5, 7))


@pytest.mark.skipif(
    truenorm.info().cpu != "native", reason="a promise of the native kernels, not of plain ops"
)
def test_a_product_and_a_sum_are_rounded_together() -> None:
    layer, x = rounded_together()
    assert layer(x).unique().tolist() == [2.0**24 + 2**17]
    layer, x = rounded_together_below_the_normal_floats()
    assert layer(x).unique().tolist() == [65 * 2.0**-133]
