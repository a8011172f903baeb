"""The backward operator on CUDA tensors: whole statistics at once, or sums, merge and apply."""

from __future__ import annotations

import torch
from torch import Tensor

from .._core import geometry
from .._core.geometry import BATCH, Axes
from . import backward as kernels
from . import config, view
from .config import Launch
from .view import Streamed, Units

NEEDS_INPUT, NEEDS_WEIGHT, NEEDS_BIAS = 1, 2, 4


def backward(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    num_groups: int,
    feature_dims: int,
    centred: bool,
    eps: float,
    fixed: bool,
    needs: int,
) -> tuple[Tensor, Tensor, Tensor]:
    axes = Axes(num_groups, feature_dims, centred)
    with view.on(x):
        return _Backward(grad, x, mean, var, weight, axes, eps, fixed, needs).run()


def backward_of_part(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    mean_grad: Tensor,
    mean_grad_x_hat: Tensor,
    eps: float,
) -> Tensor:
    """grad_x of a part of a batch, whose sums over all of it are given."""
    with view.on(x):
        call = _Backward(grad, x, mean, var, weight, BATCH, eps, False, NEEDS_INPUT)
        plan = Streamed(call.units, call.kept.itemsize)
        given = (view.flat(mean_grad_x_hat.to(call.kept)), view.flat(mean_grad.to(call.kept)))
        call._apply(plan, given)
    return call.grad_x


