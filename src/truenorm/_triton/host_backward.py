"""The backward operators on CUDA tensors: whole statistics at once, or sums, merge and apply."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._core.call import NEEDS_BIAS, NEEDS_INPUT, NEEDS_RESIDUAL, NEEDS_WEIGHT
from . import backward as kernels
from . import config, sums, view
from .config import Launch
from .inputs import Inputs
from .replay import launch
from .view import Streamed, Units


def norm_backward(
    grad: Tensor,
    x: Tensor,
    record: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    residual: Tensor | None,
    sums: Tensor | None,
    form: int,
    eps: float,
    parameter: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with view.on(x):
        call = _Backward(grad, x, record, weight, bias, mask, residual, form, eps, parameter)
        return call.run(None if sums is None else call.statistic(sums))


def add_norm_backward(
    grad: Tensor,
    grad_h: Tensor | None,
    x: Tensor,
    record: Tensor,
    weight: Tensor | None,
    form: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a sum x, to which is added what comes for it beside the norm's, and of the
    parameters.
    """
    with view.on(x):
        call = _Backward(grad, x, record, weight, None, None, None, form, eps, 0.0)
        if grad_h is not None:
            call.grad_h = view.dense(grad_h.to(x.dtype), call.strides)
        return call.run(None)[:3]


def gradient_sums(
    grad: Tensor,
    x: Tensor,
    record: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    residual: Tensor | None,
    form: int,
    eps: float,
    parameter: float,
) -> Tensor:
    with view.on(x):
        call = _Backward(grad, x, record, weight, bias, mask, residual, form, eps, parameter)
        return call.by_unit()


