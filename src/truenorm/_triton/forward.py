"""The forward kernels: a statistic and its values at once where they fit on chip, else in passes.

Moments are centred: float32 sums about a value near the mean, float64 where those cancel or leave
float32's range, partial results merged in float64 in a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import (
    as_float64,
    chunk_bounds,
    narrow,
    optional,
    per_statistic,
    split_program,
    statistics,
    tile_units,
    two_floats,
    value_offsets,
)


@triton.jit
def _tile_moments(x, mask, n, CENTRED: tl.constexpr, GROUPED: tl.constexpr, ACC: tl.constexpr):
    """(mean in float64, variance in float64, x − mean) of a tile that holds whole statistics."""
    if CENTRED:
        first = per_statistic(x, GROUPED) / n
        d = tl.where(mask, x - first[:, None], 0.0)
        # what rounding has left of the mean, and what is lost at a large offset
        rest = per_statistic(d, GROUPED) / n
        d = tl.where(mask, d - rest[:, None], 0.0)
        mean = first.to(tl.float64) + rest.to(tl.float64)
    else:
        d = x
        mean = tl.zeros_like(per_statistic(x, GROUPED)).to(tl.float64)
    m2 = per_statistic(d * d, GROUPED)
    var = (m2 / n).to(tl.float64)
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
            again = (per_statistic(part * part, GROUPED) / n).to(tl.float64) * wide * wide
            var = tl.where(lost, again, var)
    return mean, var, d


@triton.jit(do_not_specialize=["U", "R", "n", "eps_bits"])
def forward(
    p_x, p_weight, p_bias, o_y, o_mean, o_var,
    U, C, K, R, run_stride, units, n, eps_bits,
    BU: tl.constexpr, BK: tl.constexpr,
    COLUMNS: tl.constexpr, RUNS: tl.constexpr, GROUPED: tl.constexpr,
    BY_VALUE: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    CENTRED: tl.constexpr, ACC: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """y, mean and variance, x read once: a tile holds every value of its statistics."""
    u, in_unit, c, begin = tile_units(
        tl.program_id(0), U, C, K, units, BU, COLUMNS, GROUPED, INDEX
    )  # fmt: skip
    at = tl.arange(0, BK)
    if RUNS:
        k, r = (at % K).to(INDEX), (at // K).to(INDEX)
        in_value = at < K * R
        inside = value_offsets(k, C, COLUMNS) + r * run_stride
    else:
        k = at.to(INDEX)
        in_value = at < K
        inside = value_offsets(k, C, COLUMNS)
    offsets = begin[:, None] + inside[None, :]
    mask = in_unit[:, None] & in_value[None, :]
    x = tl.load(p_x + offsets, mask=mask, other=0).to(ACC)
    mean, var, d = _tile_moments(x, mask, tl.full((), n, ACC), CENTRED, GROUPED, ACC)
    if GROUPED:
        statistic, writes = u // units, in_unit & (u % units == 0)
    else:
        statistic, writes = u, in_unit
    tl.store(o_mean + statistic, mean, mask=writes)
    tl.store(o_var + statistic, var, mask=writes)
    rstd = 1.0 / tl.sqrt(var + as_float64(eps_bits))
    if BY_VALUE:
        weight = optional(p_weight, at, in_value, HAS_WEIGHT, 1.0, ACC)
        bias = optional(p_bias, at, in_value, HAS_BIAS, 0.0, ACC)
        y = d * rstd.to(ACC)[:, None] * weight[None, :] + bias[None, :]
    else:
        weight = optional(p_weight, c, in_unit, HAS_WEIGHT, 1.0, tl.float64)
        bias = optional(p_bias, c, in_unit, HAS_BIAS, 0.0, ACC)
        y = d * (rstd * weight).to(ACC)[:, None] + bias[:, None]
    tl.store(o_y + offsets, narrow(y, o_y.dtype.element_ty), mask=mask)


@triton.jit
def _sums(
    p_x, base, in_unit, pivot, r0, r1, k0, k1, C, run_stride,
    COLUMNS: tl.constexpr, BU: tl.constexpr, BK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Sums of x − pivot and of its squares, by unit."""
    s1 = tl.zeros((BU, BK), ACC)
    s2 = tl.zeros((BU, BK), ACC)
    for r in range(r0, r1):
        for start in range(k0, k1, BK):
            k = start + tl.arange(0, BK)
            offsets = (base + r * run_stride)[:, None] + value_offsets(k, C, COLUMNS)[None, :]
            mask = in_unit[:, None] & (k < k1)[None, :]
            x = tl.load(p_x + offsets, mask=mask, other=0).to(ACC)
            d = tl.where(mask, x - pivot[:, None], 0.0)
            s1 += d
            s2 += d * d
    return tl.sum(s1, 1), tl.sum(s2, 1)


