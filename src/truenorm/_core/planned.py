"""The short way of CUDA tensors: what a call comes to is worked out once, and then made again.

A small input's time is all Python there. What it does follows from the form, and from the sizes,
strides, dtypes, devices and addresses of the tensors, so it is kept under these: a plan holds the
memory to ask for and the launches (_triton/replay.py). The first call of a kind is served by the
operators' kernels, which look at every argument, while a recorder looks on. A kind that takes more
than launches, such as one whose input is copied first, has no plan and goes the long way, as does
all that is not in order.

The conditions are those of eager.py, which has asked them where `call` is called.
"""

from __future__ import annotations

from math import nan
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from .. import _triton
from .._triton.config import CALLS
from . import geometry, gradients, modulation
from .by_plan import NEW, PLAIN, REFUSED, apart, keep, kernel, kind, recorder
from .call import (
    ACT,
    BY_OUTPUT,
    CONSTANT,
    FEATURES,
    GROUPS,
    KEEP,
    NEEDS_BIAS,
    NEEDS_INPUT,
    NEEDS_RESIDUAL,
    NEEDS_WEIGHT,
    ONE_PLUS,
    PER_CHANNEL,
    form_of,
)

_is_compiling = torch.compiler.is_compiling
_is_grad_enabled = torch.is_grad_enabled
_transforms_active = torch._C._are_functorch_transforms_active
_dispatch_modes = torch._C._len_torch_dispatch_stack
_below_autograd = torch._C._AutoDispatchBelowAutograd
_NEEDS = NEEDS_INPUT | NEEDS_WEIGHT | NEEDS_BIAS | NEEDS_RESIDUAL


def call(
    x: Tensor, weight: Any, bias: Any, form: int, eps: float, statistics: tuple[Any, ...],
    after: tuple[Any, ...] | None, parts: bool = False,
) -> Tensor | None:  # fmt: skip
    """What `eager.call` is asked for; None where this is not for it, or not in order.

    parts: whether weight and bias have a row for each part of the samples.
    """
    residual, parameter, momentum, passes_on = None, 0.0, None, False
    if after is not None and len(after) == 5:
        return modulated(x, weight, bias, form, eps, statistics, after)
    try:
        if statistics and (statistics[0].requires_grad or statistics[1].requires_grad):
            return None
        grad = _is_grad_enabled()
        if grad:
            if x.requires_grad:
                form |= NEEDS_INPUT
            if weight is not None and weight.requires_grad:
                form |= NEEDS_WEIGHT
            if bias is not None and bias.requires_grad:
                form |= NEEDS_BIAS
        kinds: Any = kind(x), kind(weight), kind(bias)
        if parts:
            # elsewhere such a weight is an error
            kinds = *kinds, parts
        if after is None and not statistics:
            given: tuple[Any, ...] = x, weight, bias
            key: Any = form, eps, kinds
        else:
            if after is not None:
                residual, act, parameter = after
                form |= act << ACT
                if grad and residual is not None and residual.requires_grad:
                    passes_on = not act
                    form |= NEEDS_RESIDUAL * (act > 0)
                if act and form & _NEEDS and gradients.saves_output(act, parameter, residual):
                    form |= BY_OUTPUT
            if len(statistics) == 4:
                momentum, statistics = statistics[-1], statistics[:-1]
                if momentum != momentum and statistics[2] is not None:
                    # one object: no other is equal to it in a key
                    momentum = nan
                elif not 0.0 <= momentum <= 1.0:
                    # a layer's to word
                    return None
            given = x, weight, bias, residual, *statistics
            # 0.0 and -0.0 are alike to a dictionary
            rest = float(parameter).hex(), momentum, kind(residual)
            key = form, eps, kinds, rest, *map(kind, statistics)
        plan = CALLS.get(key, NEW)
        if plan is None:
            return None
        if plan is NEW:
            first = _forward(key, given, form, eps, parameter, momentum, parts)
            if first is None:
                return None
            y, record = first
        else:
            y, record = plan(*given)
    except REFUSED:
        return None
    if form & _NEEDS or passes_on:
        made = y, record, form, eps, parameter, passes_on
        return _attach(x, weight, bias, residual, made)  # type: ignore[no-any-return]
    return y


def modulated(
    x: Tensor, weight: Any, bias: Any, form: int, eps: float, statistics: tuple[Any, ...],
    after: tuple[Any, ...],
) -> Tensor | None:  # fmt: skip
    """With scale and shift where the long way has them: in weight and bias, or after the norm."""
    residual, act, parameter, *pair = after
    features, large = form >> FEATURES & 0xFF, False
    try:
        for t in pair:
            if t is None:
                continue
            if type(t) not in PLAIN or t.device != x.device or not t.is_floating_point():
                return None
            if not modulation.fits(t, x, features):
                return None
            large = large or 2 * t.numel() > x.numel()
        beside = None if residual is None and not act else (residual, act, parameter)
        found = modulation.parameters_of(x, features, weight, bias, (pair[0], pair[1]))
        if found is not None:
            if features and not geometry.are_in_order(x, 0, x.dim() - features):
                x = x.contiguous()
            form |= ONE_PLUS * found.one_plus
            return call(x, found.weight, found.bias, form, eps, statistics, beside, True)
        # before a running statistic moves
        if residual is not None and (
            kind(residual)[2:4] != (x.dtype, x.device) or residual.shape != x.shape
        ):
            return None
        narrow = x.itemsize < 4 and not large and x.is_floating_point()
        y = call(x.float() if narrow else x, weight, bias, form, eps, statistics, None)
        if y is None:
            return None
        scale, shift = (modulation.shaped(t, x, features) for t in pair)
        y = modulation.applied(y, scale, shift, residual, act, parameter)
        return y.to(x.dtype) if narrow else y
    except REFUSED:
        return None


