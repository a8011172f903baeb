"""Gradients of the operators, and gradients of those.

First derivatives are a kernel. Second ones differentiate the plain formula of the first, so that
third and higher ones follow by themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from .. import _checks, _plain
from .._axes import BATCH, Axes
from . import operators, route
from .operators import NEEDS_BIAS, NEEDS_INPUT, NEEDS_WEIGHT
from .route import transformed

Grads = tuple[Tensor | None, ...]
# below autograd, an operator's call goes straight to its kernel
_below_autograd = torch._C._AutoDispatchBelowAutograd


class Running(NamedTuple):
    """Running statistics to update, and how."""

    mean: Tensor
    var: Tensor
    num_batches_tracked: Tensor | None
    momentum: float | None
    # whether a batch whose statistics are not finite leaves them where they are
    skip_nonfinite: bool = False
    # where the batch's moments are gathered instead, until `accumulate` ends
    gathered: Any = None


def track(
    running: Running, x: Tensor, mean: Tensor, var: Tensor, count: Tensor | None = None
) -> None:
    """Move running statistics towards a batch's, once: not where a batch is computed again.

    count: how many values each statistic spans, where that is not what x's shape says; one that is
    0 leaves the statistics where they are.
    """
    moving = *running[:3], x, mean, var, count, running.momentum, running.skip_nonfinite
    if route.standard():
        _checks.check_not_accumulating(running.gathered is not None)
        values = x.numel() // mean.numel() if count is None else count
        # that no gradient was asked for is not part of a trace
        seen = mean.detach(), var.detach()
        skip = running.skip_nonfinite
        _plain.move_running(*running[:3], *seen, values, running.momentum, skip_nonfinite=skip)
    elif running.gathered is not None:
        if torch.compiler.is_compiling() or not operators.within_backward():
            values = x.numel() // mean.numel() if count is None else count
            running.gathered.add(mean, var, values, running.mean.numel(), running.skip_nonfinite)
    elif torch.compiler.is_compiling():
        operators.track(*moving)
    else:
        operators.track_once(*moving)


def _differentiate(
    gradients: Callable[..., Sequence[Tensor]], inputs: Grads, incoming: Grads
) -> Grads:
    """Pull `incoming` back through gradients(*inputs), in a way that is itself differentiable."""
    with torch.enable_grad():
        # views, so that one tensor passed as two inputs counts as two
        views = [i.view_as(i) if i is not None and i.requires_grad else i for i in inputs]
        outputs = gradients(*views)
        used = [
            (output, grad.reshape(output.shape).to(output.dtype))
            for output, grad in zip(outputs, incoming, strict=True)
            if grad is not None and output.requires_grad
        ]
    wanted = [v for v in views if v is not None and v.requires_grad]
    found: Sequence[Tensor | None] = [None] * len(wanted)
    if used and wanted:
        found = torch.autograd.grad(
            [output for output, _ in used],
            wanted,
            [grad for _, grad in used],
            create_graph=torch.is_grad_enabled(),
            allow_unused=True,
        )
    remaining = iter(found)
    return tuple(next(remaining) if v is not None and v.requires_grad else None for v in views)


def _backward_again(saved: Grads, spec: Any, incoming: Grads) -> Grads:
    """Gradients of (grad, x, weight) through the backward kernel."""
    grad, x, mean, var, weight = saved
    axes, eps, fixed, needs = spec
    assert mean is not None and var is not None

    def gradients(grad: Tensor, x: Tensor, weight: Tensor | None) -> Sequence[Tensor]:
        # mean and var are functions of x here, unless fixed
        m, v = (mean, var) if fixed else _plain.moments(x, axes)
        return _plain.backward(grad, x, m, v, weight, axes, eps, fixed=fixed)

    asked = tuple(g if needs & 1 << i else None for i, g in enumerate(incoming))
    return _differentiate(gradients, (grad, x, weight), asked)


class _Backward(Function):
    """The backward kernel, differentiable."""

    @staticmethod
    def forward(
        ctx: Any, mean: Tensor, var: Tensor, spec: Any, grad: Tensor, x: Tensor, weight: Any
    ) -> Any:
        axes, eps, fixed, needs = spec
        ctx.save_for_backward(grad, x, mean, var, weight)
        ctx.spec = spec
        ctx.set_materialize_grads(False)
        with _below_autograd():
            return operators.backward._op(grad, x, mean, var, weight, *axes, eps, fixed, needs)

    @staticmethod
    def backward(ctx: Any, *incoming: Any) -> Any:
        return None, None, None, *_backward_again(ctx.saved_tensors, ctx.spec, incoming)


def _save(
    ctx: Any, x: Tensor, weight: Any, bias: Any, mean: Tensor, var: Tensor, *spec: Any
) -> None:
    """What every norm saves: the input as it is, its statistics, and the weight."""
    ctx.save_for_backward(x, weight, mean, var)
    ctx.spec = spec
    ctx.bias_dtype = None if bias is None else bias.dtype


def pull_back(saved: Any, spec: Any, grad: Tensor, needs: int) -> Grads:
    """Gradients of (x, weight, bias), in their shapes, the parameters' both in weight's dtype."""
    x, weight, mean, var = saved
    axes, eps, fixed = spec
    found: Any
    if torch.compiler.is_compiling():
        found = operators.backward(grad, x, mean, var, weight, *axes, eps, fixed, needs)
    elif transformed(grad, x, weight):
        m, v = (mean, var) if fixed else _plain.moments(x, axes)
        gradients = _plain.backward(grad, x, m, v, weight, axes, eps, fixed=fixed)
        shape, dtype = operators.parameter_like(x, weight, axes.feature_dims)
        found = gradients[0], *(g.view(shape).to(dtype) for g in gradients[1:])
    elif torch.is_grad_enabled():
        found = _Backward.apply(mean, var, (axes, eps, fixed, needs), grad, x, weight)  # type: ignore[no-untyped-call]
    else:
        with _below_autograd():
            found = operators.backward._op(grad, x, mean, var, weight, *axes, eps, fixed, needs)
    grad_x, grad_weight, grad_bias = found
    return (
        grad_x if needs & NEEDS_INPUT else None,
        grad_weight if needs & NEEDS_WEIGHT else None,
        grad_bias if needs & NEEDS_BIAS else None,
    )


def _pull_back(ctx: Any, grad: Tensor, needs_input_grad: Sequence[bool]) -> Grads:
    """Gradients of (x, weight, bias), in their shapes and dtypes."""
    needs_x, needs_weight, needs_bias = needs_input_grad
    needs = needs_x * NEEDS_INPUT + needs_weight * NEEDS_WEIGHT + needs_bias * NEEDS_BIAS
    grad_x, grad_weight, grad_bias = pull_back(ctx.saved_tensors, ctx.spec, grad, needs)
    if grad_bias is not None and grad_bias.dtype != ctx.bias_dtype:
        grad_bias = grad_bias.to(ctx.bias_dtype)
    return grad_x, grad_weight, grad_bias


def normalize_raw(
    axes: Axes, eps: float, running: Running | None, x: Tensor, weight: Any, bias: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, mean and variance, by the kernel alone; `running` moves towards them."""
    with _below_autograd():
        y, mean, var = operators.forward._op(x, weight, bias, *axes, eps)
        if running is not None:
            track(running, x, mean, var)
    return y, mean, var


