"""The short way of a compiler: a plain call's operators, by as few names as can be.

A compiler guards every name that it looks up, and tests these guards at every call: a small
network's time is mostly that. So a layer reads its settings once, and all else is this one
function. What is not plain (exports, function transforms, subclasses, devices without kernels) or
not in order (a shape that does not fit) is not for this way: `call` returns None, and the caller
goes the long way, which serves the rest and words every error. The operators in the graph, and what
they are given, are the long way's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from . import library
from .call import ACT, KEEP
from .exporting import is_exporting
from .operators import move_in_graph, norm
from .route import has_kernel

# by a name of their own: a name within a module is guarded twice
_is_grad_enabled = torch.is_grad_enabled
_transforms_active = torch._C._are_functorch_transforms_active
_STRIDED, _INT64 = torch.strided, torch.int64

# a residual, an activation's number and its parameter
After = tuple[Any, ...]


def call(
    x: Tensor, weight: Any, bias: Any, shape: tuple[int, ...], form: int, eps: Any, given: Any,
    moving: Any, after: After | None,
) -> Tensor | None:  # fmt: skip
    """y of a tensor that is no subclass's, traced by a compiler.

    shape: of each parameter and statistic.
    given: mean and variance, constants; None for x's own.
    moving: running_mean, running_var, num_batches_tracked and momentum, of x's own; or None.
    """
    if (
        forward_ad._current_level >= 0
        or _transforms_active()
        or is_exporting()
        or x.layout is not _STRIDED
        or x.is_nested
        or not x.is_floating_point()
        or x.dtype.itemsize == 1
        or x.numel() == 0
        or (library.NATIVE is None if x.device.type == "cpu" else not has_kernel(x))
    ):
        return None
    residual, act, parameter = (None, 0, 0.0) if after is None else after
    mean, var = (None, None) if given is None else given
    wanted = x.requires_grad
    for t in (weight, bias, residual):
        wanted = wanted or (t is not None and t.requires_grad)
    statistics = mean, var, *(moving or ())[:2]
    if any(t is not None and t.requires_grad for t in statistics):
        return None
    count = None if moving is None else moving[2]
    if count is not None and count.dtype is not _INT64:
        return None
    for t in (weight, bias, *statistics):
        if t is not None and not (
            (type(t) is Parameter or type(t) is Tensor)
            and t.shape == shape
            and t.device == x.device
        ):
            return None
    if residual is not None and not (
        (type(residual) is Parameter or type(residual) is Tensor)
        and residual.shape == x.shape
        and residual.dtype == x.dtype
        and residual.layout is _STRIDED
        and residual.device == x.device
    ):
        return None
    keep = KEEP if moving is not None or (wanted and _is_grad_enabled()) else 0
    numbers = form | keep | act << ACT, eps, parameter, 0.0
    y, record = norm(x, weight, bias, None, residual, mean, var, *numbers)
    if moving is not None:
        *running, momentum = moving
        move_in_graph(*running, record, momentum, False)
    return y  # type: ignore[no-any-return]
