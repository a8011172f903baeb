"""LocalResponseNorm's kernels: a value and the channels beside it, which the cache holds.

    y = x · d^−beta,  d = k + alpha / size · Σ x² over the window

float32 where d stays well inside its range; what is outside is computed again in float64.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import as_float64, narrow


@triton.jit
def _denominator(p_x, i, c, mask, C, inner, size, before, ratio, k, TYPE: tl.constexpr):
    """d at the values i, whose channels are c and next channels `inner` apart in memory."""
    energy = tl.zeros(i.shape, TYPE)
    for j in range(size):
        beside = c + (j - before)
        here = mask & (beside >= 0) & (beside < C)
        x = tl.load(p_x + i + (j - before) * inner, mask=here, other=0).to(TYPE)
        energy += x * x
    return k.to(TYPE) + ratio.to(TYPE) * energy


@triton.jit
def _power(d, beta, QUARTERS: tl.constexpr):
    """d^−beta; QUARTERS is 4 · beta where roots give it, else 0."""
    if QUARTERS == 4:
        return 1.0 / d
    if QUARTERS == 2:
        return 1.0 / tl.sqrt(d)
    if QUARTERS == 3:
        root = tl.sqrt(d)
        return 1.0 / (root * tl.sqrt(root))
    power = tl.exp2(-beta.to(d.dtype) * tl.log2(d))
    return tl.where(beta == 0.0, 1.0, power)


@triton.jit
def _forward(
    p_x, i, c, mask, C, inner, size, ratio, beta, k,
    QUARTERS: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    d = _denominator(p_x, i, c, mask, C, inner, size, size // 2, ratio, k, TYPE)
    x = tl.load(p_x + i, mask=mask, other=0).to(TYPE)
    return x * _power(d, beta, QUARTERS), (d < 2.0**-60) | (d > 2.0**60) | (d != d)


@triton.jit(do_not_specialize=["alpha_bits", "beta_bits", "k_bits"])
def local_response(
    p_x, o_y, numel, C, inner, size, alpha_bits, beta_bits, k_bits,
    BLOCK: tl.constexpr, QUARTERS: tl.constexpr, ACC: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(INDEX) * BLOCK + tl.arange(0, BLOCK)
    mask = i < numel
    c = (i // inner) % C
    ratio, beta, k = as_float64(alpha_bits) / size, as_float64(beta_bits), as_float64(k_bits)
    y, lost = _forward(p_x, i, c, mask, C, inner, size, ratio, beta, k, QUARTERS, ACC)
    if ACC == tl.float32:
        if tl.max((lost & mask).to(tl.int32), 0) > 0:
            wide, _ = _forward(
                p_x, i, c, mask, C, inner, size, ratio, beta, k, QUARTERS, tl.float64
            )  # fmt: skip
            y = tl.where(lost, wide.to(tl.float32), y)
    tl.store(o_y + i, narrow(y, o_y.dtype.element_ty), mask=mask)


@triton.jit
def _backward(
    p_grad, p_x, i, c, mask, C, inner, size, ratio, beta, k,
    QUARTERS: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    before = size // 2
    d = _denominator(p_x, i, c, mask, C, inner, size, before, ratio, k, TYPE)
    lost = (d < 2.0**-30) | (d > 2.0**30) | (d != d)
    across = tl.zeros(i.shape, TYPE)
    # the values whose windows hold this one
    for j in range(size):
        step = j - (size - 1 - before)
        beside = c + step
        here = mask & (beside >= 0) & (beside < C)
        there = _denominator(
            p_x, i + step * inner, beside, here, C, inner, size, before, ratio, k, TYPE
        )  # fmt: skip
        lost |= here & ((there < 2.0**-30) | (there > 2.0**30) | (there != there))
        g = tl.load(p_grad + i + step * inner, mask=here, other=0).to(TYPE)
        x = tl.load(p_x + i + step * inner, mask=here, other=0).to(TYPE)
        across += tl.where(here, g * x * (_power(there, beta, QUARTERS) / there), 0.0)
    g = tl.load(p_grad + i, mask=mask, other=0).to(TYPE)
    x = tl.load(p_x + i, mask=mask, other=0).to(TYPE)
    slope = (2.0 * ratio * beta).to(TYPE)
    return g * _power(d, beta, QUARTERS) - slope * x * across, lost


@triton.jit(do_not_specialize=["alpha_bits", "beta_bits", "k_bits"])
def local_response_backward(
    p_grad, p_x, o_grad, numel, C, inner, size, alpha_bits, beta_bits, k_bits,
    BLOCK: tl.constexpr, QUARTERS: tl.constexpr, ACC: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(INDEX) * BLOCK + tl.arange(0, BLOCK)
    mask = i < numel
    c = (i // inner) % C
    ratio, beta, k = as_float64(alpha_bits) / size, as_float64(beta_bits), as_float64(k_bits)
    y, lost = _backward(
        p_grad, p_x, i, c, mask, C, inner, size, ratio, beta, k, QUARTERS, ACC
    )  # fmt: skip
    if ACC == tl.float32:
        if tl.max((lost & mask).to(tl.int32), 0) > 0:
            wide, _ = _backward(
                p_grad, p_x, i, c, mask, C, inner, size, ratio, beta, k, QUARTERS, tl.float64
            )  # fmt: skip
            y = tl.where(lost, wide.to(tl.float32), y)
    tl.store(o_grad + i, narrow(y, o_grad.dtype.element_ty), mask=mask)
