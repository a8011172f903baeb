"""RMSNorm beside a gate, forward and backward, the groups of a row on chip: x and gate read once.

    y = norm(x · act(gate)) · weight, or norm(x) · weight · act(gate)      act: g · σ(g), or σ(g)
    grad_x, grad_gate: as backward.py has them, through the product with act(gate)
    grad_weight = Σ g·x̂      over the rows; g: what comes for x̂ · weight

Rows (N, C) are cut into groups of K values, and a tile holds one group of some rows.
"""

# what Triton compiles has no Python types
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

from .activation import exp, reciprocal
from .moments import tile_moments
from .tiles import narrow, one_over_std, optional, partly_summed, rounded, summed


@triton.jit
def _opened(gate, SWISH: tl.constexpr, TYPE: tl.constexpr):
    """(act(gate), act'(gate)), to be rounded to TYPE."""
    # of −|gate|, where nothing overflows
    e = exp(tl.where(gate < 0, gate, -gate))
    if TYPE.primitive_bitwidth == 16:
        near = 1.0 / (1.0 + e)
    else:
        near = reciprocal(1.0 + e)
    far = e * near
    sigma, slope = tl.where(gate < 0, far, near), near * far
    if SWISH:
        return gate * sigma, sigma + gate * slope
    return sigma, slope


@triton.jit
def _at(row, first, at, C, step, INDEX: tl.constexpr):
    """Offsets of a tile; step: how far apart rows are, None where these follow one another. Steps
    are in sixteen values, as in row_starts.
    """
    if step is None:
        begin = row.to(INDEX) * C
    else:
        begin = row.to(INDEX) * step * 16
    return (begin + first)[:, None] + at[None, :]


@triton.jit(do_not_specialize=["N", "S", "x_step", "gate_step", "eps_bits"])
def gated(
    p_x, p_gate, p_weight, o_y, o_record,
    N, G, K, S, x_step, gate_step, eps_bits,
    BU: tl.constexpr, BK: tl.constexpr, BEFORE: tl.constexpr, SWISH: tl.constexpr,
    ROUNDS_X_HAT: tl.constexpr, ROUNDS_PRODUCT: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    KEEP: tl.constexpr, ACC: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """y, and the record. S: how many statistics there are, one for each of a row's G groups."""
    group, block = tl.program_id(0) % G, tl.program_id(0) // G
    row, at = block * BU + tl.arange(0, BU), tl.arange(0, BK)
    in_row, in_value = row < N, at < K
    there = in_row[:, None] & in_value[None, :]
    first, C = group * K, G * K
    x = tl.load(p_x + _at(row, first, at, C, x_step, INDEX), mask=there, other=0).to(ACC)
    gate = tl.load(p_gate + _at(row, first, at, C, gate_step, INDEX), mask=there, other=0)
    act, _ = _opened(gate.to(ACC), SWISH, p_gate.dtype.element_ty)
    if BEFORE:
        x *= act
    mean, var, h = tile_moments(x, there, tl.full((), K, ACC), False, False, False, ACC)
    if KEEP:
        statistic = row.to(INDEX) * G + group
        tl.store(o_record + statistic, mean, mask=in_row)
        tl.store(o_record + S + statistic, var, mask=in_row)
        tl.store(o_record + 2 * S + statistic, tl.zeros_like(mean) + K, mask=in_row)
    rstd = one_over_std(var, eps_bits)
    weight = optional(p_weight, first + at, in_value, HAS_WEIGHT, 1.0, ACC)
    TYPE: tl.constexpr = o_y.dtype.element_ty
    y = rounded(h * rstd.to(ACC)[:, None], TYPE, ROUNDS_X_HAT) * weight[None, :]
    y = rounded(y, TYPE, ROUNDS_PRODUCT)
    if not BEFORE:
        y *= act
    tl.store(o_y + _at(row, first, at, C, None, INDEX), narrow(y, TYPE), mask=there)


@triton.jit(do_not_specialize=["N", "S", "x_step", "gate_step", "eps_bits", "blocks"])
def gated_backward(
    p_grad, p_x, p_gate, p_record, p_weight, o_x, o_gate, o_weight,
    N, G, K, S, x_step, gate_step, eps_bits, blocks,
    BU: tl.constexpr, BK: tl.constexpr, BEFORE: tl.constexpr, SWISH: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, NEEDS_INPUT: tl.constexpr, NEEDS_WEIGHT: tl.constexpr,
    STAGES: tl.constexpr, ROWS: tl.constexpr, ACC: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """Gradients of x and gate, and for weight's a row of sums per program of a group.

    blocks: of rows, between which a group's programs go turn by turn.
    """
    group, program = tl.program_id(0) % G, tl.program_id(0) // G
    at = tl.arange(0, BK)
    in_value = at < K
    first, C = group * K, G * K
    weight = optional(p_weight, first + at, in_value, HAS_WEIGHT, 1.0, ACC)[None, :]
    of_weight = tl.zeros((ROWS, BK), ACC)
    for block in tl.range(program, blocks, tl.num_programs(0) // G, num_stages=STAGES):
        row = block * BU + tl.arange(0, BU)
        in_row = row < N
        there = in_row[:, None] & in_value[None, :]
        # before a tile takes the registers: a root of float64 is a call
        var = tl.load(p_record + S + row.to(INDEX) * G + group, mask=in_row, other=1)
        rstd = one_over_std(var, eps_bits).to(ACC)[:, None]
        gate = tl.load(p_gate + _at(row, first, at, C, gate_step, INDEX), mask=there, other=0)
        offsets = _at(row, first, at, C, None, INDEX)
        grad = tl.load(p_grad + offsets, mask=there, other=0).to(ACC)
        act, slope = _opened(gate.to(ACC), SWISH, p_gate.dtype.element_ty)
        x = tl.load(p_x + _at(row, first, at, C, x_step, INDEX), mask=there, other=0).to(ACC)
        # by: what of_gate is a product with
        if BEFORE:
            x_hat, g, by = x * act * rstd, grad, x * slope
        else:
            x_hat, g, by = x * rstd, grad * act, grad * slope * weight
        if NEEDS_WEIGHT:
            of_weight += partly_summed(g * x_hat, 0, ROWS)
        if NEEDS_INPUT:
            mean = summed(g * weight * x_hat, 1) / tl.full((), K, ACC)
            of_x = (g * weight - x_hat * mean[:, None]) * rstd
            if BEFORE:
                of_gate = of_x * by
                of_x *= act
            else:
                of_gate = x_hat * by
            TYPE: tl.constexpr = o_x.dtype.element_ty
            tl.store(o_x + offsets, narrow(of_x, TYPE), mask=there)
            tl.store(o_gate + offsets, narrow(of_gate, TYPE), mask=there)
    if NEEDS_WEIGHT:
        place = program.to(INDEX) * C + first + at
        tl.store(o_weight + place, tl.sum(of_weight, 0), mask=in_value)
