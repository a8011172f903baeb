"""Moments: of whole statistics on chip, or of chunks, and how these are merged.

They are centred: float32 sums about a value near the mean, float64 where those cancel or leave
float32's range, partial results merged in float64 in a fixed order. What is not valid is not
counted, and the moments of nothing are zero.
"""

# what Triton compiles has no Python types
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import (
    chunk_bounds,
    load_tile,
    next_tile,
    partly_summed,
    per_statistic,
    split_program,
    squares,
    tile_units,
    two_floats,
    valid_tile,
    value_offsets,
)

# of a sum of squares in float64: the mean is 2^13 standard deviations from zero
LOST = tl.constexpr(2.0**-26)


@triton.jit
def at_least_one(count):
    return tl.where(count > 0, count, tl.full((), 1, count.dtype))


@triton.jit
def quotient(value, n):
    """value / n, rounded once, with one division for all values.

    That is a call in float64, and in float32 an approximation.
    """
    part = 1.0 / n + tl.zeros_like(value)
    q = value * part
    rest = tl.fma(-q, n + tl.zeros_like(value), value)
    # an infinite quotient has none
    return tl.where(rest == rest, tl.fma(rest, part, q), q)


@triton.jit
def _both(sum_a, squares_a, sum_b, squares_b):
    return sum_a + sum_b, squares_a + squares_b


@triton.jit
def _wide_moments(x, valid, n, GROUPED: tl.constexpr):
    """The same of half precision, whose few bits float64 adds up at once with their squares."""
    wide = x.to(tl.float64)
    s1, s2 = tl.reduce((wide, squares(wide, 1)), 1, _both)
    if GROUPED:
        of_all, of_squares = tl.reduce((s1, s2), 0, _both)
        s1, s2 = of_all + tl.zeros_like(s1), of_squares + tl.zeros_like(s2)
    mean = quotient(s1, n)
    m2 = s2 - s1 * mean
    lost = m2 < s2 * LOST
    if tl.max(lost.to(tl.int32), 0) > 0:
        d = tl.where(valid, wide - mean[:, None], 0.0)
        m2 = tl.where(lost, per_statistic(squares(d, 1), GROUPED), m2)
    return mean, quotient(m2, n)


