"""Sums of gradients: over chunks of units, and how these are added up."""

# what Triton compiles has no Python types
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

from .moments import at_least_one
from .tiles import (
    affine_tile,
    chunk_bounds,
    gradient_tile,
    narrow,
    next_tile,
    optional,
    parameters_of_units,
    parameters_of_values,
    partly_summed,
    split_program,
    statistic_of,
    statistics,
    tile_units,
    two_floats,
    valid_tile,
    value_offsets,
)


@triton.jit(
    do_not_specialize=[
        "U", "R", "units", "part", "unit_blocks", "chunks", "k_chunks", "r_chunk", "S", "eps_bits",
        "parameter_bits",
    ]
)  # fmt: skip
def backward_sums(
    p_grad, p_x, p_record, p_weight, p_bias, p_mask, p_residual, o_gx, o_g,
    U, C, K, R, run_stride, units, part, unit_blocks, chunks, k_chunks, k_chunk, r_chunk,
    S, eps_bits, parameter_bits,
    BU: tl.constexpr, BK: tl.constexpr,
    COLUMNS: tl.constexpr, CHUNKS_FIRST: tl.constexpr, PARTED: tl.constexpr,
    STATISTIC_BY_VALUE: tl.constexpr, BY_VALUE: tl.constexpr, WEIGHTED: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, MASK: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, BY_OUTPUT: tl.constexpr, ACT: tl.constexpr,
    ROUNDS: tl.constexpr, STAGES: tl.constexpr, KEPT: tl.constexpr, ACC: tl.constexpr,
    INDEX: tl.constexpr,
):  # fmt: skip
    """Sums of g·x̂ and of g over one chunk of some units.

    The statistic goes by unit, or by value: a feature's sum over the rows of a layer norm. So do
    weight and bias, by which the activation's gradient is made, and where WEIGHTED g is multiplied.
    """
    block, chunk = split_program(unit_blocks, chunks, CHUNKS_FIRST, False)
    u, in_unit, c, sample, base = tile_units(
        block, U, C, K, R, run_stride, BU, part, BU, COLUMNS, False, PARTED, INDEX
    )  # fmt: skip
    r0, r1, k0, k1 = chunk_bounds(chunk.to(INDEX), K, R, k_chunks, k_chunk, r_chunk)
    if not STATISTIC_BY_VALUE:
        statistic = statistic_of(u, units, S, PARTED)
        mean, rstd = statistics(p_record, p_record + S, statistic, in_unit, eps_bits)
        high, low = two_floats(mean, ACC)
        high, low, rstd = high[:, None], low[:, None], rstd.to(ACC)[:, None]
    if not BY_VALUE:
        place = parameters_of_units(c, sample, C, part, PARTED)
        weight = optional(p_weight, place, in_unit, HAS_WEIGHT, 1.0, ACC)[:, None]
        bias = optional(p_bias, place, in_unit, HAS_BIAS, 0.0, ACC)[:, None]
    s1 = tl.zeros((BU, KEPT), ACC)
    s2 = tl.zeros((BU, KEPT), ACC)
    r, start, steps = r0, k0, (r1 - r0) * ((k1 - k0 + BK - 1) // BK)
    for _ in tl.range(0, steps, num_stages=STAGES):
        k = start + tl.arange(0, BK)
        offsets = (base + r * run_stride)[:, None] + value_offsets(k, C, COLUMNS)[None, :]
        there, valid = valid_tile(
            p_mask, u, in_unit, sample, r * K + k, k < k1, K * R, MASK, COLUMNS
        )  # fmt: skip
        if STATISTIC_BY_VALUE:
            row = k
            if not COLUMNS:
                row += r * K
            if PARTED:
                row += sample * K
            k_mean, k_rstd = statistics(p_record, p_record + S, row, k < k1, eps_bits)
            k_high, k_low = two_floats(k_mean, ACC)
            high, low = k_high[None, :], k_low[None, :]
            rstd = k_rstd.to(ACC)[None, :]
        if BY_VALUE:
            place = parameters_of_values(k, sample, K, PARTED)
            weight = optional(p_weight, place, k < k1, HAS_WEIGHT, 1.0, ACC)[None, :]
            bias = optional(p_bias, place, k < k1, HAS_BIAS, 0.0, ACC)[None, :]
        x_hat = tl.load(p_x + offsets, mask=there, other=0).to(ACC)
        x_hat = ((x_hat - high) - low) * rstd
        z = affine_tile(x_hat, weight, bias, p_x.dtype.element_ty, ROUNDS)
        g = gradient_tile(
            z, p_grad, p_residual, offsets, there, valid, parameter_bits,
            MASK, HAS_RESIDUAL, BY_OUTPUT, ACT, ROUNDS, ACC,
        )  # fmt: skip
        if WEIGHTED:
            g *= weight
        s1 += partly_summed(g, 1, KEPT)
        s2 += partly_summed(tl.where(valid, g * x_hat, 0.0), 1, KEPT)
        r, start = next_tile(r, start, k0, k1, BK)
    tl.store(o_gx + u * chunks + chunk, tl.sum(s2, 1), mask=in_unit)
    tl.store(o_g + u * chunks + chunk, tl.sum(s1, 1), mask=in_unit)


@triton.jit(
    do_not_specialize=[
        "Q", "C", "n", "S", "sums_at", "bias_at", "parts", "chunks", "q_step", "i_step", "part",
        "part_step",
    ]
)  # fmt: skip
def merge_sums(
    p_gx, p_g, p_weight, p_record, o_sums, o_weight, o_bias,
    Q, C, n, S, sums_at, bias_at, parts, chunks, q_step, i_step, part, part_step,
    STATISTICS: tl.constexpr, PARAMETERS: tl.constexpr, PARTED: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, HAS_MASK: tl.constexpr, BQ: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """Parts of sums added in their order, in float64: of statistics, of parameters, or of both.

    Part p of result q is chunk p % chunks of unit q · q_step + p // chunks · i_step; where every
    `part` samples have parameters of their own, of that one part_step further for each of these.
    Those of statistics are divided by how many values these span, and stored sums_at apart.
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
        if PARTED:
            unit += (q // C * part_step)[:, None]
        at = unit * chunks + (p % chunks)[None, :]
        part_gx = tl.load(p_gx + at, mask=mask, other=0).to(tl.float64)
        part_g = tl.load(p_g + at, mask=mask, other=0).to(tl.float64)
        gx += part_gx
        g += part_g
        if STATISTICS:
            place = unit % C
            if PARTED:
                place += unit // C // part * C
            weight = optional(p_weight, place, mask, HAS_WEIGHT, 1.0, tl.float64)
            wgx += weight * part_gx
            wg += weight * part_g
    if STATISTICS:
        if HAS_MASK:
            wide = at_least_one(tl.load(p_record + 2 * S + q, mask=in_q, other=1))
        else:
            wide = tl.full((), n, tl.float64)
        slope, shift = tl.sum(wgx, 1) / wide, tl.sum(wg, 1) / wide
        tl.store(o_sums + q, slope.to(o_sums.dtype.element_ty), mask=in_q)
        tl.store(o_sums + sums_at + q, shift.to(o_sums.dtype.element_ty), mask=in_q)
    if PARAMETERS:
        tl.store(o_weight + q, narrow(tl.sum(gx, 1), o_weight.dtype.element_ty), mask=in_q)
        tl.store(o_bias + bias_at + q, narrow(tl.sum(g, 1), o_bias.dtype.element_ty), mask=in_q)
