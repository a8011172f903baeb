"""The operators: schema, plain kernels, shape rule, autograd. The only file that touches torch.ops.

Eager calls go through `torch.autograd.Function` over the operator's raw handle (9 µs a call, against
34 µs through `register_autograd`); the compiler sees the operator itself with the formula registered
below. Function transforms and forward-mode AD are served by the plain, differentiable formulas.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

# the schemas stand here, not in C++: without a native library the plain kernels still need them
from . import (
    _axes,
    _library,  # noqa: F401  (loads the native kernels)
    _plain,
)
from ._axes import BATCH, Axes

_AXES = "int num_groups, int feature_dims, bool centred"
_SCHEMAS = {
    "forward": f"(Tensor x, Tensor? weight, Tensor? bias, {_AXES}, float eps)"
    " -> (Tensor, Tensor, Tensor)",
    "apply": "(Tensor x, Tensor mean, Tensor var, Tensor? weight, Tensor? bias, float eps)"
    " -> Tensor",
    "backward": f"(Tensor grad, Tensor x, Tensor mean, Tensor var, Tensor? weight, {_AXES},"
    " float eps, bool fixed, int needs) -> (Tensor, Tensor, Tensor)",
    "update_running_": "(Tensor(a!) running_mean, Tensor(b!) running_var,"
    " Tensor(c!)? num_batches_tracked, Tensor mean, Tensor var, int count, float? momentum) -> ()",
    "local_response_norm": "(Tensor x, int size, float alpha, float beta, float k) -> Tensor",
    "local_response_norm_backward": "(Tensor grad, Tensor x, int size, float alpha, float beta,"
    " float k) -> Tensor",
}

NEEDS_INPUT, NEEDS_WEIGHT, NEEDS_BIAS = 1, 2, 4

_library_def = torch.library.Library("truenorm", "DEF")
for _name, _schema in _SCHEMAS.items():
    _library_def.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))


# ---------------------------------------------------------------- plain kernels, any device


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
    gradients = _plain.backward(grad, x, mean, var, weight, axes, eps, fixed=fixed)
    return tuple(  # type: ignore[return-value]
        gradient if needs & 1 << i else gradient.new_empty(0)
        for i, gradient in enumerate(gradients)
    )


for _name, _kernel in {
    "forward": _plain_forward,
    "apply": _plain_apply,
    "backward": _plain_backward,
    "update_running_": _plain.update_running,
    "local_response_norm": _plain.local_response_norm,
    "local_response_norm_backward": _plain.local_response_norm_backward,
}.items():
    _library_def.impl(_name, _kernel, "CompositeExplicitAutograd")


# ---------------------------------------------------------------- shape rules, for the compiler


def _statistic_dtype(x: Tensor) -> torch.dtype:
    return torch.float32 if x.device.type == "mps" else torch.float64


@torch.library.register_fake("truenorm::forward")
def _(
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
    mean = x.new_empty(shape, dtype=_statistic_dtype(x))
    return _axes.empty_result(x, axes), mean, torch.empty_like(mean)


@torch.library.register_fake("truenorm::apply")
def _(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    return _axes.empty_result(x, BATCH)


@torch.library.register_fake("truenorm::backward")
def _(
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
    _, channels, _ = _axes.ncs(x.shape, axes)

    def parameter(needed: int) -> Tensor:
        return x.new_empty(channels if needs & needed else 0, dtype=_statistic_dtype(x))

    grad_input = _axes.empty_result(x, axes) if needs & NEEDS_INPUT else x.new_empty(0)
    return grad_input, parameter(NEEDS_WEIGHT), parameter(NEEDS_BIAS)


@torch.library.register_fake("truenorm::update_running_")
def _(*args: Any) -> None:
    return None


@torch.library.register_fake("truenorm::local_response_norm")
def _(x: Tensor, size: int, alpha: float, beta: float, k: float) -> Tensor:
    return _axes.empty_result(x, BATCH)


@torch.library.register_fake("truenorm::local_response_norm_backward")
def _(grad: Tensor, x: Tensor, size: int, alpha: float, beta: float, k: float) -> Tensor:
    return _axes.empty_result(x, BATCH)


_forward = torch.ops.truenorm.forward.default
_apply = torch.ops.truenorm.apply.default
_backward = torch.ops.truenorm.backward.default
_update_running = torch.ops.truenorm.update_running_.default
_lrn = torch.ops.truenorm.local_response_norm.default
_lrn_backward = torch.ops.truenorm.local_response_norm_backward.default


# ---------------------------------------------------------------- autograd


def _needs(*flags: bool) -> int:
    return sum(1 << i for i, flag in enumerate(flags) if flag)


def _differentiate_again(
    gradients: Any, inputs: tuple[Tensor | None, ...], incoming: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, ...]:
    """Pull `incoming` back through gradients(*inputs), plain and itself differentiable."""
    with torch.enable_grad():
        # views, so that one tensor passed as two inputs counts as two
        views = [i.view_as(i) if i is not None and i.requires_grad else i for i in inputs]
        outputs = gradients(*views)
        wanted = [v for v in views if v is not None and v.requires_grad]
        used = [(o, g) for o, g in zip(outputs, incoming, strict=True) if g is not None]
        used = [(o, g.to(o.dtype)) for o, g in used if o.requires_grad]
    found: list[Tensor | None] = [None] * len(wanted)
    if used and wanted:
        found = list(
            torch.autograd.grad(
                [o for o, _ in used],
                wanted,
                [g for _, g in used],
                create_graph=torch.is_grad_enabled(),
                allow_unused=True,
            )
        )
    remaining = iter(found)
    return tuple(next(remaining) if v is not None and v.requires_grad else None for v in views)


def _second_derivative(
    saved: tuple[Tensor | None, ...],
    axes: Axes,
    eps: float,
    fixed: bool,
    incoming: tuple[Tensor | None, ...],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of (grad, x, weight) through the backward of a norm."""
    grad, x, mean, var, weight = saved
    assert mean is not None and var is not None

    def gradients(grad: Tensor, x: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        # mean and var are functions of x here, unless fixed
        m, v = (mean, var) if fixed else _plain.moments(x, axes)
        return _plain.backward(grad, x, m, v, weight, axes, eps, fixed=fixed)

    found = _differentiate_again(gradients, (grad, x, weight), incoming)
    return found[0], found[1], found[2]


class _Backward(torch.autograd.Function):
    """The backward kernel, differentiable."""

    @staticmethod
    def forward(ctx: Any, saved: Any, spec: Any, grad: Tensor, x: Tensor, weight: Any) -> Any:
        mean, var = saved
        axes, eps, fixed, needs = spec
        ctx.save_for_backward(grad, x, mean, var, weight)
        ctx.spec = spec
        ctx.set_materialize_grads(False)
        with torch._C._AutoDispatchBelowAutograd():
            return _backward._op(grad, x, mean, var, weight, *axes, eps, fixed, needs)

    @staticmethod
    def backward(ctx: Any, *incoming: Any) -> Any:
        axes, eps, fixed, needs = ctx.spec
        incoming = tuple(g if needs & 1 << i else None for i, g in enumerate(incoming))
        return None, None, *_second_derivative(ctx.saved_tensors, axes, eps, fixed, incoming)


def _gradients(
    grad: Tensor,
    saved: tuple[Any, ...],
    axes: Axes,
    eps: float,
    fixed: bool,
    needs_input_grad: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, weight and bias, in their dtypes and shapes."""
    x, weight, mean, var, bias_like = saved
    needs = _needs(*needs_input_grad)
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        found = _Backward.apply((mean, var), (axes, eps, fixed, needs), grad, x, weight)
    else:
        found = _backward(grad, x, mean, var, weight, *axes, eps, fixed, needs)
    grad_input, grad_weight, grad_bias = found
    if needs & NEEDS_WEIGHT:
        grad_weight = grad_weight.to(weight.dtype).view(weight.shape)
    if needs & NEEDS_BIAS:
        shape, dtype = bias_like
        grad_bias = grad_bias.to(dtype).view(shape)
    return (
        grad_input if needs & NEEDS_INPUT else None,
        grad_weight if needs & NEEDS_WEIGHT else None,
        grad_bias if needs & NEEDS_BIAS else None,
    )


class Running(NamedTuple):
    """Running statistics to update, and how."""

    mean: Tensor
    var: Tensor
    num_batches_tracked: Tensor | None
    count: int
    momentum: float | None


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, spec: Any, running: Running | None, x: Tensor, weight: Any, bias: Any
    ) -> Tensor:
        axes, eps = spec
        with torch._C._AutoDispatchBelowAutograd():
            y, mean, var = _forward._op(x, weight, bias, *axes, eps)
            if running is not None:
                _update_running._op(
                    running.mean,
                    running.var,
                    running.num_batches_tracked,
                    mean,
                    var,
                    running.count,
                    running.momentum,
                )
        ctx.save_for_backward(x, weight, mean, var)
        ctx.spec = axes, eps, False
        ctx.bias_like = None if bias is None else (bias.shape, bias.dtype)
        return y  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        saved = (*ctx.saved_tensors, ctx.bias_like)
        return None, None, *_gradients(grad, saved, *ctx.spec, ctx.needs_input_grad[2:])


class _NormalizeFixed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, eps: float, mean: Tensor, var: Tensor, x: Tensor, weight: Any, bias: Any
    ) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            y = _apply._op(x, mean, var, weight, bias, eps)
        # running statistics change in place at the next training step: keep today's values
        ctx.save_for_backward(x, weight, mean.clone(), var.clone())
        ctx.spec = BATCH, eps, True
        ctx.bias_like = None if bias is None else (bias.shape, bias.dtype)
        return y  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        saved = (*ctx.saved_tensors, ctx.bias_like)
        return None, None, None, *_gradients(grad, saved, *ctx.spec, ctx.needs_input_grad[3:])


def _register_autograd() -> None:
    """The same formulas for calls of the operators themselves, as the compiler makes them."""

    def setup_forward(ctx: Any, inputs: Any, output: Any) -> None:
        x, weight, bias, num_groups, feature_dims, centred, eps = inputs
        _, mean, var = output
        ctx.mark_non_differentiable(mean, var)
        ctx.save_for_backward(x, weight, mean, var)
        ctx.spec = Axes(num_groups, feature_dims, centred), eps, False
        ctx.bias_like = None if bias is None else (bias.shape, bias.dtype)

    def forward_backward(ctx: Any, grad: Any, *_: Any) -> Any:
        saved = (*ctx.saved_tensors, ctx.bias_like)
        return *_gradients(grad, saved, *ctx.spec, ctx.needs_input_grad[:3]), None, None, None, None

    def setup_apply(ctx: Any, inputs: Any, output: Any) -> None:
        x, mean, var, weight, bias, eps = inputs
        ctx.save_for_backward(x, weight, mean, var)
        ctx.spec = BATCH, eps, True
        ctx.bias_like = None if bias is None else (bias.shape, bias.dtype)

    def apply_backward(ctx: Any, grad: Any) -> Any:
        saved = (*ctx.saved_tensors, ctx.bias_like)
        needs = ctx.needs_input_grad
        found = _gradients(grad, saved, *ctx.spec, (needs[0], needs[3], needs[4]))
        return found[0], None, None, found[1], found[2], None

    def setup_backward(ctx: Any, inputs: Any, output: Any) -> None:
        grad, x, mean, var, weight, *axes, eps, fixed, needs = inputs
        ctx.save_for_backward(grad, x, mean, var, weight)
        ctx.spec = Axes(*axes), eps, fixed, needs

    def backward_backward(ctx: Any, *incoming: Any) -> Any:
        axes, eps, fixed, needs = ctx.spec
        incoming = tuple(g if needs & 1 << i else None for i, g in enumerate(incoming))
        grad, x, weight = _second_derivative(ctx.saved_tensors, axes, eps, fixed, incoming)
        return grad, x, None, None, weight, None, None, None, None, None, None

    def setup_lrn(ctx: Any, inputs: Any, output: Any) -> None:
        x, *spec = inputs
        ctx.save_for_backward(x)
        ctx.spec = spec

    def lrn_backward(ctx: Any, grad: Any) -> Any:
        (x,) = ctx.saved_tensors
        return _lrn_gradient(grad, x, *ctx.spec), None, None, None, None

    def setup_lrn_backward(ctx: Any, inputs: Any, output: Any) -> None:
        grad, x, *spec = inputs
        ctx.save_for_backward(grad, x)
        ctx.spec = spec

    def lrn_backward_backward(ctx: Any, incoming: Any) -> Any:
        return *_lrn_second_derivative(ctx.saved_tensors, ctx.spec, incoming), *[None] * 4

    for name, setup, formula in (
        ("forward", setup_forward, forward_backward),
        ("apply", setup_apply, apply_backward),
        ("backward", setup_backward, backward_backward),
        ("local_response_norm", setup_lrn, lrn_backward),
        ("local_response_norm_backward", setup_lrn_backward, lrn_backward_backward),
    ):
        torch.library.register_autograd(f"truenorm::{name}", formula, setup_context=setup)


class _LrnBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, spec: Any, grad: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(grad, x)
        ctx.spec = spec
        with torch._C._AutoDispatchBelowAutograd():
            return _lrn_backward._op(grad, x, *spec)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, incoming: Any) -> Any:
        return None, *_lrn_second_derivative(ctx.saved_tensors, ctx.spec, incoming)


def _lrn_second_derivative(
    saved: tuple[Tensor, ...], spec: Any, incoming: Tensor
) -> tuple[Tensor | None, ...]:
    def gradients(grad: Tensor, x: Tensor) -> tuple[Tensor]:
        return (_plain.local_response_norm_backward(grad, x, *spec),)

    return _differentiate_again(gradients, saved, (incoming,))


def _lrn_gradient(grad: Tensor, x: Tensor, *spec: Any) -> Tensor:
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _LrnBackward.apply(spec, grad, x)  # type: ignore[no-any-return]
    return _lrn_backward(grad, x, *spec)  # type: ignore[no-any-return]


class _LocalResponseNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, spec: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.spec = spec
        with torch._C._AutoDispatchBelowAutograd():
            return _lrn._op(x, *spec)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        (x,) = ctx.saved_tensors
        return None, _lrn_gradient(grad, x, *ctx.spec)


_register_autograd()


# ---------------------------------------------------------------- what functional.py calls


def _transformed(*tensors: Tensor | None) -> bool:
    """Whether a function transform or forward-mode AD is at work: the plain formulas serve both."""
    if torch._C._are_functorch_transforms_active():
        return True
    if forward_ad._current_level < 0:
        return False
    return any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors)


def _wants_plain(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> bool:
    # empty inputs have no moments, and complex RMSNorm has no kernel
    return x.numel() == 0 or x.is_complex() or _transformed(x, weight, bias)


def normalize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    axes: Axes,
    eps: float,
    running: Running | None = None,
) -> Tensor:
    """Normalize x by its own statistics, and update `running` with them."""
    if torch.compiler.is_compiling() and not _transformed(x, weight, bias) and x.numel():
        y, mean, var = _forward(x, weight, bias, *axes, eps)
        if running is not None:
            _update_running(*running[:3], mean, var, running.count, running.momentum)
        return y  # type: ignore[no-any-return]
    if _wants_plain(x, weight, bias):
        y, mean, var = _plain.forward(x, weight, bias, axes, eps)
        if running is not None:
            _update_plain(x, running, mean, var)
        return y
    return _Normalize.apply((axes, eps), running, x, weight, bias)  # type: ignore[no-any-return]


def _update_plain(x: Tensor, running: Running, mean: Tensor, var: Tensor) -> None:
    with torch.no_grad():
        if x.numel():
            _plain.update_running(*running[:3], mean, var, running.count, running.momentum)
        elif running.num_batches_tracked is not None:
            # as torch: an empty batch counts as a batch and leaves the statistics alone
            running.num_batches_tracked.add_(1)


def normalize_fixed(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    """Normalize x (N, C, *) by given statistics, one mean and variance per channel."""
    if torch.compiler.is_compiling() and not _transformed(x, weight, bias) and x.numel():
        return _apply(x, mean, var, weight, bias, eps)  # type: ignore[no-any-return]
    if _wants_plain(x, weight, bias):
        return _plain.apply(x, mean, var, weight, bias, BATCH, eps)
    return _NormalizeFixed.apply(eps, mean, var, x, weight, bias)  # type: ignore[no-any-return]


def local_response_norm(x: Tensor, size: int, alpha: float, beta: float, k: float) -> Tensor:
    if torch.compiler.is_compiling() and not _transformed(x):
        return _lrn(x, size, alpha, beta, k)  # type: ignore[no-any-return]
    if _transformed(x):
        return _plain.local_response_norm(x, size, alpha, beta, k)
    return _LocalResponseNorm.apply((size, alpha, beta, k), x)  # type: ignore[no-any-return]
