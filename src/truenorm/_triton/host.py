"""The operators on CUDA tensors; the host never waits.

A few launches each, on the current stream, into memory of torch's allocator: a CUDA graph can
capture them. Launches and bytes are counted in docs/performance.md.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from .. import _plain
from .._core import geometry
from .._core.geometry import BATCH, Axes
from . import config, response, running, view
from . import forward as kernels
from .host_backward import backward, backward_of_part
from .view import Streamed, Units

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _moments(x: Tensor, units: Units, centred: bool) -> tuple[Tensor, Tensor]:
    """Mean and variance in two launches."""
    acc, width = view.compute(x, cancels=centred)
    if units.D > 1 and not units.columns:
        # a group is one run in memory
        units = Units(units.U // units.D, units.C // units.D, units.K * units.D)
    plan = Streamed(units, width.itemsize)
    parts = view.pair(units.U * plan.count, torch.float64, x.device)
    kernels.moments[plan.grid](
        x, *parts, *plan.sizes, plan.unit_blocks, plan.count, *plan.cuts,
        **plan.constants, CENTRED=centred, ACC=acc, INDEX=view.index(x),
    )  # fmt: skip
    mean = torch.empty(units.statistics, dtype=torch.float64, device=x.device)
    var = torch.empty_like(mean)
    per_statistic = units.D * plan.count
    merge = config.merge(per_statistic, neighbours=False)
    kernels.merge_moments[(-(-units.statistics // merge.units),)](
        *parts, mean, var,
        units.statistics, per_statistic, plan.count, units.K, units.R, *plan.cuts,
        CENTRED=centred, BQ=merge.units, BP=merge.values, **view.launch_options(merge.warps),
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
    acc, width = view.compute(x, cancels=own or bias is not None)
    plan = Streamed(units, width.itemsize)
    kernels.normalize[plan.grid](
        x, mean, var, weight, bias, y,
        *plan.sizes, units.D, plan.unit_blocks, plan.count, *plan.cuts, view.bits(eps),
        **plan.constants, BY_VALUE=units.by_value, HAS_WEIGHT=weight is not None,
        HAS_BIAS=bias is not None, ACC=acc, INDEX=view.index(x),
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
    y = geometry.empty_result(x, axes)
    with view.on(x):
        x, weight, bias = view.dense(x, y.stride()), view.optional(weight), view.optional(bias)
        units = view.units_of(x, axes)
        acc, width = view.compute(x, cancels=centred)
        launch = units.whole(width.itemsize, backward=False)
        if launch is None:
            mean, var = _moments(x, units, centred)
            _normalize(x, y, mean, var, weight, bias, units, eps, own=centred)
            return y, mean, var
        mean = torch.empty(units.statistics, dtype=torch.float64, device=x.device)
        var = torch.empty_like(mean)
        grouped = units.D > 1
        per_program = units.D if grouped else launch.units
        kernels.forward[(units.blocks(per_program),)](
            x, weight, bias, y, mean, var,
            units.U, units.C, units.K, units.R, units.run_stride, per_program, units.values,
            view.bits(eps),
            **units.tiles(launch), RUNS=units.R > 1, GROUPED=grouped, BY_VALUE=units.by_value,
            HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None, CENTRED=centred,
            ACC=acc, INDEX=view.index(x),
        )  # fmt: skip
        return y, mean, var


def apply(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    y = geometry.empty_result(x, BATCH)
    with view.on(x):
        x = view.dense(x, y.stride())
        units = view.units_of(x, BATCH)
        mean, var = view.flat(mean), view.flat(var)
        weight, bias = view.optional(weight), view.optional(bias)
        _normalize(x, y, mean, var, weight, bias, units, eps, own=False)
    return y


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of each channel over the batch, without an output."""
    with view.on(x):
        x = view.dense(x, geometry.kept_strides(x, BATCH))
        return _moments(x, view.units_of(x, BATCH), True)


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
    with view.on(x):
        running.update_running[(-(-channels // 128),)](
            view.flat(mean), view.flat(var), running_mean, running_var, num_batches_tracked,
            channels, mean.numel() // channels, values,
            view.bits(0.0 if momentum is None else momentum),
            HAS_COUNT=num_batches_tracked is not None, AVERAGE=momentum is None, BC=128, BN=8,
            **view.launch_options(4),
        )  # fmt: skip
        if momentum is None and num_batches_tracked is not None:
            num_batches_tracked.add_(1)
    return None


_ROOTS = {0.5: 2, 0.75: 3, 1.0: 4}


def _response(x: Tensor, beta: float) -> tuple[tuple[int, int, int], dict[str, Any]]:
    """(values, channels, their distance) and constants of LocalResponseNorm's kernels."""
    _, c, s = geometry.ncs(x.shape, BATCH)
    acc, _ = view.compute(x)
    quarters = _ROOTS.get(beta, 0)
    constants = {
        "BLOCK": 1024,
        "QUARTERS": quarters,
        # float32's logarithm is too coarse for other powers
        "ACC": acc if quarters else tl.float64,
        "INDEX": view.index(x),
        **view.launch_options(4),
    }
    return (x.numel(), c, 1 if view.inside(x, s) else s), constants


def local_response_norm(x: Tensor, size: int, alpha: float, beta: float, k: float) -> Tensor:
    y = geometry.empty_result(x, BATCH)
    with view.on(x):
        x = view.dense(x, y.stride())
        sizes, constants = _response(x, beta)
        response.local_response[(-(-x.numel() // 1024),)](
            x, y, *sizes, size, view.bits(alpha), view.bits(beta), view.bits(k), **constants
        )
    return y


def local_response_norm_backward(
    grad: Tensor, x: Tensor, size: int, alpha: float, beta: float, k: float
) -> Tensor:
    result = geometry.empty_result(x, BATCH)
    with view.on(x):
        x, grad = view.dense(x, result.stride()), view.dense(grad.to(x.dtype), result.stride())
        sizes, constants = _response(x, beta)
        response.local_response_backward[(-(-x.numel() // 1024),)](
            grad,
            x,
            result,
            *sizes,
            size,
            view.bits(alpha),
            view.bits(beta),
            view.bits(k),
            **constants,
        )
    return result


def serves(x: Tensor) -> bool:
    """Whether the kernels take this tensor; what they do not take is for the plain formulas."""
    return x.dtype in DTYPES and x.numel() > 0


KERNELS: dict[str, Callable[..., Any]] = {
    "forward": forward,
    "apply": apply,
    "backward": backward,
    "moments": moments,
    "backward_of_part": backward_of_part,
    "update_running_": update_running,
    "local_response_norm": local_response_norm,
    "local_response_norm_backward": local_response_norm_backward,
}
