"""The operators: schema, plain kernels, shape rule. autograd.py makes them differentiable.

The schemas stand here, not in C++: without a native library the plain kernels still need them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import (
    _axes,
    _library,  # noqa: F401  (loads the native kernels)
    _plain,
    _triton,
)
from .._axes import BATCH, Axes
from . import arguments

_AXES = "int num_groups, int feature_dims, bool centred"
_SCHEMAS = {
    "forward": f"(Tensor x, Tensor? weight, Tensor? bias, {_AXES}, float eps)"
    " -> (Tensor, Tensor, Tensor)",
    "apply": "(Tensor x, Tensor mean, Tensor var, Tensor? weight, Tensor? bias, float eps)"
    " -> Tensor",
    "backward": f"(Tensor grad, Tensor x, Tensor mean, Tensor var, Tensor? weight, {_AXES},"
    " float eps, bool fixed, int needs) -> (Tensor, Tensor, Tensor)",
    # of a part of a batch whose other parts are in other processes (distributed.py)
    "moments": "(Tensor x) -> (Tensor, Tensor)",
    "backward_of_part": "(Tensor grad, Tensor x, Tensor mean, Tensor var, Tensor? weight,"
    " Tensor mean_grad, Tensor mean_grad_x_hat, float eps) -> Tensor",
    "update_running_": "(Tensor(a!) running_mean, Tensor(b!) running_var,"
    " Tensor(c!)? num_batches_tracked, Tensor x, Tensor mean, Tensor var, float? momentum) -> ()",
    # the same once a batch, for compiled graphs: see track_once
    "track_": "(Tensor(a!) running_mean, Tensor(b!) running_var, Tensor(c!)? num_batches_tracked,"
    " Tensor x, Tensor mean, Tensor var, Tensor? count, float? momentum, bool skip_nonfinite)"
    " -> ()",
    "local_response_norm": "(Tensor x, int size, float alpha, float beta, float k) -> Tensor",
    "local_response_norm_backward": "(Tensor grad, Tensor x, int size, float alpha, float beta,"
    " float k) -> Tensor",
}

# The short way's (eager.py): on a CPU alone and never compiled, so without plain kernel and shape
# rule. The second output is what the backward needs; what is not asked for is an undefined tensor,
# None in Python; momentum NaN averages over all batches.
_EAGER = {
    "eager_forward": "(Tensor x, Tensor? weight, Tensor? bias, int form, float eps)"
    " -> (Tensor, Tensor)",
    "eager_forward_running": "(Tensor x, Tensor? weight, Tensor? bias, Tensor(a!) running_mean,"
    " Tensor(b!) running_var, Tensor(c!)? num_batches_tracked, float momentum, int form, float eps)"
    " -> (Tensor, Tensor)",
    "eager_apply": "(Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor var, int form,"
    " float eps) -> (Tensor, Tensor)",
    "eager_backward": "(Tensor grad, Tensor x, Tensor record, Tensor? weight)"
    " -> (Tensor, Tensor, Tensor)",
}

NEEDS_INPUT, NEEDS_WEIGHT, NEEDS_BIAS = 1, 2, 4

_library_def = arguments.Library("truenorm")
for _name, _schema in _SCHEMAS.items():
    _library_def.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))
for _name, _schema in _EAGER.items():
    _library_def.define(_name + _schema)
    # called below autograd only: so no guard is needed to get there
    _library_def.impl(_name, torch.library.fallthrough_kernel, "Autograd")


# ---------------------------------------------------------------- plain kernels, any device


def parameter_like(
    x: Tensor, weight: Tensor | None, feature_dims: int
) -> tuple[torch.Size, torch.dtype]:
    """Shape and dtype of the gradients of weight and bias."""
    shape = x.shape[-feature_dims:] if feature_dims else x.shape[1:2]
    if weight is not None:
        return shape, weight.dtype
    return shape, torch.promote_types(x.dtype, torch.float32)


def _plain_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    num_groups: int,
    feature_dims: int,
    centred: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return _plain.forward(x, weight, bias, Axes(num_groups, feature_dims, centred), eps)


def _plain_apply(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    return _plain.apply(x, mean, var, weight, bias, BATCH, eps)


def _plain_backward(
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
    found = _plain.backward(grad, x, mean, var, weight, axes, eps, fixed=fixed)
    shape, dtype = parameter_like(x, weight, feature_dims)
    return (
        found[0] if needs & NEEDS_INPUT else x.new_empty(0),
        found[1].view(shape).to(dtype) if needs & NEEDS_WEIGHT else x.new_empty(0, dtype=dtype),
        found[2].view(shape).to(dtype) if needs & NEEDS_BIAS else x.new_empty(0, dtype=dtype),
    )


def _plain_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    return _plain.moments(x, BATCH)


# Activation checkpointing computes a forward again within the backward pass, which is how that
# is told from a first one, in both of torch's forms of it.
_graph_task = torch._C._current_graph_task_id


def within_backward() -> bool:
    """Whether this runs within a backward pass, on its thread."""
    return _graph_task() != -1


def track_once(
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor | None,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    count: Tensor | None,
    momentum: float | None,
    skip_nonfinite: bool,
) -> None:
    """Move running statistics, unless the batch is computed again within a backward pass."""
    if within_backward():
        return
    running = running_mean, running_var, num_batches_tracked
    mapped = torch._C._are_functorch_transforms_active()  # whose errors are torch's
    if count is None and not skip_nonfinite and not mapped:
        with torch._C._AutoDispatchBelowAutograd():
            update_running(*running, x, mean, var, momentum)
        return
    values = x.numel() // mean.numel() if count is None else count
    with torch.no_grad():
        _plain.move_running(*running, mean, var, values, momentum, skip_nonfinite=skip_nonfinite)


PLAIN: dict[str, Callable[..., Any]] = {
    "forward": _plain_forward,
    "apply": _plain_apply,
    "backward": _plain_backward,
    "moments": _plain_moments,
    "backward_of_part": _plain.backward_of_part,
    "update_running_": _plain.update_running,
    "local_response_norm": _plain.local_response_norm,
    "local_response_norm_backward": _plain.local_response_norm_backward,
}
for _name, _kernel in PLAIN.items():
    _library_def.impl(_name, _kernel, "CompositeExplicitAutograd")
# asks, and calls update_running_: the same on every device
_library_def.impl("track_", track_once, "CompositeExplicitAutograd")
_triton.register(_library_def, PLAIN)


# ---------------------------------------------------------------- shape rules, for the compiler


def statistic_dtype(x: Tensor) -> torch.dtype:
    return torch.float32 if x.device.type == "mps" else torch.float64


def _fake_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    num_groups: int,
    feature_dims: int,
    centred: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    axes = Axes(num_groups, feature_dims, centred)
    shape = (_axes.num_statistics(x.shape, axes),)
    mean = x.new_empty(shape, dtype=statistic_dtype(x))
    return _axes.empty_result(x, axes), mean, torch.empty_like(mean)


def _fake_apply(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    return _axes.empty_result(x, BATCH)


def _fake_backward(
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
    shape, dtype = parameter_like(x, weight, feature_dims)

    def parameter(needed: int) -> Tensor:
        return x.new_empty(shape if needs & needed else 0, dtype=dtype)

    grad_input = _axes.empty_result(x, axes) if needs & NEEDS_INPUT else x.new_empty(0)
    return grad_input, parameter(NEEDS_WEIGHT), parameter(NEEDS_BIAS)


def _fake_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    mean = x.new_empty(x.shape[1], dtype=statistic_dtype(x))
    return mean, torch.empty_like(mean)


def _fake_backward_of_part(grad: Tensor, x: Tensor, *statistics_and_weight: Any) -> Tensor:
    return _axes.empty_result(x, BATCH)


def _fake_update_running(*args: Any) -> None:
    return None


def _fake_local_response_norm(x: Tensor, size: int, alpha: float, beta: float, k: float) -> Tensor:
    return _axes.empty_result(x, BATCH)


def _fake_local_response_norm_backward(
    grad: Tensor, x: Tensor, size: int, alpha: float, beta: float, k: float
) -> Tensor:
    return _axes.empty_result(x, BATCH)


_RULES: dict[str, Callable[..., Any]] = {
    "forward": _fake_forward,
    "apply": _fake_apply,
    "backward": _fake_backward,
    "moments": _fake_moments,
    "backward_of_part": _fake_backward_of_part,
    "update_running_": _fake_update_running,
    "track_": _fake_update_running,
    "local_response_norm": _fake_local_response_norm,
    "local_response_norm_backward": _fake_local_response_norm_backward,
}
for _name, _rule in _RULES.items():
    _library_def.register_fake(_name, _rule)


forward = torch.ops.truenorm.forward.default
apply = torch.ops.truenorm.apply.default
backward = torch.ops.truenorm.backward.default
eager_forward = torch.ops.truenorm.eager_forward.default
eager_forward_running = torch.ops.truenorm.eager_forward_running.default
eager_apply = torch.ops.truenorm.eager_apply.default
eager_backward = torch.ops.truenorm.eager_backward.default
moments = torch.ops.truenorm.moments.default
backward_of_part = torch.ops.truenorm.backward_of_part.default
update_running = torch.ops.truenorm.update_running_.default
track = torch.ops.truenorm.track_.default
local_response_norm = torch.ops.truenorm.local_response_norm.default
local_response_norm_backward = torch.ops.truenorm.local_response_norm_backward.default
