"""The forward operators on CUDA tensors: whole statistics at once, or moments, then y."""

from __future__ import annotations

import torch
from torch import Tensor

from . import config, moments, view
from . import forward as kernels
from .inputs import Inputs
from .replay import launch
from .view import Streamed, Units


def _moments(call: Inputs) -> Tensor:
    """The record in two launches."""
    x, units, centred = call.x, call.units_of_statistics, call.form.axes.centred
    acc, width = view.compute(x, wide=centred)
    if units.D > 1 and not units.columns and call.mask is None:
        # a group is one run in memory
        units = Units(units.U // units.D, units.C // units.D, units.K * units.D)
    half = view.is_half(x)
    plan = Streamed(units, width.itemsize, doubles=half and centred)
    parts = units.U * plan.count
    of_mean, of_m2 = view.pair(parts, torch.float64, x.device)
    stages = {"STAGES": config.STAGES_OF_SMALL} if half else {}
    counts = None
    if call.mask is not None:
        counts = torch.empty(parts, dtype=torch.int32, device=x.device)
    launch(
        moments.moments, plan.grid,
        x, call.mask, of_mean, of_m2, counts,
        *plan.sizes, plan.unit_blocks, plan.count, *plan.cuts,
        **plan.constants | stages, CENTRED=centred, MASK=call.mask_kind(units),
        WIDE=half and centred, KEPT=plan.kept(x), ACC=acc, INDEX=view.index(x),
    )  # fmt: skip
    record = call.record()
    per_statistic = units.D * plan.count
    merge = config.merge(per_statistic, neighbours=False)
    launch(
        moments.merge_moments, (-(-units.statistics // merge.units),),
        of_mean, of_m2, counts, record,
        units.statistics, per_statistic, plan.count, units.K, units.R, *plan.cuts,
        CENTRED=centred, HAS_MASK=counts is not None, BQ=merge.units, BP=merge.values,
        **view.launch_options(merge.warps),
    )  # fmt: skip
    return record


def _normalize(
    call: Inputs,
    y: Tensor,
    mean: Tensor,
    var: Tensor,
    record: Tensor | None,
    eps: float,
    padding: int | None,
) -> None:
    """mean and var: one record, or what was given, which goes into `record`."""
    own, x, units = mean is var, call.x, call.units
    acc, width = view.compute(x, wide=not call.half)
    plan = Streamed(units, width.itemsize)
    launch(
        kernels.normalize, plan.grid,
        x, mean, var, call.weight, call.bias, call.mask, call.residual, y, record,
        *plan.sizes, units.D, units.part, plan.unit_blocks, plan.count, *plan.cuts,
        units.statistics if own else 0, units.values, units.statistics, view.bits(eps),
        call.parameter, padding,
        **plan.constants | call.fusion, **call.constants(units), BY_VALUE=units.by_value,
        HAS_WEIGHT=call.has_weight, HAS_BIAS=call.bias is not None,
        HAS_RESIDUAL=call.residual is not None, KEEP=record is not None,
        TWICE=call.twice, ACC=acc, INDEX=view.index(x),
    )  # fmt: skip


def _whole(
    call: Inputs, y: Tensor | None, eps: float, padding: int | None, *, keep: bool,
    other: Tensor | None = None, h: Tensor | None = None,
) -> tuple[bool, Tensor | None]:  # fmt: skip
    """(whether a statistic fits on chip, the record): y and record, or one of them, in a launch.

    other: what is added to x first, into h.
    """
    x, centred = call.x, call.form.axes.centred
    units = call.units_of_statistics if y is None else call.units
    half = call.half
    acc, width = view.compute(x, wide=not half)
    # half precision's sums are float64's
    crowded = call.crowded(backward=False) or (half and centred)
    tile = units.whole(width.itemsize, backward=False, half=half, crowded=crowded)
    if tile is None:
        return False, None
    record = call.record() if keep else None
    grouped = units.D > 1
    per_program = units.D if grouped else tile.units
    blocks = grid = units.blocks(per_program)
    # weights that all rows have are kept over several of them
    turns = units.by_value and not units.part
    if turns:
        grid = config.resident(blocks, tile, view.processors(x.device))
    read = 1 + (call.residual is not None) + (other is not None)
    stages = config.stages(tile, read * x.element_size())
    launch(
        kernels.forward, (grid,),
        x, other, call.weight, call.bias, call.mask, call.residual, h, y, record,
        units.U, units.C, units.K, units.R, units.run_stride, per_program, units.part,
        *call.placed.sizes, *call.placed.steps, units.values, blocks, units.statistics,
        view.bits(eps), call.parameter, padding,
        **units.tiles(tile) | call.fusion, **call.constants(units), RUNS=units.R > 1,
        GROUPED=grouped, BY_VALUE=units.by_value, HAS_WEIGHT=call.has_weight,
        HAS_BIAS=call.bias is not None, CENTRED=centred, HAS_RESIDUAL=call.residual is not None,
        PLACED=call.placed.kind, HAS_OTHER=h is not None, NEEDS_Y=y is not None, KEEP=keep,
        WIDE=centred and half, TWICE=call.twice, TURNS=turns, STAGES=stages, ACC=acc,
        INDEX=view.index(x),
    )  # fmt: skip
    return True, record


def _norm(
    call: Inputs, y: Tensor, mean: Tensor | None, var: Tensor | None, eps: float, padding: float
) -> Tensor:
    """y, and the record where it is wanted."""
    keep = call.form.keep
    filled = None if call.mask is None else view.bits(padding)
    record: Tensor | None
    if mean is not None and var is not None:
        call.in_rows()
        record = call.record() if keep else None
        mean, var = call.statistic(mean.reshape(-1)), call.statistic(var.reshape(-1))
        _normalize(call, y, mean, var, record, eps, filled)
        if record is not None and call.mask is not None:
            record[2] = call.counts
    else:
        # of a batch in parts statistics are one thing, and outputs another
        spans = call.units.spans
        done, record = _whole(call, None if spans else y, eps, filled, keep=keep or spans)
        if not done:
            call.in_rows()
            record = _moments(call)
        if spans or not done:
            assert record is not None
            _normalize(call, y, record, record, None, eps, filled)
    return call.made(record) if keep and record is not None else call.nothing


def norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    residual: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    form: int,
    eps: float,
    parameter: float,
    padding: float,
) -> tuple[Tensor, Tensor]:
    with view.on(x):
        call = Inputs(x, weight, bias, mask, residual, form, parameter)
        y = x.new_empty_strided(x.shape, call.strides)
        record = _norm(call, y, mean, var, eps, padding)
        return call.laid_out(y), record


def norm_(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    residual: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    form: int,
    eps: float,
    parameter: float,
    padding: float,
) -> Tensor:
    with view.on(x):
        call = Inputs(x, weight, bias, mask, residual, form, parameter)
        call.in_rows()
        record = _norm(call, call.x, mean, var, eps, padding)
        if call.x is not x:
            x.copy_(call.x)
    return record


def add_norm(
    x: Tensor, other: Tensor, weight: Tensor | None, bias: Tensor | None, form: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(norm(h), h, the record) of h = x + other."""
    with view.on(x):
        call = Inputs(x, weight, bias, None, None, form)
        keep, other = call.form.keep, view.dense(other, call.strides)
        y, h = (x.new_empty_strided(x.shape, call.strides) for _ in range(2))
        done, record = _whole(call, y, eps, None, keep=keep, other=other, h=h)
        if done:
            record = call.made(record) if record is not None else call.nothing
        else:
            call.x = torch.add(call.x, other, out=h)
            record = _norm(call, y, None, None, eps, 0.0)
        return call.laid_out(y), call.laid_out(h), record


def statistics(x: Tensor, mask: Tensor | None, form: int) -> Tensor:
    with view.on(x):
        call = Inputs(x, None, None, mask, None, form)
        _, record = _whole(call, None, 0.0, None, keep=True)
        if record is None:
            call.in_rows()
            record = _moments(call)
        return call.made(record)
