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

# Which values share a statistic, in one number (csrc/eager.cpp), because each scalar's way through
# the dispatcher takes time; the low bits say which gradients are wanted.
BATCH = 0
_NEEDS = NEEDS_INPUT | NEEDS_WEIGHT | NEEDS_BIAS
_FIXED, _UNCENTRED = 8, 16
INSTANCE = 32


def group(num_groups: int) -> int:
    return num_groups << 16


def layer(normalized_dims: int) -> int:
    return 1 << 16 | normalized_dims << 8


def rms(normalized_dims: int) -> int:
    return layer(normalized_dims) | _UNCENTRED


# looked up once: every one of them is asked in every call
_is_compiling = torch.compiler.is_compiling
_is_grad_enabled = torch.is_grad_enabled
_transforms_active = torch._C._are_functorch_transforms_active
_dispatch_modes = torch._C._len_torch_dispatch_stack
_forward = operators.eager_forward._op
_forward_running = operators.eager_forward_running._op
_apply = operators.eager_apply._op
_backward = operators.eager_backward._op
# what is refused here, the long way words
_REFUSED = (RuntimeError, TypeError, AttributeError)


def _call(
    op: Any, x: Tensor, weight: Any, bias: Any, statistics: tuple[Any, ...], form: int, eps: float
) -> Tensor | None:
    # in one piece: each call of Python's is a twentieth of the whole
    if (
        _is_compiling()
        or type(x) is not Tensor
        or not x.is_cpu
        or has_torch_function_variadic(x, weight, bias, *statistics)
        or _transforms_active()
        or forward_ad._current_level >= 0
        or _dispatch_modes()
        or NATIVE is None
    ):
        return None
    try:
        if _is_grad_enabled():
            if x.requires_grad:
                form |= NEEDS_INPUT
            if weight is not None and weight.requires_grad:
                form |= NEEDS_WEIGHT
            if bias is not None and bias.requires_grad:
                form |= NEEDS_BIAS
        made = op(x, weight, bias, *statistics, form, eps)
    except _REFUSED:
        return None
    return _attach(x, weight, bias, made) if form & _NEEDS else made[0]  # type: ignore[no-any-return]


def normalize(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, form: int, eps: float
) -> Tensor | None:
    """x by its own statistics; or None."""
    return _call(_forward, x, weight, bias, (), form, eps)


def normalize_tracked(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    form: int,
    eps: float,
) -> Tensor | None:
    """x by its own statistics, towards which the running ones move; or None."""
    factor = nan if momentum is None else momentum
    running = running_mean, running_var, num_batches_tracked, factor
    return _call(_forward_running, x, weight, bias, running, form, eps)


def normalize_fixed(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, eps: float
) -> Tensor | None:
    """x (N, C, *) by given statistics, one mean and variance per channel; or None."""
    return _call(_apply, x, weight, bias, (mean, var), _FIXED, eps)


def _pull_back(x: Tensor, weight: Tensor | None, record: Tensor, grad: Tensor) -> autograd.Grads:
    """Gradients of (x, weight, bias) by the long way, which can be differentiated and transformed."""
    eps, number = record[-2:].tolist()
    form = int(number)
    mean, var = record[:-2].view(2, -1)
    num_groups = x.shape[1] if form & INSTANCE else form >> 16
    axes = Axes(num_groups, form >> 8 & 0xFF, not form & _UNCENTRED)
    saved = x, weight, mean, var
    return autograd.pull_back(saved, (axes, eps, bool(form & _FIXED)), grad, form & _NEEDS)


class Normalize(Function):
    """The graph's node for what an operator has made: (y, record). A tuple is no input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Any, bias: Any, made: tuple[Tensor, Tensor]) -> Any:
        ctx.save_for_backward(x, weight)
        # neither input nor output: as a saved tensor it would be copied twice, for 2 µs
        y, ctx.record = made
        return y

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        x, weight = ctx.saved_tensors
        if (
            _is_grad_enabled()
            or type(grad) is not Tensor
            or _transforms_active()
            or forward_ad._current_level >= 0
            or _dispatch_modes()
            or _is_compiling()
        ):
            grad_x, grad_weight, grad_bias = _pull_back(x, weight, ctx.record, grad)
        else:
            grad_x, grad_weight, grad_bias = _backward(grad, x, ctx.record, weight)
        return grad_x, grad_weight, grad_bias, None


# Function.apply without what it does for function transforms, which are not for this way
_attach = super(Function, Normalize).apply  # type: ignore[misc]
# and the same of the backward: torch's own `apply` looks for the function to call
Normalize._backward_cls.apply = Normalize.backward