def apply_raw(eps: float, mean: Tensor, var: Tensor, x: Tensor, weight: Any, bias: Any) -> Tensor:
    """Output for given statistics, by the kernel alone."""
    with _below_autograd():
        return operators.apply._op(x, mean, var, weight, bias, eps)  # type: ignore[no-any-return]


class Normalize(Function):
    """x by its own statistics; `running` moves towards them."""

    @staticmethod
    def forward(
        ctx: Any, spec: Any, running: Running | None, x: Tensor, weight: Any, bias: Any
    ) -> Any:
        axes, eps = spec
        y, mean, var = normalize_raw(axes, eps, running, x, weight, bias)
        _save(ctx, x, weight, bias, mean, var, axes, eps, False)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        return None, None, *_pull_back(ctx, grad, ctx.needs_input_grad[2:])


class NormalizeWithStatistics(Function):
    """x by its own statistics: output, mean and variance."""

    @staticmethod
    def forward(ctx: Any, spec: Any, x: Tensor, weight: Any, bias: Any) -> Any:
        axes, eps = spec
        y, mean, var = normalize_raw(axes, eps, None, x, weight, bias)
        _save(ctx, x, weight, bias, mean, var, axes, eps, False)
        ctx.mark_non_differentiable(mean, var)
        return y, mean, var

    @staticmethod
    def backward(ctx: Any, grad: Any, *_: Any) -> Any:
        return None, *_pull_back(ctx, grad, ctx.needs_input_grad[1:])


class NormalizeFixed(Function):
    """x by given statistics."""

    @staticmethod
    def forward(
        ctx: Any, eps: float, mean: Tensor, var: Tensor, x: Tensor, weight: Any, bias: Any
    ) -> Any:
        y = apply_raw(eps, mean, var, x, weight, bias)
        if any(ctx.needs_input_grad):
            # running statistics change in place at the next training step: keep today's values
            mean, var = mean.clone(), var.clone()
        _save(ctx, x, weight, bias, mean, var, BATCH, eps, True)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        return None, None, None, *_pull_back(ctx, grad, ctx.needs_input_grad[3:])


