"""Half precision on the Triton kernels: rounded once where weight · x̂, bias and residual cancel, at
infinities, and where a mean is far from zero.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from on_triton import DEVICE, HAS_TRITON, launches, needs_triton, small_tiles, triton_kernels
from promises import cancelling_channels, cancelling_rows, same_values
from tolerances import assert_output
from torch import Tensor

import truenorm
from truenorm import functional, reference
from truenorm._core import geometry
from truenorm._core.call import Form

pytestmark = needs_triton

if HAS_TRITON:
    import triton
    import triton.language as tl

    from truenorm._triton.twice import exact_base

    @triton.jit
    def bases(p_mean, p_rstd, o, N: tl.constexpr, TYPE: tl.constexpr):  # type: ignore[no-untyped-def]
        at = tl.arange(0, N)
        tl.store(o + at, exact_base(tl.load(p_mean + at), tl.load(p_rstd + at), TYPE))


HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
CUTS: dict[str, Any] = {"whole": nullcontext, "chunks": small_tiles}
BY_CUT = pytest.mark.parametrize("cut", CUTS)
OFFSETS = pytest.mark.parametrize("offset", [0.0, 0.4, 40.0])


def on_device(*tensors: Tensor) -> list[Tensor]:
    return [t.to(DEVICE) for t in tensors]


@HALVES
@BY_CUT
@OFFSETS
def test_rows_where_weight_and_bias_cancel(dtype: torch.dtype, cut: str, offset: float) -> None:
    x, weight, bias = on_device(*cancelling_rows(dtype, offset))
    with CUTS[cut](), triton_kernels():
        y = functional.layer_norm(x, (96,), weight, bias)
    exact = reference.layer_norm(x.double(), (96,), weight.double(), bias.double())
    # what is smaller still of a weight of 1 is known to 2^-36
    near = exact.abs() < 2.0**-19
    assert near.any()
    assert_output(y[~near], exact[~near])
    last_place = 2.0**-24 if dtype == torch.float16 else 2.0**-27
    assert (y.double() - exact)[near].abs().max() <= 0.501 * last_place


@HALVES
@BY_CUT
@OFFSETS
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_channels_where_weight_and_bias_cancel(
    dtype: torch.dtype, memory_format: torch.memory_format, cut: str, offset: float
) -> None:
    x, weight, bias = on_device(*cancelling_channels(dtype, offset))
    x = x.contiguous(memory_format=memory_format)
    with CUTS[cut](), triton_kernels():
        y = functional.batch_norm(x, None, None, weight, bias, training=True)
    exact = reference.batch_norm(
        x.double(), None, None, weight.double(), bias.double(), training=True
    )
    assert_output(y, exact)


@HALVES
@BY_CUT
@pytest.mark.parametrize("kind", ["rows", "channels"])
def test_a_residual_that_cancels_too(dtype: torch.dtype, kind: str, cut: str) -> None:
    """The negative of the rounded norm: what is left is what rounding lost."""
    layer: Any = (
        truenorm.LayerNorm(96) if kind == "rows" else truenorm.InstanceNorm2d(5, affine=True)
    )
    for p in layer.parameters():
        p.data.normal_()
    x = torch.randn((33, 96) if kind == "rows" else (3, 5, 9, 7)).to(dtype)
    norm = layer.double()(x.double())
    residual = (-norm).to(dtype)
    layer.float().to(DEVICE)
    with CUTS[cut](), triton_kernels(), torch.no_grad():
        y = layer(x.to(DEVICE), residual=residual.to(DEVICE)).cpu()
    exact = norm + residual.double()
    # of sums of about 4, a float32 has 2^-22
    assert (exact.abs() < 2.0**-10).any()
    error = (y.double() - exact).abs()
    assert error.max() <= 0.501 * torch.finfo(dtype).eps * exact.abs().max()
    far = exact.abs() > 2.0**-14
    assert_output(y[far], exact[far])


@HALVES
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_an_infinite_value_stays_infinite_in_evaluation(
    dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    layer = truenorm.BatchNorm2d(70).eval()
    for held in (layer.weight, layer.running_var):
        held.data.uniform_(0.3, 3.0)
    layer.running_mean.normal_()
    x = torch.randn(2, 70, 9, 5).to(dtype)
    x[0, ::3, 4, 2], x[1, 1::3, 0, 0], x[1, 2::3, 8, 4] = torch.inf, -torch.inf, torch.nan
    layer.to(DEVICE)
    with triton_kernels():
        y = layer(x.to(DEVICE).contiguous(memory_format=memory_format)).cpu()
    assert torch.equal(y.isnan(), x.isnan())
    assert torch.equal(y.isinf(), x.isinf())
    assert torch.equal(y.sign()[x.isinf()], x.sign()[x.isinf()])


@HALVES
@BY_CUT
def test_equal_values_leave_exactly_the_bias(dtype: torch.dtype, cut: str) -> None:
    """Of 117 values too, whose sum times 1 / 117 is not the value that they all have."""
    x, weight, bias = on_device(*same_values(dtype))
    # the smallest float beside it would be seen
    bias[2] = 0.0
    for size in ((5, 7), (9, 13)):
        more = x[..., :1, :1].expand(3, 4, *size).contiguous()
        with CUTS[cut](), triton_kernels():
            y = functional.instance_norm(more, weight=weight, bias=bias)
        assert torch.equal(y, bias.to(dtype).view(1, 4, 1, 1).expand_as(more))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("cut", ["whole", "chunks"])
def test_a_mean_that_sums_of_squares_do_not_see(masked: bool, cut: str) -> None:
    """One value of 4,095 is the next number after all others: a mean of 2^16 deviations, whose
    squares leave no more than 2^-20 of the variance in float64.
    """
    x = torch.full((2, 3, 63, 65), 1000.0).half()
    # in a chunk of 2,047 values: sums of a power of two are exact
    x[0, 1, 40, 7] = 1000.5
    x[1, 2] = torch.randn(63, 65)
    mask = torch.rand(2, 63, 65) < (0.9 if masked else 2.0)
    mask[0, 40, 7] = True
    wide, valid = x.double(), mask[:, None]
    count = valid.sum((2, 3), keepdim=True)
    mean = (wide * valid).sum((2, 3), keepdim=True) / count
    var = ((wide - mean).square() * valid).sum((2, 3), keepdim=True) / count
    assert mean[0, 1] / var[0, 1].sqrt() > 2**15
    given = mask.to(DEVICE) if masked else None
    with small_tiles(forward=0) if cut == "chunks" else nullcontext(), triton_kernels():
        form = Form(geometry.instance(3), 0.0).bits(x)
        found = torch.ops.truenorm.statistics(x.to(DEVICE), given, form).cpu()
        ones = torch.ones(3, device=DEVICE)
        y = functional.instance_norm(
            x.to(DEVICE), weight=ones, bias=0 * ones, eps=1e-9, mask=given
        ).cpu()
    for i, exact in enumerate((mean, var, count.expand(2, 3, 1, 1))):
        assert torch.allclose(found[i], exact.double().flatten(), rtol=1e-12, atol=0.0)
    assert_output(y, (wide - mean) / (var + 1e-9).sqrt() * valid)


@HALVES
def test_the_mean_of_an_infinite_value_is_infinite(dtype: torch.dtype) -> None:
    """As running statistics take it, from a tile of float32 too."""
    x = torch.randn(3, 70).to(dtype)
    x[1, 5], x[2, 69] = torch.inf, -torch.inf
    with triton_kernels():
        form = Form(geometry.layer(1), 0.0).bits(x)
        mean, var, _ = torch.ops.truenorm.statistics(x.to(DEVICE), None, form).cpu()
    assert torch.isfinite(mean[0])
    assert mean[1:].tolist() == [torch.inf, -torch.inf]
    assert not torch.isfinite(var[1:]).any()


@HALVES
def test_what_is_subtracted_first(dtype: torch.dtype) -> None:
    """Nothing where the mean goes into a coefficient, the mean itself where it is of x's type, and
    else so much of it that no bit of an x of its size is lost.
    """
    own = torch.tensor(1.37).to(dtype).double().item()
    mean = torch.tensor([1.7, -1.7, own, 1e3 + 1 / 3, -500 / 7, 0.0, float("nan"), 33.3]).double()
    rstd = torch.tensor([10.0, 18.0, 1.0, 1.0, 1.0, 1e9, 1.0, 0.5]).double()
    found = torch.empty(8, device=DEVICE)
    with launches():
        kind = tl.bfloat16 if dtype == torch.bfloat16 else tl.float16
        bases[(1,)](*on_device(mean, rstd), found, 8, kind)
    taken = found.cpu().double()
    assert taken[[0, 1, 5, 7]].tolist() == [0.0] * 4
    assert taken[2] == own
    for i in (3, 4):
        # as many bits as x has
        assert taken[i].to(dtype).double() == taken[i]
        near = mean[i].to(dtype).double()
        assert abs(taken[i] - mean[i]) <= 2 * torch.finfo(dtype).eps * abs(mean[i])
        assert (near.float() - taken[i].float()).double() == near - taken[i]
