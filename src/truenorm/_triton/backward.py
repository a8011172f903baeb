"""The backward kernels that make grad_x: of whole statistics on chip, or from their sums.

    g = grad · act'(x̂ · weight + bias + residual), which is the residual's gradient
    grad_x = (w·g − mean(w·g) − x̂ · mean(w·g·x̂)) / std        means over a statistic
    grad_weight = Σ g·x̂,  grad_bias = Σ g                     over a parameter's values

1 / std multiplies last: its product with the slope leaves float32's range at scales where each of
them does not.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .moments import at_least_one
from .tiles import (
    OF_ROWS,
    TURNED,
    affine_tile,
    chunk_bounds,
    gradient_tile,
    load_tile,
    narrow,
    next_tile,
    optional,
    parameters_of_units,
    parameters_of_values,
    partly_summed,
    per_statistic,
    placed,
    split_program,
    statistic_of,
    statistics,
    summed,
    tile_offsets,
    tile_units,
    two_floats,
    valid_tile,
    value_offsets,
)


@triton.jit(
    do_not_specialize=[
        "U", "R", "part", "inner", "innermost", "step_0", "step_1", "step_2", "n", "blocks", "S",
        "eps_bits", "parameter_bits",
    ]
)  # fmt: skip
def backward(
    p_grad, p_grad_h, p_x, p_record, p_weight, p_bias, p_mask, p_residual,
    o_grad, o_residual, o_weight, o_bias,
    U, C, K, R, run_stride, units, part, inner, innermost, step_0, step_1, step_2,
    n, blocks, S, eps_bits, parameter_bits,
    BU: tl.constexpr, BK: tl.constexpr,
    COLUMNS: tl.constexpr, RUNS: tl.constexpr, GROUPED: tl.constexpr, PARTED: tl.constexpr,
    BY_VALUE: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    CENTRED: tl.constexpr, FIXED: tl.constexpr, NEEDS_X: tl.constexpr,
    NEEDS_PARAMETERS: tl.constexpr, NEEDS_RESIDUAL: tl.constexpr, HAS_GRAD_H: tl.constexpr,
    MASK: tl.constexpr, HAS_RESIDUAL: tl.constexpr, BY_OUTPUT: tl.constexpr, ACT: tl.constexpr,
    ROUNDS: tl.constexpr, PLACED: tl.constexpr, STAGES: tl.constexpr, ROWS: tl.constexpr,
    ACC: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """grad_x, x and grad read once; sums for the parameters.

    One sum per unit, or, where parameters go by value, one row of sums per program. S: how many
    statistics there are. blocks: of tiles, or of those of one part, between which programs go turn
    by turn. HAS_GRAD_H: x is a sum, which has a gradient of its own beside the norm's.
    """
    HALF: tl.constexpr = p_x.dtype.element_ty.primitive_bitwidth == 16
    NEIGHBOURS: tl.constexpr = 4 if COLUMNS and PLACED != TURNED and HALF else 0
    at = tl.arange(0, BK)
    if RUNS:
        k, r = (at % K).to(INDEX), (at // K).to(INDEX)
        in_value = at < K * R
        inside = value_offsets(k, C, COLUMNS) + r * run_stride
    else:
        k = at.to(INDEX)
        in_value = at < K
        inside = value_offsets(k, C, COLUMNS)
    first, step = tl.program_id(0), tl.num_programs(0)
    before, place = 0, at
    if PARTED == OF_ROWS:
        parts = U // part
        before, place = first % parts * blocks, parameters_of_values(at, first % parts, K, PARTED)
        first, step = first // parts, step // parts
    if BY_VALUE:
        weight = optional(p_weight, place, in_value, HAS_WEIGHT, 1.0, ACC)[None, :]
        bias = optional(p_bias, place, in_value, HAS_BIAS, 0.0, ACC)[None, :]
        of_weight = tl.zeros((ROWS, BK), ACC)
        of_bias = tl.zeros((ROWS, BK), ACC)
    for block in tl.range(first, blocks, step, num_stages=STAGES):
        u, in_unit, c, sample, begin = tile_units(
            before + block, U, C, K, R, run_stride, units, part, BU, COLUMNS, GROUPED, PARTED, INDEX
        )  # fmt: skip
        offsets = tile_offsets(begin, inside, NEIGHBOURS)
        x_offsets, offsets = placed(
            offsets, u, k, K, inner, innermost, step_0, step_1, step_2, PLACED
        )  # fmt: skip
        there, valid = valid_tile(p_mask, u, in_unit, sample, at, in_value, K, MASK, COLUMNS)
        if GROUPED:
            statistic = u // units
        else:
            statistic = u
        mean, rstd = statistics(p_record, p_record + S, statistic, in_unit, eps_bits)
        high, low = two_floats(mean, ACC)
        rstd = rstd.to(ACC)
        x = load_tile(p_x, x_offsets, there, valid, MASK, ACC)
        x_hat = tl.where(valid, ((x - high[:, None]) - low[:, None]) * rstd[:, None], 0.0)
        if not BY_VALUE:
            of_unit = parameters_of_units(c, sample, C, part, PARTED)
            weight = optional(p_weight, of_unit, in_unit, HAS_WEIGHT, 1.0, ACC)[:, None]
            bias = optional(p_bias, of_unit, in_unit, HAS_BIAS, 0.0, ACC)[:, None]
        z = affine_tile(x_hat, weight, bias, p_x.dtype.element_ty, ROUNDS)
        g = gradient_tile(
            z, p_grad, p_residual, offsets, there, valid, parameter_bits,
            MASK, HAS_RESIDUAL, BY_OUTPUT, ACT, ROUNDS, ACC,
        )  # fmt: skip
        if NEEDS_RESIDUAL:
            tl.store(o_residual + offsets, narrow(g, o_residual.dtype.element_ty), mask=there)
        if BY_VALUE:
            if NEEDS_PARAMETERS:
                of_weight += partly_summed(g * x_hat, 0, ROWS)
                of_bias += partly_summed(g, 0, ROWS)
        elif NEEDS_PARAMETERS:
            sums = summed(g * x_hat, 1)
            tl.store(o_weight + u, narrow(sums, o_weight.dtype.element_ty), mask=in_unit)
            sums = summed(g, 1)
            tl.store(o_bias + u, narrow(sums, o_bias.dtype.element_ty), mask=in_unit)
        wg = g * weight
        if NEEDS_X:
            if not FIXED:
                if CENTRED and BK == 1 and not GROUPED:
                    # of one value, where a product fused into the difference would leave some
                    wg = tl.zeros_like(g)
                if MASK:
                    count = tl.load(p_record + 2 * S + statistic, mask=in_unit, other=1)
                    values = at_least_one(count).to(ACC)
                else:
                    values = tl.full((), n, ACC)
                slope = per_statistic(wg * x_hat, GROUPED) / values
                if CENTRED:
                    shift = per_statistic(wg, GROUPED) / values
                    wg -= shift[:, None]
                wg -= x_hat * slope[:, None]
            y = wg * rstd[:, None]
            if MASK:
                y = tl.where(valid, y, 0.0)
            if HAS_GRAD_H:
                y += tl.load(p_grad_h + offsets, mask=there, other=0).to(ACC)
            tl.store(o_grad + offsets, narrow(y, o_grad.dtype.element_ty), mask=there)
    if BY_VALUE and NEEDS_PARAMETERS:
        row = tl.program_id(0).to(INDEX) * K
        tl.store(o_weight + row + at, tl.sum(of_weight, 0), mask=in_value)
        tl.store(o_bias + row + at, tl.sum(of_bias, 0), mask=in_value)


@triton.jit(
    do_not_specialize=[
        "U", "R", "units", "part", "unit_blocks", "chunks", "k_chunks", "r_chunk", "S", "sums_at",
        "eps_bits", "parameter_bits",
    ]
)  # fmt: skip
def backward_apply(
    p_grad, p_x, p_record, p_sums, p_weight, p_bias, p_mask, p_residual, o_grad, o_residual,
    U, C, K, R, run_stride, units, part, unit_blocks, chunks, k_chunks, k_chunk, r_chunk,
    S, sums_at, eps_bits, parameter_bits,
    BU: tl.constexpr, BK: tl.constexpr,
    COLUMNS: tl.constexpr, CHUNKS_FIRST: tl.constexpr, PARTED: tl.constexpr,
    BY_VALUE: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    CENTRED: tl.constexpr, FIXED: tl.constexpr, NEEDS_X: tl.constexpr,
    NEEDS_RESIDUAL: tl.constexpr, MASK: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    BY_OUTPUT: tl.constexpr, ACT: tl.constexpr, ROUNDS: tl.constexpr,
    STAGES: tl.constexpr, ACC: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """grad_x from the mean gradients of its statistic, one for every `units` units.

    p_sums: those of w·g·x̂, and sums_at further those of w·g.
    """
    block, chunk = split_program(unit_blocks, chunks, CHUNKS_FIRST, True)
    u, in_unit, c, sample, base = tile_units(
        block, U, C, K, R, run_stride, BU, part, BU, COLUMNS, False, PARTED, INDEX
    )  # fmt: skip
    r0, r1, k0, k1 = chunk_bounds(chunk.to(INDEX), K, R, k_chunks, k_chunk, r_chunk)
    statistic = statistic_of(u, units, S, PARTED)
    mean, rstd = statistics(p_record, p_record + S, statistic, in_unit, eps_bits)
    high, low = two_floats(mean, ACC)
    high, low, rstd = high[:, None], low[:, None], rstd.to(ACC)[:, None]
    if NEEDS_X and not FIXED:
        slope = tl.load(p_sums + statistic, mask=in_unit, other=0).to(ACC)[:, None]
        if CENTRED:
            shift = tl.load(p_sums + sums_at + statistic, mask=in_unit, other=0)
            shift = shift.to(ACC)[:, None]
    if not BY_VALUE:
        place = parameters_of_units(c, sample, C, part, PARTED)
        weight = optional(p_weight, place, in_unit, HAS_WEIGHT, 1.0, ACC)[:, None]
        bias = optional(p_bias, place, in_unit, HAS_BIAS, 0.0, ACC)[:, None]
    r, start, steps = r0, k0, (r1 - r0) * ((k1 - k0 + BK - 1) // BK)
    for _ in tl.range(0, steps, num_stages=STAGES):
        k = start + tl.arange(0, BK)
        offsets = (base + r * run_stride)[:, None] + value_offsets(k, C, COLUMNS)[None, :]
        there, valid = valid_tile(
            p_mask, u, in_unit, sample, r * K + k, k < k1, K * R, MASK, COLUMNS
        )  # fmt: skip
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
        if NEEDS_RESIDUAL:
            tl.store(o_residual + offsets, narrow(g, o_residual.dtype.element_ty), mask=there)
        if NEEDS_X:
            wg = g * weight
            if not FIXED:
                if CENTRED:
                    wg -= shift
                wg -= x_hat * slope
            y = wg * rstd
            if MASK:
                y = tl.where(valid, y, 0.0)
            tl.store(o_grad + offsets, narrow(y, o_grad.dtype.element_ty), mask=there)
        r, start = next_tile(r, start, k0, k1, BK)
