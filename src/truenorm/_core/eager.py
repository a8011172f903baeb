"""The short way: an eager call without a mask, in as few steps as can be.

A small input's time is all calls: of torch's dispatcher, of Python. So here a whole forward, the
running statistics' update included, is one call of an operator, and so is a backward; on CUDA it is
planned.py's. What is not plain (compiling, function transforms, dispatch modes, subclasses, other
devices), is to be made again in the backward pass (recomputed.py) or is not in order (a shape that
does not fit) is not for this way: `call` returns None before anything has changed, and the caller
goes the long way, which serves the rest and words every error.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad
from torch.jit import _trace
from torch.overrides import has_torch_function_variadic

from .._triton import WHY_NOT
from . import fallback, gradients, modulation, operators, planned, recomputed
from .call import (
    ACT,
    BY_OUTPUT,
    FEATURES,
    GROUPS,
    NEEDS_BIAS,
    NEEDS_INPUT,
    NEEDS_RESIDUAL,
    NEEDS_WEIGHT,
    ONE_PLUS,
    PER_CHANNEL,
    ROUNDS,
    UNCENTRED,
    form_of,
)
from .library import NATIVE

# What comes after norm(x) · weight + bias: a residual, an activation's number and its parameter.
# Or, with scale and shift behind these, what comes before all of that: y · (1 + scale) + shift.
After = tuple[Any, ...]
# of an activation's number: that what it is applied to is rounded to x's dtype first
STEPPED = 128

# what to call, with (), (mean, var), (running_mean, running_var, num_batches_tracked, momentum)
OWN = operators.eager_norm._op
GIVEN = operators.eager_norm_given._op
MOVING = operators.eager_norm_more._op

# looked up once: every one of them is asked in every call
_is_compiling = torch.compiler.is_dynamo_compiling
_is_grad_enabled = torch.is_grad_enabled
_transforms_active = torch._C._are_functorch_transforms_active
_dispatch_modes = torch._C._len_torch_dispatch_stack
_norm_backward = operators.eager_norm_backward._op
# torch asks it at each call of a module, so that it is in the caches
_tracing_state = torch._C._get_tracing_state
# other than -1 where a batch may be computed again, which moves no running statistics
graph_task = torch._C._current_graph_task_id
# what is refused here, the long way words
_REFUSED = (RuntimeError, TypeError, AttributeError)
_PLAIN = Tensor, torch.nn.Parameter
_NEEDS = NEEDS_INPUT | NEEDS_WEIGHT | NEEDS_BIAS | NEEDS_RESIDUAL
# statistics that are not given
_UNGIVEN = None, None, None, 0.0

# which values share a statistic, as `Form.bits`
BATCH = 0
INSTANCE = PER_CHANNEL


def group(num_groups: int) -> int:
    return num_groups << GROUPS


def layer(feature_dims: int) -> int:
    return feature_dims << FEATURES


def rms(feature_dims: int) -> int:
    return feature_dims << FEATURES | UNCENTRED


def ends_in(x: Tensor, shape: tuple[int, ...]) -> bool:
    """Whether these are the trailing sizes, of which there are some; an error where x has none."""
    if len(shape) == 1:
        # one size: `shape` would be made first
        return x.size(-1) == shape[0]
    return len(shape) > 0 and x.shape[-len(shape) :] == shape


def call(
    op: Any, x: Tensor, weight: Any, bias: Any, form: int, eps: float, statistics: tuple[Any, ...],
    after: After | None,
) -> Tensor | None:  # fmt: skip
    """One of the operators above on a plain tensor x, not compiling: both asked by the caller."""
    # in one piece: each call of Python's is noticed
    if (
        has_torch_function_variadic(x, weight, bias, *statistics)
        or (recomputed.contexts and recomputed.asked())
        or _transforms_active()
        or forward_ad._current_level >= 0
        or _dispatch_modes()
        or _tracing_state() is not None
        or _trace._trace_module_map is not None  # see route.tracing
    ):
        return None
    if not x.is_cpu:
        if WHY_NOT or not x.is_cuda:
            return None
        return planned.call(x, weight, bias, form, eps, statistics, after)
    if NATIVE is None:
        return fallback.shortly(x, weight, bias, form, eps, statistics, after)
    if after is not None and len(after) == 5:
        return _modulated(op, x, weight, bias, form, eps, statistics, after)
    try:
        if statistics and (statistics[0].requires_grad or statistics[1].requires_grad):
            return None
        if _is_grad_enabled():
            if x.requires_grad:
                form |= NEEDS_INPUT
            if weight is not None and weight.requires_grad:
                form |= NEEDS_WEIGHT
            if bias is not None and bias.requires_grad:
                form |= NEEDS_BIAS
        if after is not None and (after[1] or after[0] is not None):
            return _with_more(x, weight, bias, form, eps, statistics, after)
        y, record = op(x, weight, bias, form, eps, *statistics)
    except _REFUSED:
        return None
    if form & _NEEDS:
        return _attach(x, weight, bias, (y, record, form, eps, 0.0))  # type: ignore[no-any-return]
    return y  # type: ignore[no-any-return]


def is_plain(*tensors: Any) -> bool:
    """Whether nobody transforms, traces or stands in for these tensors."""
    return not (
        has_torch_function_variadic(*tensors)
        or _transforms_active()
        or forward_ad._current_level >= 0
        or _dispatch_modes()
        or _tracing_state() is not None
        or _trace._trace_module_map is not None
    )


def _modulated(
    op: Any, x: Tensor, weight: Any, bias: Any, form: int, eps: float, statistics: tuple[Any, ...],
    after: After,
) -> Tensor | None:  # fmt: skip
    """With scale and shift in weight and bias, or after the norm, where that takes less time."""
    residual, act, parameter, scale, shift = after
    features, numel = form >> FEATURES & 0xFF, x.numel()
    large, seen = False, None
    for t in (scale, shift):
        if t is None:
            continue
        if type(t) not in _PLAIN or not (t.is_cpu and t.is_floating_point()):
            return None
        # mostly both are alike
        if t.shape != seen:
            seen = t.shape
            if not modulation.fits(t, x, features):
                return None
            large = large or 2 * t.numel() > numel
    dims = x.dim()
    if scale is not None and scale.dim() != dims:
        scale = modulation.shaped(scale, x, features)
    if shift is not None and shift.dim() != dims:
        shift = modulation.shaped(shift, x, features)
    if not large and (
        numel >= modulation.SMALL or (weight is None and bias is None and scale is not None)
    ):
        found = modulation.parameters(x, features, weight, bias, (scale, shift))
        if found is None:
            return None
        form |= ONE_PLUS * found.one_plus
        beside = residual, act, parameter
        return call(op, x, found.weight, found.bias, form, eps, statistics, beside)
    # before a running statistic moves
    if residual is not None and (
        type(residual) not in _PLAIN
        or residual.dtype != x.dtype
        or residual.shape != x.shape
        or not residual.is_cpu
    ):
        return None
    narrow = x.itemsize < 4 and not large and x.is_floating_point()
    y = call(op, x.float() if narrow else x, weight, bias, form, eps, statistics, None)
    if y is None:
        return None
    y = modulation.applied(y, scale, shift, residual, act, parameter)
    return y.to(x.dtype) if narrow else y


def _with_more(
    x: Tensor, weight: Any, bias: Any, form: int, eps: float, statistics: tuple[Any, ...],
    after: After,
) -> Tensor | None:  # fmt: skip
    residual, act, parameter = after
    if has_torch_function_variadic(residual):
        return None
    passes_on = False
    if residual is not None and residual.requires_grad and _is_grad_enabled():
        passes_on = not act
        form |= NEEDS_RESIDUAL * (act > 0)
    if act:
        if act & STEPPED:
            act ^= STEPPED
            form |= ROUNDS
        form |= act << ACT
        if form & _NEEDS and gradients.saves_output(act, parameter, residual):
            form |= BY_OUTPUT
    given = *statistics, *_UNGIVEN[len(statistics) :]
    y, record = MOVING(x, weight, bias, form, eps, *given, residual, parameter)
    if form & _NEEDS or passes_on:
        made = y, record, form, eps, parameter
        return _attach(x, weight, bias, made, residual)  # type: ignore[no-any-return]
    return y  # type: ignore[no-any-return]


class Normalize(Function):
    """The graph's node for what an operator has made. In a tuple, or y would be an input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Any, bias: Any, made: Any, *residual: Any) -> Any:
        y, record, form, eps, parameter = made
        if not residual:
            ctx.save_for_backward(x, weight)
        elif form >> ACT & 0xFF:
            ctx.save_for_backward(x, weight, bias, y if form & BY_OUTPUT else residual[0])
        else:
            ctx.save_for_backward(x, weight, None, None)
        # the record is neither input nor output: as a saved tensor it would be copied twice
        ctx.kept = record, form, eps, parameter
        return y

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        saved = ctx.saved_tensors
        if (
            # first: the compiler looks no further
            _is_compiling()
            or _is_grad_enabled()
            or type(grad) is not Tensor
            or _transforms_active()
            or forward_ad._current_level >= 0
            or _dispatch_modes()
        ):
            found = pull_back(ctx.kept, grad, *saved)
        elif len(saved) == 2:
            x, weight = saved
            of_x, of_weight, of_bias, _ = _norm_backward(grad, x, ctx.kept[0], weight)
            return of_x, of_weight, of_bias, None
        elif ctx.kept[1] & _NEEDS:
            x, weight, bias, residual = saved
            found = _norm_backward(grad, x, ctx.kept[0], weight, bias, residual)
        else:
            found = [None, None, None, None]
        if len(saved) == 2:
            return *found[:3], None
        of_residual = found[3] if ctx.kept[1] >> ACT & 0xFF else grad
        return *found[:3], None, of_residual


