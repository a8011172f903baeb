"""The short way: a plain eager call on a CPU, in as few steps as can be.

A small input's time is all calls: of torch's dispatcher, of Python. So here a whole forward, the
running statistics' update included, is one call of an operator, and so is a backward. What is not
plain (compiling, function transforms, dispatch modes, subclasses, other devices) or not in order (a
shape that does not fit) is not for this way: `call` returns None before anything has changed,
and the caller goes the long way, which serves the rest and words every error.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad
from torch.jit import _trace
from torch.overrides import has_torch_function_variadic

from . import gradients, operators
from .call import NEEDS_BIAS, NEEDS_INPUT, NEEDS_WEIGHT, Form
from .geometry import Axes
from .library import NATIVE

# what to call, with (), (running_mean, running_var, num_batches_tracked, momentum), (mean, var)
OWN = operators.eager_forward._op
TRACKED = operators.eager_forward_running._op
GIVEN = operators.eager_apply._op

# Which values share a statistic, in one number (csrc/eager.cpp), because each scalar's way through
# the dispatcher takes time; the low bits say which gradients are wanted.
BATCH = 0
_NEEDS = NEEDS_INPUT | NEEDS_WEIGHT | NEEDS_BIAS
FIXED, _UNCENTRED = 8, 16
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
_backward = operators.eager_backward._op
_is_tracing = torch._C._is_tracing
# other than -1 where a batch may be computed again, which moves no running statistics
graph_task = torch._C._current_graph_task_id
# what is refused here, the long way words
_REFUSED = (RuntimeError, TypeError, AttributeError)


def call(
    op: Any, x: Tensor, weight: Any, bias: Any, statistics: tuple[Any, ...], form: int, eps: float
) -> Tensor | None:
    """One of the operators above on a plain tensor x, not compiling: both asked by the caller."""
    # in one piece: each call of Python's is noticed
    if (
        not x.is_cpu
        or has_torch_function_variadic(x, weight, bias, *statistics)
        or _transforms_active()
        or forward_ad._current_level >= 0
        or _dispatch_modes()
        or _is_tracing()
        or _trace._trace_module_map is not None  # see route.tracing
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
    y, record = made
    if form & _NEEDS:
        return _attach(x, weight, bias, (y, record, form, eps))  # type: ignore[no-any-return]
    return y  # type: ignore[no-any-return]


def _pull_back(x: Tensor, weight: Tensor | None, kept: Any, grad: Tensor) -> list[Any]:
    """Gradients of (x, weight, bias), in a way that can itself be differentiated."""
    record, form, eps = kept
    moments = record[:-2].view(2, -1)
    num_groups = x.shape[1] if form & INSTANCE else form >> 16
    axes = Axes(num_groups, form >> 8 & 0xFF, not form & _UNCENTRED)
    count = moments.new_full((1, moments.shape[1]), x.numel() // moments.shape[1])
    whole = Form(axes, eps, bool(form & FIXED)), x, weight, torch.cat([moments, count])
    return gradients.pull_back(*whole, grad, form & _NEEDS)


class Normalize(Function):
    """The graph's node for what an operator has made. In a tuple, or y would be an input."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Any, bias: Any, made: tuple[Tensor, Tensor, int, float]
    ) -> Any:
        ctx.save_for_backward(x, weight)
        y, record, form, eps = made
        # the record is neither input nor output: as a saved tensor it would be copied twice
        ctx.kept = record, form, eps
        return y

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        x, weight = ctx.saved_tensors
        if (
            # first: the compiler looks no further
            _is_compiling()
            or _is_grad_enabled()
            or type(grad) is not Tensor
            or _transforms_active()
            or forward_ad._current_level >= 0
            or _dispatch_modes()
        ):
            grad_x, grad_weight, grad_bias = _pull_back(x, weight, ctx.kept, grad)
        else:
            grad_x, grad_weight, grad_bias = _backward(grad, x, ctx.kept[0], weight)
        return grad_x, grad_weight, grad_bias, None


# Function.apply without what it does for function transforms, which are not for this way
_attach: Any = super(Function, Normalize).apply
