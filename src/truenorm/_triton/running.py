"""The running statistics' kernel: both of them, and the batch counted, in one launch."""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import as_float64, narrow


@triton.jit(do_not_specialize=["C", "samples", "momentum_bits"])
def move(
    p_record, p_finite, o_mean, o_var, o_count,
    C, samples, momentum_bits,
    HAS_COUNT: tl.constexpr, AVERAGE: tl.constexpr, SKIPS: tl.constexpr,
    BC: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """running = (1 − momentum) · running + momentum · observed, the observed variance unbiased and
    averaged over samples; what spans fewer than two values has none, and is left out.

    AVERAGE: momentum is 1 / batches seen; the count is then moved by whoever launches this, since
    other programs read it. SKIPS: nothing moves where p_finite says so.
    """
    c = tl.program_id(0).to(tl.int64) * BC + tl.arange(0, BC)
    in_c = c < C
    S = C.to(tl.int64) * samples
    mean = tl.zeros((BN, BC), tl.float64)
    var = tl.zeros((BN, BC), tl.float64)
    counted = tl.zeros((BN, BC), tl.float64)
    for start in range(0, samples, BN):
        n = start + tl.arange(0, BN)
        mask = (n < samples)[:, None] & in_c[None, :]
        at = n.to(tl.int64)[:, None] * C + c[None, :]
        count = tl.load(p_record + 2 * S + at, mask=mask, other=0)
        there = count > 1
        of_mean = tl.load(p_record + at, mask=mask, other=0)
        of_var = tl.load(p_record + S + at, mask=mask, other=0)
        mean += tl.where(there, of_mean, 0.0)
        var += tl.where(there, of_var * (count / (count - 1.0)), 0.0)
        counted += there.to(tl.float64)
    over = tl.sum(counted, 0)
    moves = over > 0
    if SKIPS:
        finite = tl.load(p_finite).to(tl.int64)
        moves = over * finite.to(tl.float64) > 0
    seen_mean = tl.sum(mean, 0) / over
    seen_var = tl.sum(var, 0) / over
    if AVERAGE:
        factor = 1.0 / (tl.load(o_count).to(tl.float64) + 1.0)
    else:
        factor = as_float64(momentum_bits)
    was_mean = tl.load(o_mean + c, mask=in_c, other=0).to(tl.float64)
    was_var = tl.load(o_var + c, mask=in_c, other=0).to(tl.float64)
    now_mean = (1.0 - factor) * was_mean + factor * seen_mean
    now_var = (1.0 - factor) * was_var + factor * seen_var
    tl.store(o_mean + c, narrow(now_mean, o_mean.dtype.element_ty), mask=in_c & moves)
    tl.store(o_var + c, narrow(now_var, o_var.dtype.element_ty), mask=in_c & moves)
    if HAS_COUNT and not AVERAGE:
        if tl.program_id(0) == 0:
            if SKIPS:
                tl.store(o_count, tl.load(o_count) + finite)
            else:
                tl.store(o_count, tl.load(o_count) + 1)
