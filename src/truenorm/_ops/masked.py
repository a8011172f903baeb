"""Normalization over valid positions alone: operators, gradients, and the choice of a path.

A mask is a contiguous boolean tensor (N, *positions), True where a value counts; the plain formulas
also take one of x's own shape, a mask per channel. Statistics are mean, biased variance and the
number of values, one each per statistic; where nothing is valid all three are zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd import Function

from .. import _axes, _plain
from .._axes import Axes
from . import autograd, operators, route
from .operators import NEEDS_BIAS, NEEDS_INPUT, NEEDS_WEIGHT

Three = tuple[Tensor, Tensor, Tensor]


class Masked(NamedTuple):
    """Output, and the statistics that made it."""

    y: Tensor
    mean: Tensor
    var: Tensor
    values: Tensor


# ---------------------------------------------------------------- the plain formulas


def _against(mask: Tensor, x: Tensor, axes: Axes) -> Tensor:
    """The mask against x as (N, G, C / G, S)."""
    n, c, s = _axes.ncs(x.shape, axes)
    if mask.shape == x.shape and mask.dim() > 1 and mask.numel() == n * c * s:
        return _axes.grouped_view(mask, axes)[0]
    return mask.reshape(n, 1, 1, s)


def _statistics(x: Tensor, mask: Tensor, axes: Axes) -> tuple[Tensor, Three]:
    """x without what is not valid, and per statistic mean, variance and count, against it."""
    v, dims = _axes.grouped_view(x, axes)
    valid = _against(mask, x, axes)
    v = torch.where(valid, _plain._wide(v), 0.0)
    count = valid.expand(v.shape).sum(dims, keepdim=True, dtype=v.dtype)
    some = count.clamp(min=1.0)
    mean = v.sum(dims, keepdim=True) / some if axes.centred else torch.zeros_like(count)
    d = torch.where(valid, v - mean, 0.0)
    if axes.centred:
        mean = mean + d.sum(dims, keepdim=True) / some
    d = torch.where(valid, v - mean, 0.0)
    return v, (mean, (d * d).sum(dims, keepdim=True) / some, count)


def _inverse_std(var: Tensor, count: Tensor, eps: float) -> Tensor:
    """1 where nothing is valid, so that an eps of 0 leaves no infinity for a gradient to meet."""
    return torch.rsqrt(torch.where(count > 0, var + eps, 1.0))


def plain_forward(
    x: Tensor,
    mask: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    axes: Axes,
    eps: float,
    padding_value: float,
) -> Masked:
    """y and statistics in plain, differentiable PyTorch."""
    v, (mean, var, count) = _statistics(x, mask, axes)
    y = (v - mean) * _inverse_std(var, count, eps)
    if weight is not None:
        y = y * _plain._per_channel(weight, v)
    if bias is not None:
        y = y + _plain._per_channel(bias, v)
    y = torch.where(_against(mask, x, axes), y, padding_value)
    kept = (each.detach().reshape(-1) for each in (mean, var, count))
    return Masked(_plain._like(y, x, axes), *kept)


def plain_backward(
    grad: Tensor, x: Tensor, mask: Tensor, weight: Tensor | None, axes: Axes, eps: float
) -> Three:
    """Gradients of input, weight and bias, as differentiable functions of grad, x and weight."""
    v, (mean, var, count) = _statistics(x, mask, axes)
    valid, some = _against(mask, x, axes), count.clamp(min=1.0)
    g, dims = _axes.grouped_view(grad, axes)
    g = torch.where(valid, _plain._wide(g), 0.0)
    rstd = _inverse_std(var, count, eps)
    x_hat = torch.where(valid, v - mean, 0.0) * rstd
    of_weight, of_bias = ((g * x_hat).sum([0, 3]).reshape(-1), g.sum([0, 3]).reshape(-1))
    if weight is not None:
        g = g * _plain._per_channel(weight, v)
    along = x_hat * ((g * x_hat).sum(dims, keepdim=True) / some)
    mean_grad = g.sum(dims, keepdim=True) / some if axes.centred else torch.zeros_like(some)
    of_x = torch.where(valid, g - along - mean_grad, 0.0) * rstd
    return _plain._like(of_x, x, axes), of_weight, of_bias


# ---------------------------------------------------------------- operators

_library = operators._library_def
_library.define(
    "masked_forward(Tensor x, Tensor mask, Tensor? weight, Tensor? bias, int num_groups, float eps,"
    " float padding_value) -> (Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "masked_backward(Tensor grad, Tensor x, Tensor mask, Tensor mean, Tensor var, Tensor? weight,"
    " int num_groups, float eps, int needs) -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _axes_of(num_groups: int) -> Axes:
    return Axes(num_groups, 0, True)


def _plain_masked_forward(
    x: Tensor,
    mask: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    num_groups: int,
    eps: float,
    padding_value: float,
) -> tuple[Tensor, ...]:
    return tuple(plain_forward(x, mask, weight, bias, _axes_of(num_groups), eps, padding_value))


def _plain_masked_backward(
    grad: Tensor,
    x: Tensor,
    mask: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    num_groups: int,
    eps: float,
    needs: int,
) -> Three:
    found = plain_backward(grad, x, mask, weight, _axes_of(num_groups), eps)
    _, dtype = operators.parameter_like(x, weight, 0)
    return (
        found[0] if needs & NEEDS_INPUT else x.new_empty(0),
        found[1].to(dtype) if needs & NEEDS_WEIGHT else x.new_empty(0, dtype=dtype),
        found[2].to(dtype) if needs & NEEDS_BIAS else x.new_empty(0, dtype=dtype),
    )


def _fake_masked_forward(
    x: Tensor, mask: Tensor, weight: Any, bias: Any, num_groups: int, eps: float, padding: float
) -> tuple[Tensor, ...]:
    axes = _axes_of(num_groups)
    shape = (_axes.num_statistics(x.shape, axes),)
    statistics = (x.new_empty(shape, dtype=operators.statistic_dtype(x)) for _ in range(3))
    return (_axes.empty_result(x, axes), *statistics)


def _fake_masked_backward(
    grad: Tensor, x: Tensor, mask: Any, mean: Any, var: Any, weight: Any, *rest: Any
) -> Three:
    num_groups, eps, needs = rest
    return operators._fake_backward(
        grad, x, mean, var, weight, num_groups, 0, True, eps, False, needs
    )


_library.impl("masked_forward", _plain_masked_forward, "CompositeExplicitAutograd")
_library.impl("masked_backward", _plain_masked_backward, "CompositeExplicitAutograd")
_library.register_fake("masked_forward", _fake_masked_forward)
_library.register_fake("masked_backward", _fake_masked_backward)
masked_forward = torch.ops.truenorm.masked_forward.default
masked_backward = torch.ops.truenorm.masked_backward.default


# ---------------------------------------------------------------- gradients


class _Backward(Function):
    """The backward kernel, differentiable."""

    @staticmethod
    def forward(ctx: Any, spec: Any, mask: Any, mean: Any, var: Any, *tensors: Any) -> Any:
        grad, x, weight = tensors
        ctx.save_for_backward(mask, *tensors)
        ctx.spec = spec
        ctx.set_materialize_grads(False)
        num_groups, eps, needs = spec
        with autograd._below_autograd():
            return masked_backward._op(grad, x, mask, mean, var, weight, num_groups, eps, needs)

    @staticmethod
    def backward(ctx: Any, *incoming: Any) -> Any:
        mask, *tensors = ctx.saved_tensors
        num_groups, eps, needs = ctx.spec

        def gradients(grad: Tensor, x: Tensor, weight: Tensor | None) -> Sequence[Tensor]:
            return plain_backward(grad, x, mask, weight, _axes_of(num_groups), eps)

        asked = tuple(g if needs & 1 << i else None for i, g in enumerate(incoming))
        return None, None, None, None, *autograd._differentiate(gradients, tuple(tensors), asked)


def _pull_back(ctx: Any, grad: Tensor, wanted: Sequence[bool]) -> tuple[Tensor | None, ...]:
    x, mask, weight, mean, var = ctx.saved_tensors
    num_groups, eps, bias_dtype = ctx.spec
    flags = (NEEDS_INPUT, NEEDS_WEIGHT, NEEDS_BIAS)
    needs = sum(flag for flag, want in zip(flags, wanted, strict=True) if want)
    found: Any
    if torch.compiler.is_compiling():
        found = masked_backward(grad, x, mask, mean, var, weight, num_groups, eps, needs)
    elif torch.is_grad_enabled() or route.transformed(grad, x, weight):
        found = _Backward.apply((num_groups, eps, needs), mask, mean, var, grad, x, weight)  # type: ignore[no-untyped-call]
    else:
        with autograd._below_autograd():
            found = masked_backward._op(grad, x, mask, mean, var, weight, num_groups, eps, needs)
    of_x, of_weight, of_bias = (g if want else None for g, want in zip(found, wanted, strict=True))
    if of_bias is not None and of_bias.dtype != bias_dtype:
        of_bias = of_bias.to(bias_dtype)
    return of_x, of_weight, of_bias


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    x, mask, weight, bias, num_groups, eps, _ = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(x, mask, weight, *output[1:3])
    ctx.spec = num_groups, eps, None if bias is None else bias.dtype


class _Normalize(Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        with autograd._below_autograd():
            made = masked_forward._op(*inputs)
        _setup(ctx, inputs, made)
        return made

    @staticmethod
    def backward(ctx: Any, grad: Any, *_: Any) -> Any:
        x, _mask, weight, bias, *_ = ctx.needs_input_grad
        of_x, of_weight, of_bias = _pull_back(ctx, grad, (x, weight, bias))
        return of_x, None, of_weight, of_bias, None, None, None


def _operator_backward(ctx: Any, grad: Any, *_: Any) -> Any:
    return _Normalize.backward(ctx, grad)


torch.library.register_autograd(
    "truenorm::masked_forward", _operator_backward, setup_context=_setup
)


# ---------------------------------------------------------------- what functional.py calls


def normalize(
    x: Tensor,
    mask: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    axes: Axes,
    eps: float,
    padding_value: float,
) -> Masked:
    """x (N, C, *) by the statistics of its valid values; padding_value elsewhere."""
    own_way = axes.feature_dims > 0 or mask.dim() == x.dim()  # for which there is no kernel
    way = route.way(x, weight, bias)
    if own_way or way in (route.PLAIN, route.STANDARD):
        return plain_forward(x, mask, weight, bias, axes, eps, padding_value)
    args = x, mask, weight, bias, axes.num_groups, eps, padding_value
    if way == route.GRAPH:
        return Masked(*masked_forward(*args))
    return Masked(*cast(Any, _Normalize.apply(*args)))  # type: ignore[no-untyped-call]


def _can_ask(x: Tensor) -> bool:
    """Whether a value can be looked at for nothing, and does not become part of a graph."""
    return (
        x.device.type == "cpu"
        and type(x) in (Tensor, torch.nn.Parameter)
        and not torch.compiler.is_compiling()
        and not route.tracing()
        and not torch._C._are_functorch_transforms_active()
        and torch._C._len_torch_dispatch_stack() == 0
    )


def track(running: autograd.Running, x: Tensor, made: Masked, per_channel: bool) -> None:
    """Move running statistics towards those of the valid values, averaged over samples.

    What spans fewer than two values has no unbiased variance, and is left out; nothing moves where
    nothing is left. per_channel: each channel has a mask of its own.
    """
    features = running.mean.numel()
    mean, var, count = (t.reshape(-1, features) for t in (made.mean, made.var, made.values))
    if running.gathered is not None:
        # one count for all: what `accumulate` merges
        same = made.values[:1]
        autograd.track(running, x, made.mean, made.var, torch.where(same > 1, same, 0.0))
        return
    if _can_ask(x) and len(count) == 1 and not per_channel and not running.skip_nonfinite:
        values, assumed = count[0, 0].item(), x.numel() // features
        if values > 1:
            # one step, which takes the variance of as many values as x holds
            scale = values / (values - 1) * ((assumed - 1) / assumed)
            autograd.track(running, x, made.mean, made.var * scale)
            return
    share = (count > 1).to(mean.dtype)
    samples = share.sum(0)
    some = samples.clamp(min=1.0)
    unbiased = var * count / (count - 1.0).clamp(min=1.0)
    # as a statistic of two values, whose biased variance is half the unbiased one
    averaged = (mean * share).sum(0) / some, (unbiased * share).sum(0) / some * 0.5
    autograd.track(running, x, *averaged, torch.where(samples > 0, 2.0, 0.0).to(mean.dtype))