class _Backward(Inputs):
    """One call of a backward operator."""

    def __init__(
        self,
        grad: Tensor,
        x: Tensor,
        record: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mask: Tensor | None,
        residual: Tensor | None,
        bits: int,
        eps: float,
        parameter: float,
    ) -> None:
        acts = bits >> 16 & 0xFF
        # without an activation neither is asked for again
        super().__init__(
            x, weight, bias if acts else None, mask, residual if acts else None, bits, parameter
        )
        self.grad = view.dense(grad.to(x.dtype), self.strides)
        self.grad_h: Tensor | None = None
        self.eps, self.of = view.bits(eps), self.statistic(record)
        self.acc, self.kept = view.compute(x)
        needs = self.form.needs
        self.needs_x, self.needs_residual = bool(needs & NEEDS_INPUT), bool(needs & NEEDS_RESIDUAL)
        self.needs_parameters = bool(needs & (NEEDS_WEIGHT | NEEDS_BIAS))

    def run(self, given: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """given: the mean gradients of statistics that span more than x."""
        x, features, needs = self.x, self.form.axes.feature_dims, self.form.needs
        self.grad_x, self.grad_residual = (
            self._like_x(self.needs_x),
            self._like_x(self.needs_residual),
        )
        shape = x.shape[x.dim() - features :] if features else x.shape[1:2]
        wide = torch.promote_types(x.dtype, torch.float32)
        shape, dtype = self.of_weight or (shape, wide)
        sizes = shape if self.needs_parameters else (0,)
        self.grad_weight = torch.empty(sizes, dtype=dtype, device=x.device)
        self.grad_bias = torch.empty(sizes, dtype=dtype, device=x.device)
        crowded = self.crowded(backward=True)
        half = view.is_half(x)
        tile = self.units.whole(self.kept.itemsize, backward=True, half=half, crowded=crowded)
        if tile is not None and given is None:
            self._whole(tile)
        elif self.units.by_value:
            self.in_rows()
            self._features(given)
            if self.grad_h is not None:
                self.grad_x += self.grad_h
        else:
            self._channels(given)
        return (
            # an empty one where it is not wanted
            self.laid_out(self.grad_x) if self.needs_x else self.grad_x,
            self.grad_weight if needs & NEEDS_WEIGHT else self.grad_weight.new_empty(0),
            self.grad_bias if needs & NEEDS_BIAS else self.grad_bias.new_empty(0),
            self.grad_residual,
        )

    def by_unit(self) -> Tensor:
        """Sums of g·x̂ and of g, float64."""
        units = self.units
        plan = Streamed(units, self.kept.itemsize)
        gx, g = self._sums(plan, weighted=False)
        made = torch.empty((2, units.U), dtype=torch.float64, device=self.x.device)
        merge = config.merge(plan.count, neighbours=plan.count == 1)
        launch(
            sums.merge_sums, (-(-units.U // merge.units),),
            gx, g, None, None, None, made, made,
            units.U, units.C, units.values, units.statistics, 0, units.U, plan.count, plan.count,
            1, 0, 0, 0,
            STATISTICS=False, PARAMETERS=True, PARTED=False, HAS_WEIGHT=0, HAS_MASK=False,
            BQ=merge.units, BP=merge.values, **view.launch_options(merge.warps),
        )  # fmt: skip
        return made

    def _like_x(self, wanted: bool) -> Tensor:
        shape, strides = (self.x.shape, self.strides) if wanted else ((0,), (1,))
        return torch.empty_strided(shape, strides, dtype=self.x.dtype, device=self.x.device)

    @property
    def _room(self) -> tuple[Tensor, int]:
        """For two sums of each statistic, and how far apart they are."""
        room = torch.empty((2, self.units.statistics), dtype=self.kept, device=self.x.device)
        return room, self.units.statistics

    def _after(self, units: Units, tiles: dict[str, Any]) -> dict[str, Any]:
        return {
            **tiles,
            **self.constants(units),
            # what the activation took is made again as it was
            "enable_fp_fusion": not self.rounds_sums,
            "HAS_BIAS": self.bias is not None,
            "HAS_RESIDUAL": self.residual is not None,
            "BY_OUTPUT": self.form.by_output and self.residual is not None,
            "ACC": self.acc,
            "INDEX": view.index(self.x),
        }

    def _whole(self, tile: Launch) -> None:
        """Everything in one launch, and the parameters' sums added up in a second."""
        units, grouped = self.units, self.units.D > 1
        per_program = units.D if grouped else tile.units
        blocks = grid = units.blocks(per_program)
        of_weight, of_bias = self.grad_weight, self.grad_bias
        if units.by_value and units.part:
            blocks //= units.parts
            grid = config.programs_of_part(blocks) * units.parts
        elif units.by_value:
            grid = config.programs(blocks, tile.warps, view.processors(self.x.device))
        sums_of = grid // units.parts if units.by_value else units.part or units.samples
        if self.needs_parameters and (units.by_value or sums_of > 1):
            parts = grid * units.K if units.by_value else units.U
            of_weight, of_bias = view.pair(parts, self.kept, self.x.device)
        read = 2 + (self.residual is not None) + (self.grad_h is not None)
        # where channels are inside, addresses take the registers that a pipeline would
        turns = units.by_value and not units.columns
        stages = config.stages(tile, read * self.x.element_size()) if turns else 1
        launch(
            kernels.backward, (grid,),
            self.grad, self.grad_h, self.x, self.of, self.weight, self.bias, self.mask,
            self.residual, self.grad_x, self.grad_residual, of_weight, of_bias,
            units.U, units.C, units.K, units.R, units.run_stride, per_program, units.part,
            *self.placed.sizes, *self.placed.steps, units.values, blocks, units.statistics,
            self.eps, self.parameter,
            **self._after(units, units.tiles(tile)), RUNS=units.R > 1, GROUPED=grouped,
            BY_VALUE=units.by_value, HAS_WEIGHT=self.has_weight,
            CENTRED=self.form.axes.centred, FIXED=self.form.constant, NEEDS_X=self.needs_x,
            NEEDS_PARAMETERS=self.needs_parameters, NEEDS_RESIDUAL=self.needs_residual,
            HAS_GRAD_H=self.grad_h is not None, PLACED=self.placed.kind,
            STAGES=stages, ROWS=config.at_once(tile, self.x.element_size(), columns=False),
        )  # fmt: skip
        if of_weight is not self.grad_weight:
            self._merge(of_weight, of_bias, sums_of, 1, parameters=True)

    def _merge(
        self, gx: Tensor, g: Tensor, parts: int, chunks: int, *, parameters: bool,
        room: tuple[Tensor, int] | None = None,
    ) -> None:  # fmt: skip
        """Sums by unit and chunk into those of parameters (one per channel), of statistics (into
        `room`), or, where a statistic is a channel's, both.
        """
        units, of_statistics = self.units, room is not None
        made, at = room or (None, 0)
        part_step = 0
        if of_statistics:
            results, steps = units.statistics, (1, units.C) if units.spans else (units.D, 1)
        elif units.by_value:
            results, steps = units.parts * units.K, (1, units.parts * units.K)
        else:
            results, steps = units.parts * units.C, (1, units.C)
            part_step = max(units.part - 1, 0) * units.C
        merge = config.merge(parts, neighbours=chunks == 1 and not of_statistics)
        weighted = self.has_weight if of_statistics and not units.by_value else 0
        launch(
            sums.merge_sums, (-(-results // merge.units),),
            gx, g, self.weight, self.of, made, self.grad_weight, self.grad_bias,
            results, units.C, units.values, units.statistics, at, 0, parts, chunks, *steps,
            units.part, part_step,
            STATISTICS=of_statistics, PARAMETERS=parameters,
            PARTED=units.part > 0 and not units.by_value, HAS_WEIGHT=weighted,
            HAS_MASK=of_statistics and self.mask is not None, BQ=merge.units, BP=merge.values,
            **view.launch_options(merge.warps),
        )  # fmt: skip

    def _sums(
        self, plan: Streamed, *, weighted: bool, across: bool = False
    ) -> tuple[Tensor, Tensor]:
        """across: a feature's over the rows."""
        gx, g = view.pair(plan.units.U * plan.count, self.kept, self.x.device)
        # x̂ · weight + bias is what the activation took
        has_weight = self.has_weight if weighted or self.form.act > 0 else 0
        launch(
            sums.backward_sums, plan.grid,
            self.grad, self.x, self.of, self.weight, self.bias, self.mask, self.residual, gx, g,
            *plan.sizes, plan.units.D, plan.units.part, plan.unit_blocks, plan.count, *plan.cuts,
            self.units.statistics, self.eps, self.parameter,
            **self._after(plan.units, plan.constants), STATISTIC_BY_VALUE=across,
            BY_VALUE=plan.units.by_value, WEIGHTED=weighted, HAS_WEIGHT=has_weight,
            KEPT=plan.kept(self.x),
        )  # fmt: skip
        return gx, g

    def _apply(self, plan: Streamed, room: tuple[Tensor, int] | None) -> None:
        made, at = room or (None, 0)
        launch(
            kernels.backward_apply, plan.grid,
            self.grad, self.x, self.of, made, self.weight, self.bias, self.mask, self.residual,
            self.grad_x, self.grad_residual,
            *plan.sizes, plan.units.D, plan.units.part, plan.unit_blocks, plan.count, *plan.cuts,
            self.units.statistics, at, self.eps, self.parameter,
            **self._after(plan.units, plan.constants), BY_VALUE=plan.units.by_value,
            HAS_WEIGHT=self.has_weight, CENTRED=self.form.axes.centred,
            FIXED=self.form.constant, NEEDS_X=self.needs_x, NEEDS_RESIDUAL=self.needs_residual,
        )  # fmt: skip

    def _given(self, given: Tensor | None) -> tuple[Tensor, int] | None:
        return None if given is None else (given, self.units.statistics)

    def _channels(self, given: Tensor | None) -> None:
        """Parameters by unit: their sums serve the statistics too."""
        units, plan = self.units, Streamed(self.units, self.kept.itemsize)
        room = self._given(given)
        own = self.needs_x and not self.form.constant and room is None
        if own or self.needs_parameters:
            gx, g = self._sums(plan, weighted=False)
            together = units.samples == 1 and units.D == 1
            if own:
                room = self._room
                spanned = units.samples if units.spans else units.D
                self._merge(
                    gx, g, spanned * plan.count, plan.count, room=room,
                    parameters=together and self.needs_parameters,
                )  # fmt: skip
            if self.needs_parameters and not (own and together):
                samples = units.part or units.samples
                self._merge(gx, g, samples * plan.count, plan.count, parameters=True)
        if self.needs_x or self.needs_residual:
            self._apply(plan, room)

    @property
    def _across(self) -> Units:
        """Features as units, whose values are the rows; those of a part as a sample's."""
        units = self.units
        if units.columns:
            return Units(units.K, units.K, units.C, units.samples, units.K * units.C)
        features, rows = units.K, units.part or units.U
        part = 1 if units.part else 0
        return Units(
            units.parts * features, features, rows, samples=units.parts, columns=True, part=part
        )

    def _features(self, given: Tensor | None) -> None:
        """Parameters by value: a row's sums in one pass, a feature's in another."""
        units, room = self.units, self._given(given)
        if self.needs_x or self.needs_residual:
            plan = Streamed(units, self.kept.itemsize)
            if self.needs_x and not self.form.constant and room is None:
                gx, g = self._sums(plan, weighted=self.has_weight > 0)
                room = self._room
                self._merge(gx, g, plan.count, plan.count, room=room, parameters=False)
            self._apply(plan, room)
        if self.needs_parameters:
            plan = Streamed(self._across, self.kept.itemsize)
            gx, g = self._sums(plan, weighted=False, across=True)
            self._merge(gx, g, plan.count, plan.count, parameters=True)
