"""The backward kernels: x and the output's gradient read once where they fit on chip, or in passes.

    grad_x = (w·g − mean(w·g) − x̂ · mean(w·g·x̂)) / std        means over a statistic
    grad_weight = Σ g·x̂,  grad_bias = Σ g                     over a parameter's values

1 / std multiplies last: its product with the slope leaves float32's range at scales where each of
them does not.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import (
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


@triton.jit(do_not_specialize=["U", "R", "n", "blocks", "eps_bits"])
def backward(
    p_grad, p_x, p_mean, p_var, p_weight, o_grad, o_weight, o_bias,
    U, C, K, R, run_stride, units, n, blocks, eps_bits,
    BU: tl.constexpr, BK: tl.constexpr,
    COLUMNS: tl.constexpr, RUNS: tl.constexpr, GROUPED: tl.constexpr,
    BY_VALUE: tl.constexpr, HAS_WEIGHT: tl.constexpr, CENTRED: tl.constexpr,
    FIXED: tl.constexpr, NEEDS_X: tl.constexpr, NEEDS_PARAMETERS: tl.constexpr,
    ACC: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """grad_x, x and grad read once; sums for the parameters.

    One sum per unit, or, where parameters go by value, one row of sums per program.
    """
    at = tl.arange(0, BK)
    if RUNS:
        k, r = (at % K).to(INDEX), (at // K).to(INDEX)
        in_value = at < K * R
        inside = value_offsets(k, C, COLUMNS) + r * run_stride
    else:
        k = at.to(INDEX)
        in_value = at < K
        inside = value_offsets(k, C, COLUMNS)
    if BY_VALUE:
        by_value = optional(p_weight, at, in_value, HAS_WEIGHT, 1.0, ACC)
        of_weight = tl.zeros((BK,), ACC)
        of_bias = tl.zeros((BK,), ACC)
    for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
        u, in_unit, c, begin = tile_units(block, U, C, K, units, BU, COLUMNS, GROUPED, INDEX)
        offsets = begin[:, None] + inside[None, :]
        mask = in_unit[:, None] & in_value[None, :]
        if GROUPED:
            statistic = u // units
        else:
            statistic = u
        mean, rstd = statistics(p_mean, p_var, statistic, in_unit, eps_bits)
        high, low = two_floats(mean, ACC)
        rstd = rstd.to(ACC)
        g = tl.load(p_grad + offsets, mask=mask, other=0).to(ACC)
        x = tl.load(p_x + offsets, mask=mask, other=0).to(ACC)
        x_hat = tl.where(mask, ((x - high[:, None]) - low[:, None]) * rstd[:, None], 0.0)
        if BY_VALUE:
            if NEEDS_PARAMETERS:
                of_weight += tl.sum(g * x_hat, 0)
                of_bias += tl.sum(g, 0)
            wg = g * by_value[None, :]
        else:
            weight = optional(p_weight, c, in_unit, HAS_WEIGHT, 1.0, ACC)
            if NEEDS_PARAMETERS:
                sums = tl.sum(g * x_hat, 1)
                tl.store(o_weight + u, narrow(sums, o_weight.dtype.element_ty), mask=in_unit)
                sums = tl.sum(g, 1)
                tl.store(o_bias + u, narrow(sums, o_bias.dtype.element_ty), mask=in_unit)
            wg = g * weight[:, None]
        if NEEDS_X:
            if not FIXED:
                slope = per_statistic(wg * x_hat, GROUPED) / tl.full((), n, ACC)
                if CENTRED:
                    shift = per_statistic(wg, GROUPED) / tl.full((), n, ACC)
                    wg -= shift[:, None]
                wg -= x_hat * slope[:, None]
            y = wg * rstd[:, None]
            tl.store(o_grad + offsets, narrow(y, o_grad.dtype.element_ty), mask=mask)
    if BY_VALUE and NEEDS_PARAMETERS:
        row = tl.program_id(0).to(INDEX) * K
        tl.store(o_weight + row + at, of_weight, mask=in_value)
        tl.store(o_bias + row + at, of_bias, mask=in_value)


@triton.jit(
    do_not_specialize=[
        "U", "R", "units", "unit_blocks", "chunks", "k_chunks", "r_chunk", "eps_bits",
    ]
)  # fmt: skip
def backward_sums(
    p_grad, p_x, p_mean, p_var, p_weight, o_gx, o_g,
    U, C, K, R, run_stride, units, unit_blocks, chunks, k_chunks, k_chunk, r_chunk, eps_bits,
    BU: tl.constexpr, BK: tl.constexpr,
    COLUMNS: tl.constexpr, CHUNKS_FIRST: tl.constexpr,
    STATISTIC_BY_VALUE: tl.constexpr, WEIGHTED: tl.constexpr,
    ACC: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """Sums of g·x̂ and of g over one chunk of some units.

    The statistic goes by unit, or by value: a feature's sum over the rows of a layer norm.
    """
    block, chunk = split_program(unit_blocks, chunks, CHUNKS_FIRST, False)
    u, in_unit, c, base = tile_units(block, U, C, K, BU, BU, COLUMNS, False, INDEX)
    r0, r1, k0, k1 = chunk_bounds(chunk.to(INDEX), K, R, k_chunks, k_chunk, r_chunk)
    if not STATISTIC_BY_VALUE:
        mean, rstd = statistics(p_mean, p_var, u // units, in_unit, eps_bits)
        high, low = two_floats(mean, ACC)
        high, low, rstd = high[:, None], low[:, None], rstd.to(ACC)[:, None]
    s1 = tl.zeros((BU, BK), ACC)
    s2 = tl.zeros((BU, BK), ACC)
    for r in range(r0, r1):
        for start in range(k0, k1, BK):
            k = start + tl.arange(0, BK)
            offsets = (base + r * run_stride)[:, None] + value_offsets(k, C, COLUMNS)[None, :]
            mask = in_unit[:, None] & (k < k1)[None, :]
            if STATISTIC_BY_VALUE:
                k_mean, k_rstd = statistics(p_mean, p_var, k, k < k1, eps_bits)
                k_high, k_low = two_floats(k_mean, ACC)
                high, low = k_high[None, :], k_low[None, :]
                rstd = k_rstd.to(ACC)[None, :]
            g = tl.load(p_grad + offsets, mask=mask, other=0).to(ACC)
            x = tl.load(p_x + offsets, mask=mask, other=0).to(ACC)
            if WEIGHTED:
                g *= optional(p_weight, k, k < k1, True, 1.0, ACC)[None, :]
            s1 += g
            s2 += tl.where(mask, g * (((x - high) - low) * rstd), 0.0)
    tl.store(o_gx + u * chunks + chunk, tl.sum(s2, 1), mask=in_unit)
    tl.store(o_g + u * chunks + chunk, tl.sum(s1, 1), mask=in_unit)


@triton.jit(do_not_specialize=["Q", "C", "n", "parts", "chunks", "q_step", "i_step"])
def merge_sums(
    p_gx, p_g, p_weight, o_slope, o_shift, o_weight, o_bias,
    Q, C, n, parts, chunks, q_step, i_step,
    STATISTICS: tl.constexpr, PARAMETERS: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    BQ: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """Parts of sums added in their order, in float64: of statistics, of parameters, or of both.

    Part p of result q is chunk p % chunks of unit q · q_step + p // chunks · i_step.
    """
    q = tl.program_id(0).to(tl.int64) * BQ + tl.arange(0, BQ)
    in_q = q < Q
    gx = tl.zeros((BQ, BP), tl.float64)
    g = tl.zeros((BQ, BP), tl.float64)
    wgx = tl.zeros((BQ, BP), tl.float64)
    wg = tl.zeros((BQ, BP), tl.float64)
    for start in range(0, parts, BP):
        p = start + tl.arange(0, BP)
        mask = in_q[:, None] & (p < parts)[None, :]
        unit = q[:, None] * q_step + (p // chunks)[None, :] * i_step
        at = unit * chunks + (p % chunks)[None, :]
        part_gx = tl.load(p_gx + at, mask=mask, other=0).to(tl.float64)
        part_g = tl.load(p_g + at, mask=mask, other=0).to(tl.float64)
        gx += part_gx
        g += part_g
        if STATISTICS:
            weight = optional(p_weight, unit % C, mask, HAS_WEIGHT, 1.0, tl.float64)
            wgx += weight * part_gx
            wg += weight * part_g
    if STATISTICS:
        wide = tl.full((), n, tl.float64)
        slope, shift = tl.sum(wgx, 1) / wide, tl.sum(wg, 1) / wide
        tl.store(o_slope + q, slope.to(o_slope.dtype.element_ty), mask=in_q)
        tl.store(o_shift + q, shift.to(o_shift.dtype.element_ty), mask=in_q)
    if PARAMETERS:
        tl.store(o_weight + q, narrow(tl.sum(gx, 1), o_weight.dtype.element_ty), mask=in_q)
        tl.store(o_bias + q, narrow(tl.sum(g, 1), o_bias.dtype.element_ty), mask=in_q)


@triton.jit(
    do_not_specialize=[
        "U", "R", "units", "unit_blocks", "chunks", "k_chunks", "r_chunk", "eps_bits",
    ]
)  # fmt: skip
def backward_apply(
    p_grad, p_x, p_mean, p_var, p_weight, p_slope, p_shift, o_grad,
    U, C, K, R, run_stride, units, unit_blocks, chunks, k_chunks, k_chunk, r_chunk, eps_bits,
    BU: tl.constexpr, BK: tl.constexpr,
    COLUMNS: tl.constexpr, CHUNKS_FIRST: tl.constexpr,
    BY_VALUE: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    CENTRED: tl.constexpr, FIXED: tl.constexpr, ACC: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """grad_x from the sums of its statistic, one for every `units` units."""
    block, chunk = split_program(unit_blocks, chunks, CHUNKS_FIRST, True)
    u, in_unit, c, base = tile_units(block, U, C, K, BU, BU, COLUMNS, False, INDEX)
    r0, r1, k0, k1 = chunk_bounds(chunk.to(INDEX), K, R, k_chunks, k_chunk, r_chunk)
    mean, rstd = statistics(p_mean, p_var, u // units, in_unit, eps_bits)
    high, low = two_floats(mean, ACC)
    high, low, rstd = high[:, None], low[:, None], rstd.to(ACC)[:, None]
    if not FIXED:
        slope = tl.load(p_slope + u // units, mask=in_unit, other=0)[:, None]
        if CENTRED:
            shift = tl.load(p_shift + u // units, mask=in_unit, other=0)[:, None]
    if not BY_VALUE:
        weight = optional(p_weight, c, in_unit, HAS_WEIGHT, 1.0, ACC)[:, None]
    for r in range(r0, r1):
        for start in range(k0, k1, BK):
            k = start + tl.arange(0, BK)
            offsets = (base + r * run_stride)[:, None] + value_offsets(k, C, COLUMNS)[None, :]
            mask = in_unit[:, None] & (k < k1)[None, :]
            if BY_VALUE:
                weight = optional(p_weight, k, k < k1, HAS_WEIGHT, 1.0, ACC)[None, :]
            wg = tl.load(p_grad + offsets, mask=mask, other=0).to(ACC) * weight
            if not FIXED:
                x = tl.load(p_x + offsets, mask=mask, other=0).to(ACC)
                if CENTRED:
                    wg -= shift
                wg -= ((x - high) - low) * rstd * slope
            y = wg * rstd
            tl.store(o_grad + offsets, narrow(y, o_grad.dtype.element_ty), mask=mask)