def _response_backward_again(saved: Grads, spec: Any, incoming: Tensor) -> Grads:
    def gradients(grad: Tensor, x: Tensor) -> Sequence[Tensor]:
        return (_plain.local_response_norm_backward(grad, x, *spec),)

    return _differentiate(gradients, saved, (incoming,))


class _ResponseBackward(Function):
    @staticmethod
    def forward(ctx: Any, spec: Any, grad: Tensor, x: Tensor) -> Any:
        ctx.save_for_backward(grad, x)
        ctx.spec = spec
        with _below_autograd():
            return operators.local_response_norm_backward._op(grad, x, *spec)

    @staticmethod
    def backward(ctx: Any, incoming: Any) -> Any:
        return None, *_response_backward_again(ctx.saved_tensors, ctx.spec, incoming)


def _response_pull_back(ctx: Any, grad: Tensor) -> Any:
    (x,) = ctx.saved_tensors
    if torch.compiler.is_compiling():
        return operators.local_response_norm_backward(grad, x, *ctx.spec)
    if transformed(grad, x):
        return _plain.local_response_norm_backward(grad, x, *ctx.spec)
    if torch.is_grad_enabled():
        return _ResponseBackward.apply(ctx.spec, grad, x)  # type: ignore[no-untyped-call]
    with _below_autograd():
        return operators.local_response_norm_backward._op(grad, x, *ctx.spec)


class LocalResponseNorm(Function):
    """x by the energy of its neighbouring channels; spec is (size, alpha, beta, k)."""

    @staticmethod
    def forward(ctx: Any, spec: Any, x: Tensor) -> Any:
        ctx.save_for_backward(x)
        ctx.spec = spec
        with _below_autograd():
            return operators.local_response_norm._op(x, *spec)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        return None, _response_pull_back(ctx, grad)


# ---------------------------------------------------------------- the operators themselves
# The same formulas, for calls of torch.ops.truenorm, as the compiler makes them.


def _register(name: str, setup: Callable[..., None], backward: Callable[..., Any]) -> None:
    torch.library.register_autograd(f"truenorm::{name}", backward, setup_context=setup)


def _setup_forward(ctx: Any, inputs: Any, output: Any) -> None:
    x, weight, bias, *axes, eps = inputs
    _, mean, var = output
    ctx.mark_non_differentiable(mean, var)
    _save(ctx, x, weight, bias, mean, var, Axes(*axes), eps, False)


def _forward_backward(ctx: Any, grad: Any, *_: Any) -> Any:
    return *_pull_back(ctx, grad, ctx.needs_input_grad[:3]), None, None, None, None


def _setup_apply(ctx: Any, inputs: Any, output: Any) -> None:
    x, mean, var, weight, bias, eps = inputs
    _save(ctx, x, weight, bias, mean, var, BATCH, eps, True)


def _apply_backward(ctx: Any, grad: Any) -> Any:
    x, _, _, weight, bias, _ = ctx.needs_input_grad
    grad_x, grad_weight, grad_bias = _pull_back(ctx, grad, (x, weight, bias))
    return grad_x, None, None, grad_weight, grad_bias, None


def _setup_backward(ctx: Any, inputs: Any, output: Any) -> None:
    grad, x, mean, var, weight, *axes, eps, fixed, needs = inputs
    ctx.save_for_backward(grad, x, mean, var, weight)
    ctx.spec = Axes(*axes), eps, fixed, needs


def _backward_backward(ctx: Any, *incoming: Any) -> Any:
    grad, x, weight = _backward_again(ctx.saved_tensors, ctx.spec, incoming)
    return grad, x, None, None, weight, *[None] * 6


def _setup_response(ctx: Any, inputs: Any, output: Any) -> None:
    x, *ctx.spec = inputs
    ctx.save_for_backward(x)


def _response_backward(ctx: Any, grad: Any) -> Any:
    return _response_pull_back(ctx, grad), *[None] * 4


def _setup_response_backward(ctx: Any, inputs: Any, output: Any) -> None:
    grad, x, *ctx.spec = inputs
    ctx.save_for_backward(grad, x)


def _response_backward_backward(ctx: Any, incoming: Any) -> Any:
    return *_response_backward_again(ctx.saved_tensors, ctx.spec, incoming), *[None] * 4


_register("forward", _setup_forward, _forward_backward)
_register("apply", _setup_apply, _apply_backward)
_register("backward", _setup_backward, _backward_backward)
_register("local_response_norm", _setup_response, _response_backward)
_register("local_response_norm_backward", _setup_response_backward, _response_backward_backward)
