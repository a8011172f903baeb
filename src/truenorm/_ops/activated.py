"""Gradients of the operators with an activation and a residual, and what functional.py calls.

The backward pass makes norm(x) + residual again from the input, so that nothing is saved beyond
what norm and residual are made of: not the activation's input, and not its output.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import Function
from torch.overrides import has_torch_function_variadic

from .. import _plain
from .._axes import BATCH, Axes
from . import activation, autograd, recomputed, route
from .activation import (
    BY_OUTPUT,
    LEAKY_RELU,
    NEEDS_RESIDUAL,
    RELU,
    RELU6,
    Epilogue,
    act_backward,
    apply_act,
    apply_act_,
    backward_act,
    forward_act,
    forward_act_,
)
from .autograd import Grads, Running
from .operators import NEEDS_BIAS, NEEDS_INPUT, NEEDS_WEIGHT


def _gradients(
    grad: Tensor,
    leaves: Grads,
    statistics: tuple[Tensor, Tensor] | None,
    axes: Axes,
    eps: float,
    after: Epilogue,
) -> Grads:
    """Gradients of x, weight, bias, residual, as differentiable functions of these and of grad."""
    differentiable = torch.is_grad_enabled()
    with torch.enable_grad():
        # views, so that one tensor passed as two inputs counts as two
        views = [
            t if t is None else t.view_as(t) if t.requires_grad else t.detach().requires_grad_()
            for t in leaves
        ]
        x, weight, bias, residual = views
        assert x is not None
        m, v = _plain.moments(x, axes) if statistics is None else statistics
        after = after._replace(residual=residual)
        y = activation.plain_apply(x, (m, v), weight, bias, axes, eps, after)
        given = [t for t in views if t is not None]
        found = iter(torch.autograd.grad(y, given, grad.to(y.dtype), create_graph=differentiable))
        return tuple(None if t is None else next(found) for t in views)


def _by_output(after: Epilogue) -> bool:
    """Whether y is saved rather than the residual: the next layer saves it too."""
    signed = after.act == RELU or (after.act == LEAKY_RELU and after.parameter > 0)
    if after.act == RELU6 and after.residual is not None:
        # in half precision much of what is below 6 is rounded to 6
        signed = after.residual.element_size() > 2
    return signed and after.residual is not None and not recomputed.asked()


def _save(ctx: Any, x: Tensor, weight: Any, bias: Any, y: Tensor, *rest: Any) -> None:
    mean, var, axes, eps, fixed, after = rest
    # without an activation neither is asked for again
    residual = after.residual if after.act else None
    if by_output := _by_output(after):
        residual = y
    ctx.save_for_backward(x, weight, bias if after.act else None, residual, mean, var)
    ctx.spec = axes, eps, fixed, after._replace(residual=None), by_output
    ctx.bias_dtype = None if bias is None else bias.dtype


def _pull_back(ctx: Any, grad: Tensor, wanted: Sequence[bool]) -> Grads:
    """Gradients of (x, weight, bias, residual), in their shapes and dtypes."""
    axes, eps, fixed, after, by_output = ctx.spec
    x, weight, bias, residual, mean, var = ctx.saved_tensors
    flags = (NEEDS_INPUT, NEEDS_WEIGHT, NEEDS_BIAS, NEEDS_RESIDUAL)
    needs = sum(flag for flag, want in zip(flags, wanted, strict=True) if want)
    again = not torch.compiler.is_compiling() and (
        torch.is_grad_enabled() or route.transformed(grad, x, weight, bias, residual)
    )
    found: list[Tensor | None]
    if not after.act:
        saved = x, weight, mean, var
        of_norm = autograd.pull_back(saved, (axes, eps, fixed), grad, needs & 7)
        found = [*of_norm, grad if wanted[3] else None]
    elif again and by_output:
        # away from the kink the activation is a factor, which has no derivative of its own
        assert residual is not None
        inner = act_backward(grad, residual, after.act, after.parameter)
        of_norm = autograd.pull_back((x, weight, mean, var), (axes, eps, fixed), inner, needs & 7)
        found = [*of_norm, inner if wanted[3] else None]
    elif again:
        given = (mean, var) if fixed else None
        made = _gradients(grad, (x, weight, bias, residual), given, axes, eps, after)
        found = [g if want else None for g, want in zip(made, wanted, strict=True)]
    else:
        made = _below(
            backward_act,
            *(grad, x, mean, var, weight, bias, residual, *axes, eps, fixed, after.act),
            *(after.parameter, needs | BY_OUTPUT * by_output),
        )
        found = [g if want else None for g, want in zip(made, wanted, strict=True)]
    if found[2] is not None and found[2].dtype != ctx.bias_dtype:
        found[2] = found[2].to(ctx.bias_dtype)
    return tuple(found)


def _below(op: Any, *args: Any) -> Any:
    """A kernel: the operator itself in a graph, else what it calls."""
    if torch.compiler.is_compiling():
        return op(*args)
    with autograd._below_autograd():
        return op._op(*args)


class _Normalize(Function):
    """x by its own statistics; `running` moves towards them."""

    @staticmethod
    def forward(
        ctx: Any, spec: Any, running: Any, x: Tensor, weight: Any, bias: Any, residual: Any
    ) -> Any:
        axes, eps, after = spec
        y, mean, var = _own(x, weight, bias, axes, eps, running, after)
        _save(ctx, x, weight, bias, y, mean, var, axes, eps, False, after)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        return None, None, *_pull_back(ctx, grad, ctx.needs_input_grad[2:])


class _NormalizeFixed(Function):
    """x by given statistics."""

    @staticmethod
    def forward(
        ctx: Any, spec: Any, mean: Any, var: Any, x: Tensor, weight: Any, bias: Any, residual: Any
    ) -> Any:
        eps, after = spec
        y = _below(apply_act, x, mean, var, weight, bias, residual, eps, *after[:2])
        _save(ctx, x, weight, bias, y, mean, var, BATCH, eps, True, after)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        return None, None, None, *_pull_back(ctx, grad, ctx.needs_input_grad[3:])


def _setup_forward(ctx: Any, inputs: Any, output: Any) -> None:
    x, weight, bias, residual, *axes, eps, kind, parameter = inputs
    y, mean, var = output
    ctx.mark_non_differentiable(mean, var)
    after = Epilogue(kind, parameter, residual)
    _save(ctx, x, weight, bias, y, mean, var, Axes(*axes), eps, False, after)


def _forward_backward(ctx: Any, grad: Any, *_: Any) -> Any:
    return *_pull_back(ctx, grad, ctx.needs_input_grad[:4]), *[None] * 6


def _setup_apply(ctx: Any, inputs: Any, output: Any) -> None:
    x, mean, var, weight, bias, residual, eps, kind, parameter = inputs
    after = Epilogue(kind, parameter, residual)
    _save(ctx, x, weight, bias, output, mean, var, BATCH, eps, True, after)


def _apply_backward(ctx: Any, grad: Any) -> Any:
    x, _, _, *others = ctx.needs_input_grad[:6]
    of_x, *rest = _pull_back(ctx, grad, (x, *others))
    return of_x, None, None, *rest, None, None, None


def _setup_backward(ctx: Any, inputs: Any, output: Any) -> None:
    grad, x, mean, var, weight, bias, residual, *spec = inputs
    ctx.save_for_backward(grad, x, mean, var, weight, bias, residual)
    ctx.set_materialize_grads(False)
    ctx.spec = spec


def _backward_backward(ctx: Any, *incoming: Any) -> Any:
    grad, x, mean, var, weight, bias, residual = ctx.saved_tensors
    *axes, eps, fixed, kind, parameter, needs = ctx.spec
    given = (mean, var) if fixed else None
    by_output = bool(needs & BY_OUTPUT)

    def gradients(grad: Tensor, *leaves: Any) -> Any:
        if by_output:
            x, weight, _, y = leaves
            inner = act_backward(grad, y, kind, parameter)
            m, v = (mean, var) if fixed else _plain.moments(x, Axes(*axes))
            made = _plain.backward(inner, x, m, v, weight, Axes(*axes), eps, fixed=fixed)
            return *made, inner
        found = _gradients(grad, leaves, given, Axes(*axes), eps, Epilogue(kind, parameter))
        # in the places of those that there are not, something without a gradient
        return tuple(x.new_zeros(()) if g is None else g for g in found)

    asked = tuple(g if needs & 1 << i else None for i, g in enumerate(incoming))
    of_grad, of_x, *rest = autograd._differentiate(
        gradients, (grad, x, weight, bias, residual), asked
    )
    return of_grad, of_x, None, None, *rest, *[None] * 8


autograd._register("forward_act", _setup_forward, _forward_backward)
autograd._register("apply_act", _setup_apply, _apply_backward)
autograd._register("backward_act", _setup_backward, _backward_backward)


# ---------------------------------------------------------------- what functional.py calls


def serves(x: Any, residual: Any, *parameters: Any) -> bool:
    """Whether one pass does it here; else the activation is torch's operator after the norm."""
    return (
        isinstance(x, Tensor)
        and x.device.type == "cpu"
        and x.is_floating_point()
        and (residual is None or residual.dtype == x.dtype)
        and not has_torch_function_variadic(x, residual, *parameters)
        and route.way(x, residual, *parameters) in (route.KERNEL, route.GRAPH)
    )