class _Backward:
    """One call of the backward operator: what its kernels share."""

    def __init__(
        self,
        grad: Tensor,
        x: Tensor,
        mean: Tensor,
        var: Tensor,
        weight: Tensor | None,
        axes: Axes,
        eps: float,
        fixed: bool,
        needs: int,
    ) -> None:
        self.centred, self.fixed, self.eps = axes.centred, fixed, view.bits(eps)
        strides = geometry.kept_strides(x, axes)
        self.x, self.grad = view.dense(x, strides), view.dense(grad.to(x.dtype), strides)
        self.mean, self.var, self.weight = view.flat(mean), view.flat(var), view.optional(weight)
        self.units = view.units_of(self.x, axes)
        self.acc, self.kept = view.compute(x)
        self.needs = needs
        self.needs_x = bool(needs & NEEDS_INPUT)
        self.needs_parameters = bool(needs & (NEEDS_WEIGHT | NEEDS_BIAS))
        self.grad_x = torch.empty_strided(
            x.shape if self.needs_x else (0,),
            strides if self.needs_x else (1,),
            dtype=x.dtype,
            device=x.device,
        )
        shape = x.shape[-axes.feature_dims :] if axes.feature_dims else x.shape[1:2]
        dtype = weight.dtype if weight is not None else torch.promote_types(x.dtype, torch.float32)
        sizes = shape if self.needs_parameters else (0,)
        self.grad_weight = torch.empty(sizes, dtype=dtype, device=x.device)
        self.grad_bias = torch.empty(sizes, dtype=dtype, device=x.device)

    def run(self) -> tuple[Tensor, Tensor, Tensor]:
        launch = self.units.whole(self.kept.itemsize, backward=True)
        if launch is not None:
            self._whole(launch)
        elif self.units.by_value:
            self._features()
        else:
            self._channels()
        empty = self.grad_weight.new_empty(0)
        return (
            self.grad_x,
            self.grad_weight if self.needs & NEEDS_WEIGHT else empty,
            self.grad_bias if self.needs & NEEDS_BIAS else empty.clone(),
        )

    def _room(self, numel: int) -> tuple[Tensor, Tensor]:
        return view.pair(numel, self.kept, self.x.device)

    def _whole(self, launch: Launch) -> None:
        """Everything in one launch, and the parameters' sums added up in a second."""
        units, grouped = self.units, self.units.D > 1
        per_program = units.D if grouped else launch.units
        blocks = grid = units.blocks(per_program)
        of_weight, of_bias = self.grad_weight, self.grad_bias
        if units.by_value:
            grid = config.programs(blocks, view.processors(self.x.device))
        if self.needs_parameters and (units.by_value or units.samples > 1):
            of_weight, of_bias = self._room(grid * units.K if units.by_value else units.U)
        kernels.backward[(grid,)](
            self.grad, self.x, self.mean, self.var, self.weight, self.grad_x, of_weight, of_bias,
            units.U, units.C, units.K, units.R, units.run_stride, per_program, units.values,
            blocks, self.eps,
            **units.tiles(launch), RUNS=units.R > 1, GROUPED=grouped, BY_VALUE=units.by_value,
            HAS_WEIGHT=self.weight is not None, CENTRED=self.centred, FIXED=self.fixed,
            NEEDS_X=self.needs_x, NEEDS_PARAMETERS=self.needs_parameters,
            ACC=self.acc, INDEX=view.index(self.x),
        )  # fmt: skip
        if of_weight is not self.grad_weight:
            parts = grid if units.by_value else units.samples
            self._merge(of_weight, of_bias, parts, 1, parameters=True)

    def _merge(
        self, gx: Tensor, g: Tensor, parts: int, chunks: int, *, parameters: bool,
        statistics: tuple[Tensor, Tensor] | None = None, of_statistics: bool = False,
    ) -> None:  # fmt: skip
        """Sums by unit and chunk into those of parameters (one per channel), of statistics, or,
        where a statistic is a channel's, both.
        """
        units = self.units
        slope, shift = statistics or (None, None)
        results = units.statistics if of_statistics else units.C
        steps = (units.D, 1) if of_statistics else (1, units.C)
        merge = config.merge(parts, neighbours=chunks == 1 and not of_statistics)
        weighted = self.weight is not None and not units.by_value
        kernels.merge_sums[(-(-results // merge.units),)](
            gx, g, self.weight, slope, shift, self.grad_weight, self.grad_bias,
            results, units.C, units.values, parts, chunks, *steps,
            STATISTICS=statistics is not None, PARAMETERS=parameters, HAS_WEIGHT=weighted,
            BQ=merge.units, BP=merge.values, **view.launch_options(merge.warps),
        )  # fmt: skip

    def _sums(self, plan: Streamed, *, by_value: bool, weighted: bool) -> tuple[Tensor, Tensor]:
        gx, g = self._room(plan.units.U * plan.count)
        kernels.backward_sums[plan.grid](
            self.grad, self.x, self.mean, self.var, self.weight, gx, g,
            *plan.sizes, plan.units.D, plan.unit_blocks, plan.count, *plan.cuts, self.eps,
            **plan.constants, STATISTIC_BY_VALUE=by_value, WEIGHTED=weighted,
            ACC=self.acc, INDEX=view.index(self.x),
        )  # fmt: skip
        return gx, g

    def _apply(self, plan: Streamed, statistics: tuple[Tensor, Tensor] | None) -> None:
        slope, shift = statistics or (None, None)
        kernels.backward_apply[plan.grid](
            self.grad, self.x, self.mean, self.var, self.weight, slope, shift, self.grad_x,
            *plan.sizes, plan.units.D, plan.unit_blocks, plan.count, *plan.cuts, self.eps,
            **plan.constants, BY_VALUE=plan.units.by_value,
            HAS_WEIGHT=self.weight is not None, CENTRED=self.centred, FIXED=self.fixed,
            ACC=self.acc, INDEX=view.index(self.x),
        )  # fmt: skip

    def _channels(self) -> None:
        """Parameters by unit: their sums serve the statistics too."""
        units, plan = self.units, Streamed(self.units, self.kept.itemsize)
        statistics = None
        if self.needs_x and not self.fixed:
            statistics = self._room(units.statistics)
        if statistics is not None or self.needs_parameters:
            gx, g = self._sums(plan, by_value=False, weighted=False)
            together = units.samples == 1 and units.D == 1
            if statistics is not None:
                self._merge(
                    gx, g, units.D * plan.count, plan.count, statistics=statistics,
                    of_statistics=True, parameters=together and self.needs_parameters,
                )  # fmt: skip
            if self.needs_parameters and (statistics is None or not together):
                self._merge(gx, g, units.samples * plan.count, plan.count, parameters=True)
        if self.needs_x:
            self._apply(plan, statistics)

    def _features(self) -> None:
        """Parameters by value: a row's sums in one pass, a feature's in another."""
        units = self.units
        if self.needs_x:
            plan = Streamed(units, self.kept.itemsize)
            gx, g = self._sums(plan, by_value=False, weighted=self.weight is not None)
            statistics = self._room(units.statistics)
            self._merge(
                gx, g, plan.count, plan.count, statistics=statistics, of_statistics=True,
                parameters=False,
            )  # fmt: skip
            self._apply(plan, statistics)
        if self.needs_parameters:
            plan = Streamed(Units(units.C, units.C, units.U, columns=True), self.kept.itemsize)
            gx, g = self._sums(plan, by_value=True, weighted=False)
            self._merge(gx, g, plan.count, plan.count, parameters=True)
