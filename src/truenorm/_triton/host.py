"""The operators on CUDA tensors: memory laid out, work cut, kernels launched; the host never waits.

A few launches each, on the current stream, into memory of torch's allocator: a CUDA graph can
capture them. Launches and bytes are counted in docs/performance.md.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from .. import _axes, _plain
from .._axes import BATCH, Axes
from . import backward as backward_kernels
from . import config, response, running
from . import forward as forward_kernels
from .config import Launch

NEEDS_INPUT, NEEDS_WEIGHT, NEEDS_BIAS = 1, 2, 4
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_HALF = (torch.bfloat16, torch.float16)


def _bits(value: float) -> int:
    """A float64 as an integer: a kernel takes floats as float32."""
    return int(struct.unpack("<q", struct.pack("<d", value))[0])


def _launch(warps: int) -> dict[str, Any]:
    # named, since Triton 3.10 changes what it takes without
    return {"num_warps": warps, "enable_fp_fusion": True}


def _on(x: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device."""
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return nullcontext()


_multiprocessors: dict[torch.device, int] = {}


def _processors(device: torch.device) -> int:
    if device not in _multiprocessors:
        found = 4  # the interpreter's: small, so that small cases share programs
        if device.type == "cuda":
            found = torch.cuda.get_device_properties(device).multi_processor_count
        _multiprocessors[device] = found
    return _multiprocessors[device]


def _compute(x: Tensor, *, cancels: bool = False) -> tuple[Any, torch.dtype]:
    """The type that kernels compute in.

    cancels: whether an output can be a small difference of large numbers. In half precision a unit
        in its last place is then less than float32's error, and only float64 rounds once.
    """
    if x.dtype == torch.float64 or (cancels and x.dtype in _HALF):
        return tl.float64, torch.float64
    return tl.float32, torch.float32


def _index(x: Tensor) -> Any:
    return tl.int32 if x.numel() < 2**31 else tl.int64


def _dense(x: Tensor, strides: tuple[int, ...]) -> Tensor:
    if x.stride() == strides:
        return x
    return torch.empty_strided(x.shape, strides, dtype=x.dtype, device=x.device).copy_(x)


def _flat(p: Tensor | None) -> Tensor | None:
    return p if p is None or p.is_contiguous() else p.contiguous()


def _inside(x: Tensor, s: int) -> bool:
    """Whether the channels of a dense x (N, C, *) are inside its positions."""
    return s == 1 or (x.shape[1] > 1 and x.stride(1) == 1)


@dataclass(frozen=True)
class Units:
    """A tensor cut into units, as tiles.py describes them.

    U: units; C: channels; K: values of a run; R: runs, run_stride apart; D: units that share a
    statistic; samples: that have units of their own; by_value: whether parameters go by value.
    """

    U: int
    C: int
    K: int
    R: int = 1
    run_stride: int = 0
    D: int = 1
    samples: int = 1
    columns: bool = False
    by_value: bool = False

    @property
    def one_sample(self) -> bool:
        return self.U == self.C

    @property
    def values(self) -> int:
        """Values that share a statistic."""
        return self.D * self.R * self.K

    @property
    def statistics(self) -> int:
        return self.U // self.D

    def whole(self, width: int, *, backward: bool) -> Launch | None:
        grouped = self.D > 1
        return config.whole(
            self.R * self.K,
            self.D if grouped else self.C,
            columns=self.columns,
            grouped=grouped,
            width=width,
            backward=backward,
        )

    def tiles(self, launch: Launch) -> dict[str, Any]:
        """What every kernel on these units is given at compile time."""
        return {
            "BU": launch.units,
            "BK": launch.values,
            "COLUMNS": self.columns,
            "ONE_SAMPLE": self.one_sample,
            **_launch(launch.warps),
        }