@triton.jit
def tile_moments(
    x, valid, n, CENTRED: tl.constexpr, GROUPED: tl.constexpr, WIDE: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """(mean in float64, variance in float64, x − mean) of a tile that holds whole statistics."""
    if WIDE:
        mean, var = _wide_moments(x, valid, n.to(tl.float64), GROUPED)
        high, low = two_floats(mean, ACC)
        return mean, var, (x - high[:, None]) - low[:, None]
    if CENTRED:
        first = quotient(per_statistic(x, GROUPED), n)
        d = tl.where(valid, x - first[:, None], 0.0)
        # what rounding has left of the mean, and what is lost at a large offset
        rest = quotient(per_statistic(d, GROUPED), n)
        d = tl.where(valid, d - rest[:, None], 0.0)
        mean = first.to(tl.float64) + rest.to(tl.float64)
    else:
        d = x
        mean = tl.zeros_like(per_statistic(x, GROUPED)).to(tl.float64)
    m2 = per_statistic(squares(d, 1), GROUPED)
    var = quotient(m2, n).to(tl.float64)
    if ACC == tl.float32:
        lost = (m2 < 1e-24) | (m2 > 1e24) | (m2 != m2)
        if tl.max(lost.to(tl.int32), 0) > 0:
            # squares outside float32's range: of the values over their largest
            largest = tl.max(tl.abs(d), 1)
            if GROUPED:
                largest = tl.max(largest, 0) + tl.zeros_like(largest)
            largest = tl.where(largest > 0.0, largest, 1.0)
            part = d / largest[:, None]
            wide = largest.to(tl.float64)
            again = quotient(per_statistic(squares(part, 1), GROUPED), n).to(tl.float64)
            var = tl.where(lost, again * wide * wide, var)
    return mean, var, d


@triton.jit
def _sums(
    p_x, p_mask, u, in_unit, sample, base, pivot, r0, r1, k0, k1, C, K, run_stride,
    COLUMNS: tl.constexpr, MASK: tl.constexpr, BU: tl.constexpr, BK: tl.constexpr,
    KEPT: tl.constexpr, STAGES: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Sums of x − pivot, of its squares, and of how many there are, by unit."""
    s1 = tl.zeros((BU, KEPT), ACC)
    s2 = tl.zeros((BU, KEPT), ACC)
    count = tl.zeros((BU, KEPT), tl.int32)
    r, start, steps = r0, k0, (r1 - r0) * ((k1 - k0 + BK - 1) // BK)
    for _ in tl.range(0, steps, num_stages=STAGES):
        k = start + tl.arange(0, BK)
        offsets = (base + r * run_stride)[:, None] + value_offsets(k, C, COLUMNS)[None, :]
        there, valid = valid_tile(
            p_mask, u, in_unit, sample, r * K + k, k < k1, K, MASK, COLUMNS
        )  # fmt: skip
        x = tl.load(p_x + offsets, mask=there, other=0).to(ACC)
        d = tl.where(valid, x - pivot[:, None], 0.0)
        s1 += partly_summed(d, 1, KEPT)
        s2 += partly_summed(d * d, 1, KEPT)
        if MASK:
            count += partly_summed(valid.to(tl.int32), 1, KEPT)
        r, start = next_tile(r, start, k0, k1, BK)
    return tl.sum(s1, 1), tl.sum(s2, 1), tl.sum(count, 1)


@triton.jit(do_not_specialize=["U", "R", "unit_blocks", "chunks", "k_chunks", "r_chunk"])
def moments(
    p_x, p_mask, o_mean, o_m2, o_count,
    U, C, K, R, run_stride, unit_blocks, chunks, k_chunks, k_chunk, r_chunk,
    BU: tl.constexpr, BK: tl.constexpr,
    COLUMNS: tl.constexpr, CHUNKS_FIRST: tl.constexpr,
    CENTRED: tl.constexpr, MASK: tl.constexpr, WIDE: tl.constexpr, STAGES: tl.constexpr,
    KEPT: tl.constexpr, ACC: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """Mean and M2 of one chunk of some units, in float64, to be merged; under a mask the count."""
    block, chunk = split_program(unit_blocks, chunks, CHUNKS_FIRST, False)
    u, in_unit, _channel, sample, base = tile_units(
        block, U, C, K, R, run_stride, BU, 0, BU, COLUMNS, False, 0, INDEX
    )  # fmt: skip
    r0, r1, k0, k1 = chunk_bounds(chunk.to(INDEX), K, R, k_chunks, k_chunk, r_chunk)
    # half precision's few bits need no value near the mean in float64
    if CENTRED and not WIDE:
        # about the mean of the first tile, which one outlier cannot carry far
        k = k0 + tl.arange(0, BK)
        offsets = (base + r0 * run_stride)[:, None] + value_offsets(k, C, COLUMNS)[None, :]
        there, valid = valid_tile(
            p_mask, u, in_unit, sample, r0 * K + k, k < k1, K, MASK, COLUMNS
        )  # fmt: skip
        first = load_tile(p_x, offsets, there, valid, MASK, ACC)
        if MASK:
            pivot = tl.sum(first, 1) / at_least_one(tl.sum(valid.to(tl.int32), 1)).to(ACC)
        else:
            pivot = tl.sum(first, 1) / tl.minimum(k1 - k0, BK).to(ACC)
    else:
        pivot = tl.zeros((BU,), ACC)
    s1, s2, count = _sums(
        p_x, p_mask, u, in_unit, sample, base, pivot, r0, r1, k0, k1, C, K, run_stride,
        COLUMNS, MASK, BU, BK, KEPT, STAGES, ACC,
    )  # fmt: skip
    if MASK:
        n = at_least_one(count).to(ACC)
    else:
        n = ((r1 - r0) * (k1 - k0)).to(ACC)
    if not CENTRED:
        s1 = tl.zeros((BU,), ACC)
    average = quotient(s1, n)
    m2 = s2 - s1 * average
    mean = pivot.to(tl.float64) + average.to(tl.float64)
    m2 = m2.to(tl.float64)
    if ACC == tl.float32 or (WIDE and CENTRED):
        if WIDE:
            lost = m2 < s2 * LOST
        else:
            # squares outside float32's range, or a first tile far from the mean of the chunk
            lost = (s2 < 1e-24) | (s2 > 1e24) | (s2 != s2) | (m2 < 0.25 * s2)
        if MASK:
            lost &= count > 0
        if tl.max((lost & in_unit).to(tl.int32), 0) > 0:
            # a narrow tile: a path that is seldom taken must not cost the other its registers
            NARROW: tl.constexpr = BK // 8 if BK > 8 else 1
            if MASK or WIDE:
                # the first tile may have had nothing that is valid, and no mean
                wide_pivot = mean
            else:
                wide_pivot = pivot.to(tl.float64)
            t1, t2, _again = _sums(
                p_x, p_mask, u, in_unit, sample, base, wide_pivot, r0, r1, k0, k1, C, K,
                run_stride, COLUMNS, MASK, BU, NARROW, NARROW, 1, tl.float64,
            )  # fmt: skip
            if not CENTRED:
                t1 = tl.zeros((BU,), tl.float64)
            wide = n.to(tl.float64)
            rest = quotient(t1, wide)
            m2 = tl.where(lost, t2 - t1 * rest, m2)
            mean = tl.where(lost, wide_pivot + rest, mean)
    tl.store(o_mean + u * chunks + chunk, mean, mask=in_unit)
    tl.store(o_m2 + u * chunks + chunk, m2, mask=in_unit)
    if MASK:
        tl.store(o_count + u * chunks + chunk, count, mask=in_unit)


@triton.jit
def _part_counts(
    p_count, q, p, mask, parts, chunks, K, R, k_chunks, k_chunk, r_chunk, HAS_MASK: tl.constexpr
):  # fmt: skip
    """How many values a part has: stored, or told by its place."""
    if HAS_MASK:
        n = tl.load(p_count + q[:, None] * parts + p[None, :], mask=mask, other=0)
    else:
        r0, r1, k0, k1 = chunk_bounds((p % chunks).to(tl.int64), K, R, k_chunks, k_chunk, r_chunk)
        n = ((r1 - r0) * (k1 - k0))[None, :]
    return n.to(tl.float64)


@triton.jit(
    do_not_specialize=["Q", "parts", "chunks", "K", "R", "k_chunks", "k_chunk", "r_chunk"]
)  # fmt: skip
def merge_moments(
    p_mean, p_m2, p_count, o_record,
    Q, parts, chunks, K, R, k_chunks, k_chunk, r_chunk,
    CENTRED: tl.constexpr, HAS_MASK: tl.constexpr, BQ: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """The record of each statistic from its parts, in their order (Chan et al. 1983)."""
    q = tl.program_id(0).to(tl.int64) * BQ + tl.arange(0, BQ)
    in_q = q < Q
    first = tl.load(p_mean + q * parts, mask=in_q, other=0)
    if HAS_MASK:
        counts = tl.zeros((BQ, BP), tl.float64)
        for start in range(0, parts, BP):
            p = start + tl.arange(0, BP)
            mask = in_q[:, None] & (p < parts)[None, :]
            counts += _part_counts(
                p_count, q, p, mask, parts, chunks, K, R, k_chunks, k_chunk, r_chunk, True
            )  # fmt: skip
        count = tl.sum(counts, 1)
        total = at_least_one(count)
    else:
        total = (parts // chunks).to(tl.float64) * R * K
        count = tl.zeros((BQ,), tl.float64) + total
    mean = first
    if CENTRED:
        sums = tl.zeros((BQ, BP), tl.float64)
        for start in range(0, parts, BP):
            p = start + tl.arange(0, BP)
            mask = in_q[:, None] & (p < parts)[None, :]
            n = _part_counts(
                p_count, q, p, mask, parts, chunks, K, R, k_chunks, k_chunk, r_chunk, HAS_MASK
            )  # fmt: skip
            part = tl.load(p_mean + q[:, None] * parts + p[None, :], mask=mask, other=0)
            sums += tl.where(mask, n * (part - first[:, None]), 0.0)
        mean = first + tl.sum(sums, 1) / total
        if HAS_MASK:
            mean = tl.where(count > 0, mean, 0.0)
    sums = tl.zeros((BQ, BP), tl.float64)
    for start in range(0, parts, BP):
        p = start + tl.arange(0, BP)
        mask = in_q[:, None] & (p < parts)[None, :]
        n = _part_counts(
            p_count, q, p, mask, parts, chunks, K, R, k_chunks, k_chunk, r_chunk, HAS_MASK
        )  # fmt: skip
        part = tl.load(p_mean + q[:, None] * parts + p[None, :], mask=mask, other=0)
        off = tl.where(mask, part - mean[:, None], 0.0)
        m2 = tl.load(p_m2 + q[:, None] * parts + p[None, :], mask=mask, other=0)
        sums += m2 + n * off * off
    tl.store(o_record + q, mean, mask=in_q)
    tl.store(o_record + Q + q, tl.sum(sums, 1) / total, mask=in_q)
    tl.store(o_record + 2 * Q + q, count, mask=in_q)
