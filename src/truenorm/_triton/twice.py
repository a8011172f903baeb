"""Half precision by two floats: outputs that are off by little more than their rounding to float32,
where weight · x̂, bias and a residual cancel too, as csrc/kernel_elementwise.h has them.

What is small is the difference of products that a fused operation rounds once, so that float64
takes no part but in sums and coefficients.
"""

# what Triton compiles has no Python types
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import two_floats

# of steps of 2^-14
_TO_GRID = tl.constexpr(1.5 * 2.0**9)


@triton.jit
def exact_base(mean, rstd, TYPE: tl.constexpr):
    """What is subtracted from x, so that the difference is exact: nothing where the mean is small
    enough to go into a coefficient, and else the mean, so coarse that it loses no bit of an x of
    its size. A mean that is itself of TYPE, as where all values are equal, is subtracted whole, so
    that exactly the bias is left.
    """
    rounded = mean.to(tl.float32)
    bits = rounded.to(tl.int32, bitcast=True)
    if TYPE == tl.bfloat16:
        bits = (bits >> 16) << 16
    else:
        bits = (bits >> 13) << 13
    base = bits.to(tl.float32, bitcast=True)
    near = tl.abs(rounded) * rstd.to(tl.float32) <= 32.0
    return tl.where((base.to(tl.float64) != mean) & near, 0.0, base)


@triton.jit
def on_grid(value):
    """The number nearest to a float32 on a grid, from which the difference is exact as long as the
    value is less than 2^10.
    """
    return (value + _TO_GRID) - _TO_GRID


@triton.jit
def _sum_exactly(d, scale, shift, residual, low):
    """d · scale + shift + residual + low as two floats. What rounding loses before the residual is
    added counts where that cancels; of the last sum it does not, being exact there. Compiled
    without fused operations but for those that are written.
    """
    product = d * scale
    of_product = tl.fma(d, scale, -product)
    first = product + shift
    part = first - product
    of_first = (product - (first - part)) + (shift - part)
    return first + residual, of_first + (of_product + low)


@triton.jit
def _affine(
    d, scale, shift, low, p_residual, offsets, there, HAS_RESIDUAL: tl.constexpr,
    OWN: tl.constexpr,
):  # fmt: skip
    """d · scale + shift + low, and the residual's value, rounded to float32."""
    if HAS_RESIDUAL:
        residual = tl.load(p_residual + offsets, mask=there, other=0).to(tl.float32)
        y, rest = _sum_exactly(d, scale, shift, residual, low)
    else:
        y, rest = tl.fma(d, scale, shift), low
    out = y + rest
    if not OWN:
        # the rest of an infinite value may be infinite the other way, or NaN
        out = tl.where(out == out, out, y)
    return out


@triton.jit
def units(
    x, mean, rstd, weight, bias, p_residual, offsets, there, HAS_RESIDUAL: tl.constexpr,
    OWN: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """y of units, as (x − base) · scale + shift, by weight and bias in float64, all of a unit each.

    OWN: by statistics of x's own, which an infinite value spoils.
    """
    base = exact_base(mean, rstd, TYPE)
    slope = rstd * weight
    scale, scale_rest = two_floats(slope, tl.float32)
    shift, shift_rest = two_floats(bias - (mean - base.to(tl.float64)) * slope, tl.float32)
    d = x - base[:, None]
    low = tl.fma(d, scale_rest[:, None], shift_rest[:, None])
    return _affine(
        d, scale[:, None], shift[:, None], low, p_residual, offsets, there, HAS_RESIDUAL, OWN
    )  # fmt: skip


@triton.jit
def rows(
    x, mean, rstd, weight, bias, p_residual, offsets, there, HAS_RESIDUAL: tl.constexpr,
    OWN: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """y of rows, weight and bias being of a value each: x̂ = (x − base) · scale + offset is two
    floats, the one nearest on a grid, and the rest.
    """
    base = exact_base(mean, rstd, TYPE)
    scale, scale_rest = two_floats(rstd, tl.float32)
    whole = (base.to(tl.float64) - mean) * rstd
    offset = on_grid(whole.to(tl.float32))
    offset_rest = (whole - offset.to(tl.float64)).to(tl.float32)
    d = x - base[:, None]
    near = on_grid(tl.fma(d, scale[:, None], offset[:, None]))
    rest = tl.fma(d, scale[:, None], offset[:, None] - near)
    rest += tl.fma(d, scale_rest[:, None], offset_rest[:, None])
    return _affine(
        near, weight, bias, weight * rest, p_residual, offsets, there, HAS_RESIDUAL, OWN
    )  # fmt: skip