def _units(x: Tensor, axes: Axes) -> Units:
    n, c, s = _axes.ncs(x.shape, axes)
    if axes.feature_dims:
        return Units(n, c, c, samples=n, by_value=True)
    columns = _inside(x, s)
    if axes.num_groups:
        return Units(n * c, c, s, D=c // axes.num_groups, samples=n, columns=columns)
    if columns:
        return Units(c, c, n * s, columns=True)
    return Units(c, c, s, n, c * s)


class Streamed:
    """Units cut into chunks, a program each."""

    def __init__(self, units: Units, width: int) -> None:
        self.units = units
        self.launch = config.streamed(units.K, units.C, columns=units.columns, width=width)
        self.cut = config.chunks(units.K, units.R, self.launch)
        self.unit_blocks = -(-units.U // self.launch.units)

    @property
    def count(self) -> int:
        return self.cut.count

    @property
    def grid(self) -> tuple[int]:
        return (self.unit_blocks * self.cut.count,)

    @property
    def sizes(self) -> tuple[int, ...]:
        u = self.units
        return u.U, u.C, u.K, u.R, u.run_stride

    @property
    def cuts(self) -> tuple[int, ...]:
        return self.cut.k_chunks, self.cut.k_chunk, self.cut.r_chunk

    @property
    def constants(self) -> dict[str, Any]:
        # one run after the other in memory, or one unit after the other
        first = not self.units.columns and self.units.R == 1
        return {**self.units.tiles(self.launch), "CHUNKS_FIRST": first}


def _moments(x: Tensor, units: Units, centred: bool) -> tuple[Tensor, Tensor]:
    """Mean and variance in two launches."""
    acc, width = _compute(x, cancels=centred)
    if units.D > 1 and not units.columns:
        # a group is one run in memory
        units = Units(units.U // units.D, units.C // units.D, units.K * units.D)
    plan = Streamed(units, width.itemsize)
    parts = torch.empty((2, units.U, plan.count), dtype=torch.float64, device=x.device)
    forward_kernels.moments[plan.grid](
        x, parts[0], parts[1], *plan.sizes, plan.unit_blocks, plan.count, *plan.cuts,
        **plan.constants, CENTRED=centred, ACC=acc, INDEX=_index(x),
    )  # fmt: skip
    mean = torch.empty(units.statistics, dtype=torch.float64, device=x.device)
    var = torch.empty_like(mean)
    per_statistic = units.D * plan.count
    merge = config.merge(per_statistic, neighbours=False)
    forward_kernels.merge_moments[(-(-units.statistics // merge.units),)](
        parts[0], parts[1], mean, var,
        units.statistics, per_statistic, plan.count, units.K, units.R, *plan.cuts,
        CENTRED=centred, BQ=merge.units, BP=merge.values, **_launch(merge.warps),
    )  # fmt: skip
    return mean, var


def _normalize(
    x: Tensor,
    y: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Any,
    bias: Any,
    units: Units,
    eps: float,
    *,
    own: bool,
) -> None:
    # a mean of the values' own is rounded, one that was given is not
    acc, width = _compute(x, cancels=own or bias is not None)
    plan = Streamed(units, width.itemsize)
    forward_kernels.normalize[plan.grid](
        x, mean, var, weight, bias, y,
        *plan.sizes, units.D, plan.unit_blocks, plan.count, *plan.cuts, _bits(eps),
        **plan.constants, BY_VALUE=units.by_value, HAS_WEIGHT=weight is not None,
        HAS_BIAS=bias is not None, ACC=acc, INDEX=_index(x),
    )  # fmt: skip


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    num_groups: int,
    feature_dims: int,
    centred: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    axes = Axes(num_groups, feature_dims, centred)
    y = _axes.empty_result(x, axes)
    with _on(x):
        x, weight, bias = _dense(x, y.stride()), _flat(weight), _flat(bias)
        units = _units(x, axes)
        acc, width = _compute(x, cancels=centred)
        launch = units.whole(width.itemsize, backward=False)
        if launch is None:
            mean, var = _moments(x, units, centred)
            _normalize(x, y, mean, var, weight, bias, units, eps, own=centred)
            return y, mean, var
        mean = torch.empty(units.statistics, dtype=torch.float64, device=x.device)
        var = torch.empty_like(mean)
        grouped = units.D > 1
        per_program = units.D if grouped else launch.units
        forward_kernels.forward[(-(-units.U // per_program),)](
            x, weight, bias, y, mean, var,
            units.U, units.C, units.K, units.R, units.run_stride, per_program, units.values,
            _bits(eps),
            **units.tiles(launch), RUNS=units.R > 1, GROUPED=grouped, BY_VALUE=units.by_value,
            HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None, CENTRED=centred,
            ACC=acc, INDEX=_index(x),
        )  # fmt: skip
        return y, mean, var


def apply(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    y = _axes.empty_result(x, BATCH)
    with _on(x):
        x = _dense(x, y.stride())
        units = _units(x, BATCH)
        mean, var = mean.contiguous(), var.contiguous()
        _normalize(x, y, mean, var, _flat(weight), _flat(bias), units, eps, own=False)
    return y


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
    with _on(x):
        return _Backward(grad, x, mean, var, weight, axes, eps, fixed, needs).run()


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
        self.centred, self.fixed, self.eps = axes.centred, fixed, _bits(eps)
        strides = _axes.kept_strides(x, axes)
        self.x, self.grad = _dense(x, strides), _dense(grad.to(x.dtype), strides)
        self.mean, self.var, self.weight = mean.contiguous(), var.contiguous(), _flat(weight)
        self.units = _units(self.x, axes)
        self.acc, self.kept = _compute(x)
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

    def _room(self, *sizes: int) -> tuple[Tensor, Tensor]:
        room = torch.empty((2, *sizes), dtype=self.kept, device=self.x.device)
        return room[0], room[1]

    def _whole(self, launch: Launch) -> None:
        """Everything in one launch, and the parameters' sums added up in a second."""
        units, grouped = self.units, self.units.D > 1
        per_program = units.D if grouped else launch.units
        blocks = grid = -(-units.U // per_program)
        of_weight, of_bias = self.grad_weight, self.grad_bias
        if units.by_value:
            grid = config.programs(blocks, _processors(self.x.device))
        if self.needs_parameters and (units.by_value or units.samples > 1):
            of_weight, of_bias = self._room(grid * units.K if units.by_value else units.U)
        backward_kernels.backward[(grid,)](
            self.grad, self.x, self.mean, self.var, self.weight, self.grad_x, of_weight, of_bias,
            units.U, units.C, units.K, units.R, units.run_stride, per_program, units.values,
            blocks, self.eps,
            **units.tiles(launch), RUNS=units.R > 1, GROUPED=grouped, BY_VALUE=units.by_value,
            HAS_WEIGHT=self.weight is not None, CENTRED=self.centred, FIXED=self.fixed,
            NEEDS_X=self.needs_x, NEEDS_PARAMETERS=self.needs_parameters,
            ACC=self.acc, INDEX=_index(self.x),
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
        backward_kernels.merge_sums[(-(-results // merge.units),)](
            gx, g, self.weight, slope, shift, self.grad_weight, self.grad_bias,
            results, units.C, units.values, parts, chunks, *steps,
            STATISTICS=statistics is not None, PARAMETERS=parameters, HAS_WEIGHT=weighted,
            BQ=merge.units, BP=merge.values, **_launch(merge.warps),
        )  # fmt: skip

    def _sums(self, plan: Streamed, *, by_value: bool, weighted: bool) -> tuple[Tensor, Tensor]:
        gx, g = self._room(plan.units.U * plan.count)
        backward_kernels.backward_sums[plan.grid](
            self.grad, self.x, self.mean, self.var, self.weight, gx, g,
            *plan.sizes, plan.units.D, plan.unit_blocks, plan.count, *plan.cuts, self.eps,
            **plan.constants, STATISTIC_BY_VALUE=by_value, WEIGHTED=weighted,
            ACC=self.acc, INDEX=_index(self.x),
        )  # fmt: skip
        return gx, g

    def _apply(self, plan: Streamed, statistics: tuple[Tensor, Tensor] | None) -> None:
        slope, shift = statistics or (None, None)
        backward_kernels.backward_apply[plan.grid](
            self.grad, self.x, self.mean, self.var, self.weight, slope, shift, self.grad_x,
            *plan.sizes, plan.units.D, plan.unit_blocks, plan.count, *plan.cuts, self.eps,
            **plan.constants, BY_VALUE=plan.units.by_value,
            HAS_WEIGHT=self.weight is not None, CENTRED=self.centred, FIXED=self.fixed,
            ACC=self.acc, INDEX=_index(self.x),
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


def update_running(
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor | None,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    momentum: float | None,
) -> None:
    plain = not (running_mean.is_contiguous() and running_var.is_contiguous())
    if num_batches_tracked is not None:
        # a layer whose buffers were moved one by one
        plain |= num_batches_tracked.device != x.device
    if plain:
        return _plain.update_running(
            running_mean, running_var, num_batches_tracked, x, mean, var, momentum
        )
    channels = running_mean.numel()
    values = x.numel() // mean.numel()
    with _on(x):
        running.update_running[(-(-channels // 128),)](
            mean, var, running_mean, running_var, num_batches_tracked,
            channels, mean.numel() // channels, values,
            _bits(0.0 if momentum is None else momentum),
            HAS_COUNT=num_batches_tracked is not None, AVERAGE=momentum is None, BC=128, BN=8,
            **_launch(4),
        )  # fmt: skip
        if momentum is None and num_batches_tracked is not None:
            num_batches_tracked.add_(1)
    return None


_ROOTS = {0.5: 2, 0.75: 3, 1.0: 4}


def _response(x: Tensor, beta: float) -> tuple[tuple[int, int, int], dict[str, Any]]:
    """(values, channels, their distance) and constants of LocalResponseNorm's kernels."""
    _, c, s = _axes.ncs(x.shape, BATCH)
    acc, _ = _compute(x)
    quarters = _ROOTS.get(beta, 0)
    constants = {
        "BLOCK": 1024,
        "QUARTERS": quarters,
        # float32's logarithm is too coarse for other powers
        "ACC": acc if quarters else tl.float64,
        "INDEX": _index(x),
        **_launch(4),
    }
    return (x.numel(), c, 1 if _inside(x, s) else s), constants


def local_response_norm(x: Tensor, size: int, alpha: float, beta: float, k: float) -> Tensor:
    y = _axes.empty_result(x, BATCH)
    with _on(x):
        x = _dense(x, y.stride())
        sizes, constants = _response(x, beta)
        response.local_response[(-(-x.numel() // 1024),)](
            x, y, *sizes, size, _bits(alpha), _bits(beta), _bits(k), **constants
        )
    return y


def local_response_norm_backward(
    grad: Tensor, x: Tensor, size: int, alpha: float, beta: float, k: float
) -> Tensor:
    result = _axes.empty_result(x, BATCH)
    with _on(x):
        x, grad = _dense(x, result.stride()), _dense(grad.to(x.dtype), result.stride())
        sizes, constants = _response(x, beta)
        response.local_response_backward[(-(-x.numel() // 1024),)](
            grad, x, result, *sizes, size, _bits(alpha), _bits(beta), _bits(k), **constants
        )
    return result


def serves(x: Tensor) -> bool:
    """Whether the kernels take this tensor; what they do not take is for the plain formulas."""
    return x.dtype in DTYPES and x.numel() > 0


KERNELS: dict[str, Callable[..., Any]] = {
    "forward": forward,
    "apply": apply,
    "backward": backward,
    "update_running_": update_running,
    "local_response_norm": local_response_norm,
    "local_response_norm_backward": local_response_norm_backward,
}