def pull_back(
    kept: Any, grad: Tensor, x: Tensor, weight: Any, bias: Any = None, residual: Any = None
) -> list[Any]:
    """The gradients, in a way that can itself be differentiated."""
    record, bits, eps, parameter = kept
    if not bits & _NEEDS:
        return [None, None, None, None]
    if bits >> FEATURES & 0xFF and bits >> GROUPS:
        return _pull_back_of_rows(kept, grad, x, weight, bias, residual)
    if record.dim() == 1:  # of the short way
        moments = record[:-3].view(2, -1)
        count = moments.new_full((1, moments.shape[1]), x.numel() // moments.shape[1])
        record = torch.cat([moments, count])
    form = form_of(bits, x, eps, parameter)
    tensors = grad, x, weight, bias, residual, record
    return gradients.pull_back(form, bits & (_NEEDS | BY_OUTPUT), *tensors)


def _pull_back_of_rows(kept: Any, grad: Any, x: Any, *others: Any) -> list[Any]:
    """The same of groups of trailing dimensions, which the formula has of rows."""
    record, bits, *numbers = kept
    features = bits >> FEATURES & 0xFF
    shape = x.shape[x.dim() - features :]
    *parameters, residual = others
    weight, bias = (None if t is None else t.flatten() for t in parameters)
    size = shape.numel()
    beside = None if residual is None else residual.reshape(-1, size)
    same = record, bits & ~(0xFF << FEATURES), *numbers
    found = pull_back(same, grad.reshape(-1, size), x.reshape(-1, size), weight, bias, beside)
    shapes = x.shape, shape, shape, x.shape
    return [g if g is None else g.view(s) for g, s in zip(found, shapes, strict=True)]


# Function.apply without what it does for function transforms, which are not for this way
_attach: Any = super(Function, Normalize).apply