@triton.jit(do_not_specialize=["U", "R", "unit_blocks", "chunks", "k_chunks", "r_chunk"])
def moments(
    p_x, o_mean, o_m2,
    U, C, K, R, run_stride, unit_blocks, chunks, k_chunks, k_chunk, r_chunk,
    BU: tl.constexpr, BK: tl.constexpr,
    COLUMNS: tl.constexpr, CHUNKS_FIRST: tl.constexpr,
    CENTRED: tl.constexpr, ACC: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """Mean and M2 of one chunk of some units, in float64, to be merged."""
    block, chunk = split_program(unit_blocks, chunks, CHUNKS_FIRST, False)
    u, in_unit, c, base = tile_units(block, U, C, K, BU, BU, COLUMNS, False, INDEX)
    r0, r1, k0, k1 = chunk_bounds(chunk.to(INDEX), K, R, k_chunks, k_chunk, r_chunk)
    n = ((r1 - r0) * (k1 - k0)).to(ACC)
    if CENTRED:
        # about the mean of the first tile, which one outlier cannot carry far
        k = k0 + tl.arange(0, BK)
        offsets = (base + r0 * run_stride)[:, None] + value_offsets(k, C, COLUMNS)[None, :]
        mask = in_unit[:, None] & (k < k1)[None, :]
        first = tl.load(p_x + offsets, mask=mask, other=0).to(ACC)
        pivot = tl.sum(first, 1) / tl.minimum(k1 - k0, BK).to(ACC)
    else:
        pivot = tl.zeros((BU,), ACC)
    s1, s2 = _sums(
        p_x, base, in_unit, pivot, r0, r1, k0, k1, C, run_stride, COLUMNS, BU, BK, ACC
    )  # fmt: skip
    if not CENTRED:
        s1 = tl.zeros((BU,), ACC)
    m2 = s2 - s1 * (s1 / n)
    mean = pivot.to(tl.float64) + (s1 / n).to(tl.float64)
    m2 = m2.to(tl.float64)
    if ACC == tl.float32:
        # squares outside float32's range, or a first tile far from the mean of the chunk
        lost = (s2 < 1e-24) | (s2 > 1e24) | (s2 != s2) | (m2 < 0.25 * s2)
        if tl.max((lost & in_unit).to(tl.int32), 0) > 0:
            t1, t2 = _sums(
                p_x, base, in_unit, pivot.to(tl.float64), r0, r1, k0, k1, C, run_stride,
                COLUMNS, BU, BK, tl.float64,
            )  # fmt: skip
            if not CENTRED:
                t1 = tl.zeros((BU,), tl.float64)
            wide = n.to(tl.float64)
            m2 = tl.where(lost, t2 - t1 * (t1 / wide), m2)
            mean = tl.where(lost, pivot.to(tl.float64) + t1 / wide, mean)
    tl.store(o_mean + u * chunks + chunk, mean, mask=in_unit)
    tl.store(o_m2 + u * chunks + chunk, m2, mask=in_unit)


@triton.jit(do_not_specialize=["Q", "parts", "chunks", "K", "R", "k_chunks", "k_chunk", "r_chunk"])
def merge_moments(
    p_mean, p_m2, o_mean, o_var,
    Q, parts, chunks, K, R, k_chunks, k_chunk, r_chunk,
    CENTRED: tl.constexpr, BQ: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """Mean and variance of each statistic from its parts, in their order (Chan et al. 1983)."""
    q = tl.program_id(0).to(tl.int64) * BQ + tl.arange(0, BQ)
    in_q = q < Q
    first = tl.load(p_mean + q * parts, mask=in_q, other=0)
    total = (parts // chunks).to(tl.float64) * R * K
    mean = first
    if CENTRED:
        sums = tl.zeros((BQ, BP), tl.float64)
        for start in range(0, parts, BP):
            p = start + tl.arange(0, BP)
            mask = in_q[:, None] & (p < parts)[None, :]
            r0, r1, k0, k1 = chunk_bounds(
                (p % chunks).to(tl.int64), K, R, k_chunks, k_chunk, r_chunk
            )
            n = ((r1 - r0) * (k1 - k0)).to(tl.float64)
            part = tl.load(p_mean + q[:, None] * parts + p[None, :], mask=mask, other=0)
            sums += tl.where(mask, n[None, :] * (part - first[:, None]), 0.0)
        mean = first + tl.sum(sums, 1) / total
    sums = tl.zeros((BQ, BP), tl.float64)
    for start in range(0, parts, BP):
        p = start + tl.arange(0, BP)
        mask = in_q[:, None] & (p < parts)[None, :]
        r0, r1, k0, k1 = chunk_bounds((p % chunks).to(tl.int64), K, R, k_chunks, k_chunk, r_chunk)
        n = ((r1 - r0) * (k1 - k0)).to(tl.float64)
        part = tl.load(p_mean + q[:, None] * parts + p[None, :], mask=mask, other=0)
        off = tl.where(mask, part - mean[:, None], 0.0)
        m2 = tl.load(p_m2 + q[:, None] * parts + p[None, :], mask=mask, other=0)
        sums += m2 + n[None, :] * off * off
    tl.store(o_mean + q, mean, mask=in_q)
    tl.store(o_var + q, tl.sum(sums, 1) / total, mask=in_q)


@triton.jit(
    do_not_specialize=[
        "U", "R", "units", "unit_blocks", "chunks", "k_chunks", "r_chunk", "eps_bits",
    ]
)  # fmt: skip
def normalize(
    p_x, p_mean, p_var, p_weight, p_bias, o_y,
    U, C, K, R, run_stride, units, unit_blocks, chunks, k_chunks, k_chunk, r_chunk, eps_bits,
    BU: tl.constexpr, BK: tl.constexpr,
    COLUMNS: tl.constexpr, CHUNKS_FIRST: tl.constexpr,
    BY_VALUE: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    ACC: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """y from x and given statistics, one for every `units` units."""
    block, chunk = split_program(unit_blocks, chunks, CHUNKS_FIRST, True)
    u, in_unit, c, base = tile_units(block, U, C, K, BU, BU, COLUMNS, False, INDEX)
    r0, r1, k0, k1 = chunk_bounds(chunk.to(INDEX), K, R, k_chunks, k_chunk, r_chunk)
    mean, rstd = statistics(p_mean, p_var, u // units, in_unit, eps_bits)
    high, low = two_floats(mean, ACC)
    if BY_VALUE:
        scale = rstd.to(ACC)
        shift = tl.zeros((BU,), ACC)
    else:
        scale = (rstd * optional(p_weight, c, in_unit, HAS_WEIGHT, 1.0, tl.float64)).to(ACC)
        shift = optional(p_bias, c, in_unit, HAS_BIAS, 0.0, ACC)
    for r in range(r0, r1):
        for start in range(k0, k1, BK):
            k = start + tl.arange(0, BK)
            offsets = (base + r * run_stride)[:, None] + value_offsets(k, C, COLUMNS)[None, :]
            mask = in_unit[:, None] & (k < k1)[None, :]
            x = tl.load(p_x + offsets, mask=mask, other=0).to(ACC)
            y = ((x - high[:, None]) - low[:, None]) * scale[:, None] + shift[:, None]
            if BY_VALUE:
                weight = optional(p_weight, k, k < k1, HAS_WEIGHT, 1.0, ACC)
                bias = optional(p_bias, k, k < k1, HAS_BIAS, 0.0, ACC)
                y = y * weight[None, :] + bias[None, :]
            tl.store(o_y + offsets, narrow(y, o_y.dtype.element_ty), mask=mask)
