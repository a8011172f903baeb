"""The running statistics' kernel: both of them, and the batch counted, in one launch."""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import as_float64, narrow


@triton.jit(do_not_specialize=["C", "samples", "values", "momentum_bits"])
def update_running(
    p_mean, p_var, o_mean, o_var, o_count,
    C, samples, values, momentum_bits,
    HAS_COUNT: tl.constexpr, AVERAGE: tl.constexpr, BC: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """running = (1 − momentum) · running + momentum · observed, the observed variance unbiased.

    AVERAGE: momentum is 1 / batches seen; the count is then moved by whoever launches this, since
    other programs read it.
    """
    c = tl.program_id(0).to(tl.int64) * BC + tl.arange(0, BC)
    in_c = c < C
    mean = tl.zeros((BN, BC), tl.float64)
    var = tl.zeros((BN, BC), tl.float64)
    for start in range(0, samples, BN):
        n = start + tl.arange(0, BN)
        mask = (n < samples)[:, None] & in_c[None, :]
        at = n.to(tl.int64)[:, None] * C + c[None, :]
        mean += tl.load(p_mean + at, mask=mask, other=0).to(tl.float64)
        var += tl.load(p_var + at, mask=mask, other=0).to(tl.float64)
    over = tl.full((), samples, tl.float64)
    wide = tl.full((), values, tl.float64)
    seen_mean = tl.sum(mean, 0) / over
    seen_var = tl.sum(var, 0) / over * (wide / (wide - 1.0))
    if AVERAGE:
        factor = 1.0 / (tl.load(o_count).to(tl.float64) + 1.0)
    else:
        factor = as_float64(momentum_bits)
    was_mean = tl.load(o_mean + c, mask=in_c, other=0).to(tl.float64)
    was_var = tl.load(o_var + c, mask=in_c, other=0).to(tl.float64)
    now_mean = (1.0 - factor) * was_mean + factor * seen_mean
    now_var = (1.0 - factor) * was_var + factor * seen_var
    tl.store(o_mean + c, narrow(now_mean, o_mean.dtype.element_ty), mask=in_c)
    tl.store(o_var + c, narrow(now_var, o_var.dtype.element_ty), mask=in_c)
    if HAS_COUNT and not AVERAGE:
        if tl.program_id(0) == 0:
            tl.store(o_count, tl.load(o_count) + 1)
