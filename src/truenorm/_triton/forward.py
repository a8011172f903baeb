"""The forward kernels: a statistic and its values at once where they fit on chip, else in passes.

y = act((x − mean) / std · weight + bias + residual), padding where a mask says so; or the same of
a sum, which is rounded first
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import twice
from .moments import at_least_one, tile_moments
from .tiles import (
    affine_tile,
    chunk_bounds,
    finish_tile,
    load_tile,
    narrow,
    next_tile,
    one_over_std,
    optional,
    parameters_of_units,
    parameters_of_values,
    per_statistic,
    placed,
    split_program,
    statistic_of,
    statistics,
    tile_offsets,
    tile_units,
    two_floats,
    valid_tile,
    value_offsets,
)


@triton.jit
def _forward(
    block, at, k, inside, in_value, weight, bias,
    p_x, p_other, p_weight, p_bias, p_mask, p_residual, o_h, o_y, o_record,
    U, C, K, R, run_stride, units, part, inner, innermost, step_0, step_1, step_2,
    n, S, eps_bits, parameter_bits, padding_bits,
    BU: tl.constexpr, COLUMNS: tl.constexpr, GROUPED: tl.constexpr, PARTED: tl.constexpr,
    BY_VALUE: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    CENTRED: tl.constexpr, MASK: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ACT: tl.constexpr,
    ROUNDS: tl.constexpr, PLACED: tl.constexpr, HAS_OTHER: tl.constexpr,
    NEEDS_Y: tl.constexpr, KEEP: tl.constexpr, WIDE: tl.constexpr, TWICE: tl.constexpr,
    TURNS: tl.constexpr, ACC: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """A tile of forward(). weight, bias: the rows' own, where a program takes turns."""
    TYPE: tl.constexpr = p_x.dtype.element_ty
    u, in_unit, c, sample, begin = tile_units(
        block, U, C, K, R, run_stride, units, part, BU, COLUMNS, GROUPED, PARTED, INDEX
    )  # fmt: skip
    offsets = tile_offsets(begin, inside, 2 if COLUMNS and TYPE.primitive_bitwidth == 16 else 0)
    x_offsets, offsets = placed(
        offsets, u, k, K, inner, innermost, step_0, step_1, step_2, PLACED
    )  # fmt: skip
    there, valid = valid_tile(p_mask, u, in_unit, sample, at, in_value, K, MASK, COLUMNS)
    x = load_tile(p_x, x_offsets, there, valid, MASK, ACC)
    if HAS_OTHER:
        other = tl.load(p_other + offsets, mask=there, other=0).to(ACC)
        h = narrow(x + other, TYPE)
        tl.store(o_h + offsets, h, mask=there)
        x = h.to(ACC)
    if MASK:
        count = per_statistic(valid.to(tl.int32), GROUPED)
        values = at_least_one(count).to(ACC)
    else:
        values = tl.full((), n, ACC)
    mean, var, d = tile_moments(x, valid, values, CENTRED, GROUPED, WIDE, ACC)
    if KEEP:
        if GROUPED:
            statistic, writes = u // units, in_unit & (u % units == 0)
        else:
            statistic, writes = u, in_unit
        tl.store(o_record + statistic, mean, mask=writes)
        tl.store(o_record + S + statistic, var, mask=writes)
        if MASK:
            wide = count.to(tl.float64)
        else:
            wide = tl.zeros_like(mean) + n
        tl.store(o_record + 2 * S + statistic, wide, mask=writes)
    if NEEDS_Y:
        rstd = one_over_std(var, eps_bits)
        if BY_VALUE:
            if not TURNS:
                place = parameters_of_values(at, sample, K, PARTED)
                weight = optional(p_weight, place, in_value, HAS_WEIGHT, 1.0, ACC)[None, :]
                bias = optional(p_bias, place, in_value, HAS_BIAS, 0.0, ACC)[None, :]
            if TWICE:
                y = twice.rows(
                    x, mean, rstd, weight, bias, p_residual, offsets, there, HAS_RESIDUAL, True,
                    TYPE,
                )  # fmt: skip
            else:
                y = affine_tile(d * rstd.to(ACC)[:, None], weight, bias, TYPE, ROUNDS)
        else:
            place = parameters_of_units(c, sample, C, part, PARTED)
            of_weight = optional(p_weight, place, in_unit, HAS_WEIGHT, 1.0, tl.float64)
            if TWICE:
                of_bias = optional(p_bias, place, in_unit, HAS_BIAS, 0.0, tl.float64)
                y = twice.units(
                    x, mean, rstd, of_weight, of_bias, p_residual, offsets, there, HAS_RESIDUAL,
                    True, TYPE,
                )  # fmt: skip
            else:
                of_bias = optional(p_bias, place, in_unit, HAS_BIAS, 0.0, ACC)
                y = d * (rstd * of_weight).to(ACC)[:, None] + of_bias[:, None]
        finish_tile(
            y, p_residual, o_y, offsets, there, valid, parameter_bits, padding_bits,
            MASK, HAS_RESIDUAL and not TWICE, ACT, ROUNDS,
        )  # fmt: skip


