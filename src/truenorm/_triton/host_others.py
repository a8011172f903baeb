"""What moves running statistics, and LocalResponseNorm, on CUDA tensors."""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from .._core import geometry
from .._core.geometry import BATCH
from . import response as kernels
from . import running, view
from .replay import launch


def move(
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor | None,
    record: Tensor,
    momentum: float | None,
    skip_nonfinite: bool,
) -> None:
    # what is strided, or a layer whose buffers were moved one by one
    dense = [t if t.is_contiguous() else t.contiguous() for t in (running_mean, running_var)]
    count = num_batches_tracked
    if count is not None:
        count = count.to(record.device)
    channels, samples = running_mean.numel(), record.shape[1] // running_mean.numel()
    with view.on(record):
        # who would ask on the host waits for the device
        finite = record[:2].isfinite().all().view(torch.uint8) if skip_nonfinite else None
        launch(
            running.move, (-(-channels // 128),),
            view.flat(record), finite, *dense, count,
            channels, samples, view.bits(0.0 if momentum is None else momentum),
            HAS_COUNT=count is not None, AVERAGE=momentum is None, SKIPS=finite is not None,
            BC=128, BN=8, **view.launch_options(4),
        )  # fmt: skip
        if momentum is None and count is not None:
            count.add_(1 if finite is None else finite)
        for kept, moved in zip((running_mean, running_var), dense, strict=True):
            if moved is not kept:
                kept.copy_(moved)
        if count is not None and count is not num_batches_tracked:
            assert num_batches_tracked is not None
            num_batches_tracked.copy_(count)


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


def response(x: Tensor, size: int, alpha: float, beta: float, k: float) -> Tensor:
    y = geometry.empty_result(x, BATCH)
    with view.on(x):
        x = view.dense(x, y.stride())
        sizes, constants = _response(x, beta)
        kernels.local_response[(-(-x.numel() // 1024),)](
            x, y, *sizes, size, view.bits(alpha), view.bits(beta), view.bits(k), **constants
        )
    return y


def response_backward(
    grad: Tensor, x: Tensor, size: int, alpha: float, beta: float, k: float
) -> Tensor:
    result = geometry.empty_result(x, BATCH)
    with view.on(x):
        x, grad = view.dense(x, result.stride()), view.dense(grad.to(x.dtype), result.stride())
        sizes, constants = _response(x, beta)
        numbers = view.bits(alpha), view.bits(beta), view.bits(k)
        kernels.local_response_backward[(-(-x.numel() // 1024),)](
            grad, x, result, *sizes, size, *numbers, **constants
        )
    return result
