"""The short way: a plain eager call on a CPU, in as few steps as can be.

A small input's time is all calls: of torch's dispatcher, of Python. So here a whole forward, the
running statistics' update included, is one call of an operator, and so is a backward. What is not
plain (compiling, function transforms, dispatch modes, subclasses, other devices) or not in order (a
shape that does not fit) is not for this way: the functions return None before anything has changed,
and the caller goes the long way, which serves the rest and words every error.
"""

from __future__ import annotations

from math import nan
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad
from torch.overrides import has_torch_function_variadic

from .._axes import Axes
from .._library import NATIVE
from . import autograd, operators
from .operators import NEEDS_BIAS, NEEDS_INPUT, NEEDS_WEIGHT

# InstanceNorm's num_groups, as these operators take it: one for each channel
PER_CHANNEL = -1

# looked up once: every one of them is asked in every call
_is_compiling = torch.compiler.is_compiling
_is_grad_enabled = torch.is_grad_enabled
_transforms_active = torch._C._are_functorch_transforms_active
_dispatch_modes = torch._C._len_torch_dispatch_stack
_forward = operators.eager_forward._op
_apply = operators.eager_apply._op
_backward = operators.eager_backward._op
# what is refused here, the long way words
_REFUSED = (RuntimeError, TypeError, AttributeError)


def normalize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    num_groups: int,
    feature_dims: int,
    centred: bool,
    momentum: float | None,
    eps: float,
) -> Tensor | None:
    """x by its own statistics, towards which the running ones move; or None."""
    if (
        _is_compiling()
        or type(x) is not Tensor
        or not x.is_cpu
        or has_torch_function_variadic(x, weight, bias, running_mean, running_var)
        or _transforms_active()
        or forward_ad._current_level >= 0
        or _dispatch_modes()
        or NATIVE is None
    ):
        return None
    try:
        needs = NEEDS_INPUT if x.requires_grad else 0
        if weight is not None and weight.requires_grad:
            needs += NEEDS_WEIGHT
        if bias is not None and bias.requires_grad:
            needs += NEEDS_BIAS
        if momentum is None:
            momentum = nan
        if needs and _is_grad_enabled():
            running = running_mean, running_var, num_batches_tracked, momentum, True
            spec = num_groups, feature_dims, centred, eps, False, needs
            return _normalize(x, weight, bias, running, spec)  # type: ignore[no-any-return]
        return _forward(  # type: ignore[no-any-return]
            *(x, weight, bias, num_groups, feature_dims, centred, eps),
            *(running_mean, running_var, num_batches_tracked, momentum, False),
        )[0]
    except _REFUSED:
        return None


def normalize_fixed(
    x: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor | None:
    """x (N, C, *) by given statistics, one mean and variance per channel; or None."""
    if (
        _is_compiling()
        or type(x) is not Tensor
        or not x.is_cpu
        or has_torch_function_variadic(x, weight, bias, mean, var)
        or _transforms_active()
        or forward_ad._current_level >= 0
        or _dispatch_modes()
        or NATIVE is None
    ):
        return None
    try:
        needs = NEEDS_INPUT if x.requires_grad else 0
        if weight is not None and weight.requires_grad:
            needs += NEEDS_WEIGHT
        if bias is not None and bias.requires_grad:
            needs += NEEDS_BIAS
        if needs and _is_grad_enabled():
            spec = (0, 0, True, eps, True, needs)
            return _normalize_fixed(x, weight, bias, mean, var, eps, spec)  # type: ignore[no-any-return]
        return _apply(x, mean, var, weight, bias, eps, False)[0]  # type: ignore[no-any-return]
    except _REFUSED:
        return None


def _pull_back(ctx: Any, grad: Tensor) -> autograd.Grads:
    """Gradients of (x, weight, bias), where the backward itself is differentiated or transformed."""
    x, weight, statistics = ctx.saved_tensors
    num_groups, feature_dims, centred, eps, fixed, needs = ctx.spec
    mean, var = statistics.view(2, -1)
    axes = Axes(x.shape[1] if num_groups == PER_CHANNEL else num_groups, feature_dims, centred)
    return autograd.pull_back((x, weight, mean, var), (axes, eps, fixed), grad, needs)


def _backward_is_plain(grad: Tensor) -> bool:
    return not (
        _is_grad_enabled()
        or _transforms_active()
        or forward_ad._current_level >= 0
        or _dispatch_modes()
        or _is_compiling()
        or type(grad) is not Tensor
    )


class Normalize(Function):
    """x by its own statistics; the running ones move towards them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Any, bias: Any, running: Any, spec: Any) -> Any:
        y, statistics = _forward(x, weight, bias, *spec[:4], *running)
        ctx.save_for_backward(x, weight, statistics)
        ctx.spec = spec
        return y

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        if not _backward_is_plain(grad):
            return *_pull_back(ctx, grad), None, None
        x, weight, statistics = ctx.saved_tensors
        grad_x, grad_weight, grad_bias = _backward(grad, x, statistics, weight, *ctx.spec)
        return grad_x, grad_weight, grad_bias, None, None


class NormalizeFixed(Function):
    """x by given statistics."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Any, bias: Any, mean: Any, var: Any, eps: float, spec: Any
    ) -> Any:
        y, statistics = _apply(x, mean, var, weight, bias, eps, True)
        ctx.save_for_backward(x, weight, statistics)
        ctx.spec = spec
        return y

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        if not _backward_is_plain(grad):
            return *_pull_back(ctx, grad), None, None, None, None
        x, weight, statistics = ctx.saved_tensors
        grad_x, grad_weight, grad_bias = _backward(grad, x, statistics, weight, *ctx.spec)
        return grad_x, grad_weight, grad_bias, None, None, None, None


# Function.apply without what it does for function transforms, which are not for this way
_normalize = super(Function, Normalize).apply  # type: ignore[misc]
_normalize_fixed = super(Function, NormalizeFixed).apply  # type: ignore[misc]