@triton.jit(
    do_not_specialize=[
        "U", "R", "part", "inner", "innermost", "step_0", "step_1", "step_2", "n", "blocks", "S",
        "eps_bits", "parameter_bits", "padding_bits",
    ]
)  # fmt: skip
def forward(
    p_x, p_other, p_weight, p_bias, p_mask, p_residual, o_h, o_y, o_record,
    U, C, K, R, run_stride, units, part, inner, innermost, step_0, step_1, step_2,
    n, blocks, S, eps_bits, parameter_bits, padding_bits,
    BU: tl.constexpr, BK: tl.constexpr,
    COLUMNS: tl.constexpr, RUNS: tl.constexpr, GROUPED: tl.constexpr, PARTED: tl.constexpr,
    BY_VALUE: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    CENTRED: tl.constexpr, MASK: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ACT: tl.constexpr,
    ROUNDS: tl.constexpr, PLACED: tl.constexpr, HAS_OTHER: tl.constexpr,
    NEEDS_Y: tl.constexpr, KEEP: tl.constexpr, WIDE: tl.constexpr, TWICE: tl.constexpr,
    TURNS: tl.constexpr, STAGES: tl.constexpr, ACC: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """y and the record, x read once: a tile holds every value of its statistics.

    S: how many statistics there are. TURNS: programs go turn by turn between the `blocks` tiles,
    what comes next being on its way by then. HAS_OTHER: of h = x + other, which is stored too.
    PLACED: how x lies, where that is not as all else does.
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
    if TURNS:
        weight = optional(p_weight, at, in_value, HAS_WEIGHT, 1.0, ACC)[None, :]
        bias = optional(p_bias, at, in_value, HAS_BIAS, 0.0, ACC)[None, :]
        for block in tl.range(tl.program_id(0), blocks, tl.num_programs(0), num_stages=STAGES):
            _forward(
                block, at, k, inside, in_value, weight, bias,
                p_x, p_other, p_weight, p_bias, p_mask, p_residual, o_h, o_y, o_record,
                U, C, K, R, run_stride, units, part, inner, innermost, step_0, step_1, step_2,
                n, S, eps_bits, parameter_bits, padding_bits,
                BU, COLUMNS, GROUPED, PARTED, BY_VALUE, HAS_WEIGHT, HAS_BIAS, CENTRED, MASK,
                HAS_RESIDUAL, ACT, ROUNDS, PLACED, HAS_OTHER, NEEDS_Y, KEEP, WIDE, TWICE, TURNS,
                ACC, INDEX,
            )  # fmt: skip
    else:
        _forward(
            tl.program_id(0), at, k, inside, in_value, None, None,
            p_x, p_other, p_weight, p_bias, p_mask, p_residual, o_h, o_y, o_record,
            U, C, K, R, run_stride, units, part, inner, innermost, step_0, step_1, step_2,
            n, S, eps_bits, parameter_bits, padding_bits,
            BU, COLUMNS, GROUPED, PARTED, BY_VALUE, HAS_WEIGHT, HAS_BIAS, CENTRED, MASK,
            HAS_RESIDUAL, ACT, ROUNDS, PLACED, HAS_OTHER, NEEDS_Y, KEEP, WIDE, TWICE, TURNS,
            ACC, INDEX,
        )  # fmt: skip


@triton.jit(
    do_not_specialize=[
        "U", "R", "units", "part", "unit_blocks", "chunks", "k_chunks", "r_chunk", "var_at", "n",
        "S", "eps_bits", "parameter_bits", "padding_bits",
    ]
)  # fmt: skip
def normalize(
    p_x, p_mean, p_var, p_weight, p_bias, p_mask, p_residual, o_y, o_record,
    U, C, K, R, run_stride, units, part, unit_blocks, chunks, k_chunks, k_chunk, r_chunk,
    var_at, n, S, eps_bits, parameter_bits, padding_bits,
    BU: tl.constexpr, BK: tl.constexpr,
    COLUMNS: tl.constexpr, CHUNKS_FIRST: tl.constexpr, PARTED: tl.constexpr,
    BY_VALUE: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    MASK: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ACT: tl.constexpr,
    ROUNDS: tl.constexpr,
    KEEP: tl.constexpr, TWICE: tl.constexpr, STAGES: tl.constexpr, ACC: tl.constexpr,
    INDEX: tl.constexpr,
):  # fmt: skip
    """y from x and given statistics, one for every `units` units.

    var_at: how far from p_var the variances begin. KEEP: what was given is recorded.
    """
    block, chunk = split_program(unit_blocks, chunks, CHUNKS_FIRST, True)
    u, in_unit, c, sample, base = tile_units(
        block, U, C, K, R, run_stride, BU, part, BU, COLUMNS, False, PARTED, INDEX
    )  # fmt: skip
    statistic = statistic_of(u, units, S, PARTED)
    r0, r1, k0, k1 = chunk_bounds(chunk.to(INDEX), K, R, k_chunks, k_chunk, r_chunk)
    mean, rstd = statistics(p_mean, p_var + var_at, statistic, in_unit, eps_bits)
    if KEEP:
        writes = in_unit & (chunk + u % units == 0)
        if PARTED:
            # a channel's, by the first part alone
            writes &= u // units < S
        var = tl.load(p_var + var_at + statistic, mask=writes, other=0).to(tl.float64)
        tl.store(o_record + statistic, mean, mask=writes)
        tl.store(o_record + S + statistic, var, mask=writes)
        # under a mask that is for who launches this
        if not MASK:
            tl.store(o_record + 2 * S + statistic, tl.zeros_like(mean) + n, mask=writes)
    TYPE: tl.constexpr = o_y.dtype.element_ty
    high, low = two_floats(mean, ACC)
    if BY_VALUE:
        scale = rstd.to(ACC)
        shift = tl.zeros((BU,), ACC)
    else:
        place = parameters_of_units(c, sample, C, part, PARTED)
        weight = optional(p_weight, place, in_unit, HAS_WEIGHT, 1.0, tl.float64)
        scale = (rstd * weight).to(ACC)
        shift = optional(p_bias, place, in_unit, HAS_BIAS, 0.0, ACC)
        if TWICE:
            of_bias = optional(p_bias, place, in_unit, HAS_BIAS, 0.0, tl.float64)
    r, start, steps = r0, k0, (r1 - r0) * ((k1 - k0 + BK - 1) // BK)
    for _ in tl.range(0, steps, num_stages=STAGES):
        k = start + tl.arange(0, BK)
        offsets = (base + r * run_stride)[:, None] + value_offsets(k, C, COLUMNS)[None, :]
        there, valid = valid_tile(
            p_mask, u, in_unit, sample, r * K + k, k < k1, K * R, MASK, COLUMNS
        )  # fmt: skip
        x = tl.load(p_x + offsets, mask=there, other=0).to(ACC)
        if BY_VALUE:
            place = parameters_of_values(k, sample, K, PARTED)
            weight = optional(p_weight, place, k < k1, HAS_WEIGHT, 1.0, ACC)[None, :]
            bias = optional(p_bias, place, k < k1, HAS_BIAS, 0.0, ACC)[None, :]
            if TWICE:
                y = twice.rows(
                    x, mean, rstd, weight, bias, p_residual, offsets, there, HAS_RESIDUAL, False,
                    TYPE,
                )  # fmt: skip
            else:
                x_hat = ((x - high[:, None]) - low[:, None]) * scale[:, None]
                y = affine_tile(x_hat, weight, bias, TYPE, ROUNDS)
        elif TWICE:
            y = twice.units(
                x, mean, rstd, weight, of_bias, p_residual, offsets, there, HAS_RESIDUAL,
                False, TYPE,
            )  # fmt: skip
        else:
            y = ((x - high[:, None]) - low[:, None]) * scale[:, None] + shift[:, None]
        finish_tile(
            y, p_residual, o_y, offsets, there, valid, parameter_bits, padding_bits,
            MASK, HAS_RESIDUAL and not TWICE, ACT, ROUNDS,
        )  # fmt: skip
        r, start = next_tile(r, start, k0, k1, BK)