def _wants_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _overwritten(x: Tensor) -> None:
    # what has saved it for a backward pass is to notice
    if not x.is_inference():
        torch.autograd.graph.increment_version(x)


def _own(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    axes: Axes,
    eps: float,
    running: Running | None,
    after: Epilogue,
) -> tuple[Tensor, Tensor, Tensor]:
    kind, parameter, residual, inplace = after
    args = weight, bias, residual, *axes, eps, kind, parameter
    if inplace and not torch.compiler.is_compiling():
        y = x
        mean, var = _below(forward_act_, x, *args)
        _overwritten(x)
    else:
        y, mean, var = _below(forward_act, x, *args)
    if running is not None:
        if torch.compiler.is_compiling():
            autograd.track(running, x, mean, var)
        else:
            with autograd._below_autograd():
                autograd.track(running, x, mean, var)
    return y, mean, var


def normalize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    axes: Axes,
    eps: float,
    running: Running | None,
    after: Epilogue,
) -> Tensor:
    """act(norm(x) + residual) by x's own statistics."""
    if torch.compiler.is_compiling() or not _wants_gradient(x, weight, bias, after.residual):
        return _own(x, weight, bias, axes, eps, running, after)[0]
    after = after._replace(inplace=False)  # x is asked for again
    y = _Normalize.apply((axes, eps, after), running, x, weight, bias, after.residual)  # type: ignore[no-untyped-call]
    recomputed.remember(y, forward_act, (x, weight, bias, after.residual), (*axes, eps, *after[:2]))
    return cast(Tensor, y)


def normalize_fixed(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    after: Epilogue,
) -> Tensor:
    """act(norm(x) + residual) by given statistics, one mean and variance per channel."""
    kind, parameter, residual, inplace = after
    args = mean, var, weight, bias, residual, eps, kind, parameter
    if torch.compiler.is_compiling():
        return cast(Tensor, apply_act(x, *args))
    if not _wants_gradient(x, weight, bias, residual):
        if not inplace:
            return cast(Tensor, _below(apply_act, x, *args))
        _below(apply_act_, x, *args)
        _overwritten(x)
        return x
    # running statistics change in place at the next training step: keep today's values
    mean, var = mean.clone(), var.clone()
    y = _NormalizeFixed.apply((eps, after), mean, var, x, weight, bias, residual)  # type: ignore[no-untyped-call]
    tensors = x, mean, var, weight, bias, residual
    recomputed.remember(y, apply_act, tensors, (eps, kind, parameter))
    return cast(Tensor, y)