def _fits(given: tuple[Any, ...], form: int, eps: Any, parts: bool) -> bool:
    """Whether this is for the operators as it is; the rest is a layer's to word."""
    x, *parameters = given[:3]
    features = form >> FEATURES & 0xFF
    if type(eps) is not float or (form & CONSTANT and any(s is None for s in given[4:])):
        return False
    if any(p is not None and p.dim() != max(features, 1) + parts for p in parameters):
        return False
    if not features and x.dim() < 2:
        return False
    if not (features or form & CONSTANT):
        channels = x.shape[1]
        groups = channels if form & PER_CHANNEL else form >> GROUPS
        if x.numel() == (x.shape[0] * groups or channels):
            return False
    from .._triton import host

    return host.serves(x)


def _forward(
    key: Any, given: tuple[Any, ...], form: int, eps: float, parameter: float, momentum: Any,
    parts: bool,
) -> tuple[Tensor, Any] | None:  # fmt: skip
    """(y, the record if it is wanted) of a first call; None where this is not for the kernels."""
    if _triton.why_plain(given[0].device.index or 0) or not _fits(given, form, eps, parts):
        return None
    given = apart(given)
    x, weight, bias, *others = given
    residual, statistics = (others[0], others[1:]) if others else (None, [])
    moving = momentum is not None
    mean, var = (None, None) if moving or not statistics else statistics
    keeps = form & _NEEDS
    bits = form & ~(_NEEDS | BY_OUTPUT) | KEEP * bool(keeps or moving)
    norm, move = kernel("norm"), kernel("move_")
    with _below_autograd(), recorder(given) as recording:
        args = weight, bias, None, residual, mean, var, bits, eps, parameter, 0.0
        y, record = norm(x, *args)
        if moving:
            move(*statistics, record, None if momentum is nan else momentum, False)
    wanted = record if keeps else None
    keep(key, recording.plan((y,), (wanted,)))
    return y, wanted


class Norm(Function):
    """The graph's node for what a plan has made. In a tuple, or y would be an input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Any, bias: Any, residual: Any, made: Any) -> Any:
        y, *ctx.kept = made
        form = ctx.kept[1]
        if form >> ACT & 0xFF:
            ctx.save_for_backward(x, weight, bias, y if form & BY_OUTPUT else residual)
        else:
            # the record is neither input nor output: as a saved tensor it would be copied twice
            ctx.save_for_backward(x, weight)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        saved = ctx.saved_tensors
        record, form, eps, parameter, passes_on = ctx.kept
        found: Any = None
        if not form & _NEEDS:
            found = None, None, None, None
        elif not (
            # first: the compiler looks no further
            _is_compiling()
            or _is_grad_enabled()
            or type(grad) is not Tensor
            or _transforms_active()
            or forward_ad._current_level >= 0
            or _dispatch_modes()
        ):
            found = _backward(grad, record, form, eps, parameter, *saved)
        if found is None:
            x, weight, bias, residual = saved if len(saved) == 4 else (*saved, None, None)
            whole = form_of(form, x, eps, parameter)
            tensors = grad, x, weight, bias, residual, record
            found = gradients.pull_back(whole, form & (_NEEDS | BY_OUTPUT), *tensors)
        of_x, of_weight, of_bias, of_residual = found
        return of_x, of_weight, of_bias, grad if passes_on else of_residual, None


def _backward(
    grad: Tensor, record: Tensor, form: int, eps: float, parameter: float, x: Tensor, weight: Any,
    *others: Any,
) -> Any:  # fmt: skip
    """The gradients; None where this is not for a plan."""
    given = grad, x, record, weight, *others
    try:
        # a record is the forward plan's, whose size and place are known
        key: Any = "backward", form, eps, kind(grad), kind(x), kind(weight)
        if others:
            key = *key, float(parameter).hex(), *map(kind, others)
        plan: Any = CALLS.get(key, NEW)
        if plan is None:
            return None
        if plan is not NEW:
            return plan(*given)
        given = apart(given)
        grad, x, record, weight = given[:4]
        bias, residual = given[4:] or (None, None)
        run = kernel("norm_backward")
        with _below_autograd(), recorder(given) as recording:
            numbers = form, eps, parameter
            made = run(grad, x, record, weight, bias, None, residual, None, *numbers)
        wanted = [
            g if form & flag else None
            for g, flag in zip(
                made, (NEEDS_INPUT, NEEDS_WEIGHT, NEEDS_BIAS, NEEDS_RESIDUAL), strict=True
            )
        ]
        keep(key, recording.plan(wanted))
        return wanted
    except REFUSED:
        return None


# Function.apply without what it does for function transforms, which are not for this way
_attach: Any = super(Function, Norm).apply
