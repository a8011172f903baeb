"""The formulas in plain PyTorch ops: any device, any dtype, differentiable to any order.

They serve function transforms (vmap, jvp, jacrev), second derivatives, and what no kernel takes.
Everything is computed in float64 where the device has it, which keeps every promise of the kernels
except speed and memory.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from . import geometry
from .activation import act, act_backward
from .call import Form
from .geometry import Axes

Sum = Callable[[Tensor], Tensor]
Statistics = tuple[Tensor, Tensor]


def wide(x: Tensor) -> Tensor:
    if x.is_complex():
        return x.to(torch.complex128)
    has_float64 = x.device.type != "mps"
    return x.to(torch.float64 if has_float64 else torch.float32)


def like(values: Tensor, x: Tensor, axes: Axes) -> Tensor:
    """values in x's shape, dtype and memory format."""
    result = values.reshape(x.shape).to(x.dtype)
    return geometry.laid_out(result, geometry.kept_strides(x, axes))


class _View(NamedTuple):
    """x as v (N, G, C / G, S), where it is valid, and what is in its place against it."""

    v: Tensor
    valid: Tensor | None
    dims: list[int]  # that one statistic spans
    axes: Axes

    def against(self, statistic: Tensor) -> Tensor:
        n = self.v.shape[0] if self.axes.num_groups else 1
        return wide(statistic).reshape(n, self.v.shape[1], 1, 1)

    def parameter(self, p: Tensor) -> Tensor:
        """Against x; of several parts of the samples, each of which has its own, one for each."""
        _, groups, channels, _ = self.v.shape
        parts = p.shape[0] if self.by_part(p) else 1
        each = wide(p).reshape(parts, groups, channels, 1)
        return each if parts == 1 else each.repeat_interleave(self.v.shape[0] // parts, 0)

    def by_part(self, p: Tensor) -> bool:
        return p.dim() > max(self.axes.feature_dims, 1)

    def of_parameter(self, values: Tensor, p: Tensor | None) -> Tensor:
        """What values, of a sum along which a parameter like p is one, come to; flat."""
        if p is None or not self.by_part(p) or p.shape[0] == 0:
            return values.sum([0, 3]).reshape(-1)
        return values.sum(3).reshape(p.shape[0], -1, p[0].numel()).sum(1).reshape(-1)

    def like_x(self, t: Tensor) -> Tensor:
        return self.kept(wide(geometry.grouped_view(t, self.axes)[0]))

    def kept(self, values: Tensor) -> Tensor:
        """values, and zero where nothing is valid: what is there may be NaN."""
        return values if self.valid is None else torch.where(self.valid, values, 0.0)

    def sum(self, values: Tensor) -> Tensor:
        return values.sum(self.dims, keepdim=True)


def _view(x: Tensor, mask: Tensor | None, axes: Axes) -> _View:
    v, dims = geometry.grouped_view(x, axes)
    valid = None
    if mask is not None:
        n, _, s = geometry.ncs(x.shape, axes)
        if mask.shape == x.shape:
            valid = geometry.grouped_view(mask, axes)[0]
        else:
            valid = mask.reshape(n, 1, 1, s)
    view = _View(v, valid, dims, axes)
    return view._replace(v=view.kept(wide(v)))


def _same(values: Tensor) -> Tensor:
    return values


def _rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Values of that dtype; the gradient goes through as it is."""
    narrow = values.detach().to(torch.promote_types(dtype, torch.float32)).to(dtype)
    there = values.isfinite() & narrow.isfinite()
    return torch.where(there, narrow.to(values.dtype) + (values - values.detach()), values)


def _affine(
    view: _View, x: Tensor, x_hat: Tensor, weight: Tensor | None, bias: Tensor | None,
    residual: Tensor | None, form: Form,
) -> Tensor:  # fmt: skip
    """x̂ · weight + bias + residual; weight as `_meant`."""
    rounded: Sum = partial(_rounded, dtype=x.dtype) if form.rounds else _same
    step = rounded if form.axes.feature_dims else _same
    z = step(x_hat)
    if weight is not None:
        z = step(z * view.parameter(weight))
    if bias is not None:
        z = step(z + view.parameter(bias))
    z = z if form.axes.feature_dims else rounded(z)
    if residual is not None:
        z = rounded(z + view.like_x(residual))
    return z


def _meant(weight: Tensor | None, x: Tensor, form: Form) -> Tensor | None:
    """The weight by which is multiplied: 1 + it is rounded as a kernel computes."""
    if weight is None or not form.one_plus:
        return weight
    return weight.to(torch.promote_types(x.dtype, torch.float32)) + 1.0


def _count(view: _View) -> Tensor:
    """How many values each statistic spans."""
    if view.valid is not None:
        return view.sum(view.valid.expand(view.v.shape).to(view.v.dtype))
    values = 1
    for d in view.dims:
        values *= view.v.shape[d]
    return torch.ones_like(view.sum(view.v).detach()) * values


def _own(view: _View, total: Sum) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, biased variance (RMSNorm: zero and mean square) and count, against x."""
    v = d = view.v
    count = total(_count(view))
    some = count.clamp(min=1.0) if not v.is_complex() else count
    mean = torch.zeros_like(count)
    if view.axes.centred:
        mean = total(view.sum(v)) / some
        # what rounding has left of it
        mean = mean + total(view.sum(view.kept(v - mean))) / some
        d = view.kept(v - mean)
    return mean, total(view.sum(d * d)) / some, count


def _inverse_std(view: _View, var: Tensor, count: Tensor | None, eps: float) -> Tensor:
    if count is None or view.valid is None:
        return torch.rsqrt(var + eps)
    # where nothing is valid an eps of 0 leaves no infinity for a gradient to meet
    return torch.rsqrt(torch.where(count > 0, var + eps, 1.0))


def statistics(x: Tensor, mask: Tensor | None, axes: Axes) -> Tensor:
    """(3, statistics): means, biased variances, and of how many values."""
    return torch.stack([s.reshape(-1) for s in _own(_view(x, mask, axes), _same)])


def norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    residual: Tensor | None,
    given: Statistics | None,
    form: Form,
) -> tuple[Tensor, Tensor]:
    """y, and what `statistics` gives."""
    view = _view(x, mask, form.axes)
    if given is None:
        mean, var, count = _own(view, _same)
        rstd = _inverse_std(view, var, count, form.eps)
    else:
        mean, var = (view.against(s) for s in given)
        count = _count(view)
        rstd = _inverse_std(view, var, None, form.eps)
    z = _affine(view, x, (view.v - mean) * rstd, _meant(weight, x, form), bias, residual, form)
    y = act(z, form.act, form.parameter)
    if view.valid is not None:
        y = torch.where(view.valid, y, form.padding)
    record = torch.stack([s.detach().reshape(-1) for s in (mean, var, count)])
    return like(y, x, form.axes), record


class Gradients(NamedTuple):
    """Of x and residual as these are; of weight and bias flat, and in float64."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    residual: Tensor


class _Pulled(NamedTuple):
    view: _View
    rstd: Tensor
    x_hat: Tensor
    inner: Tensor  # the gradient of what the activation takes
    values: Tensor | None  # that a statistic spans, where these are own


def _pull(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    residual: Tensor | None,
    given: Statistics | None,
    form: Form,
    by_output: bool,
    total: Sum,
) -> _Pulled:
    view, count = _view(x, mask, form.axes), None
    if given is None:
        mean, var, count = _own(view, total)
    else:
        mean, var = (view.against(s) for s in given)
    rstd = _inverse_std(view, var, count, form.eps)
    x_hat = view.kept(view.v - mean) * rstd
    inner = view.like_x(grad)
    if form.act:
        if by_output:
            assert residual is not None
            z = view.like_x(residual)
        else:
            z = _affine(view, x, x_hat, weight, bias, residual, form)
        inner = act_backward(inner, z, form.act, form.parameter)
    return _Pulled(view, rstd, x_hat, inner, count)


def norm_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    residual: Tensor | None,
    given: Statistics | None,
    form: Form,
    *,
    by_output: bool = False,
    sums: Tensor | None = None,
    total: Sum = _same,
) -> Gradients:
    """The gradients, as differentiable functions of grad and of what is differentiated.

    given: None where the statistics are x's own, and followed to x; else constants.
    by_output: whether residual is y.
    sums: (2, statistics), means of weight · grad · x̂ and of weight · grad, where x is a part of
        what they span.
    total: a sum over the processes whose parts of x share statistics.
    """
    weight = _meant(weight, x, form)
    view, rstd, x_hat, inner, count = _pull(
        grad, x, weight, bias, mask, residual, given, form, by_output, total
    )
    of_weight, of_bias = (view.of_parameter(t, weight) for t in (inner * x_hat, inner))
    g = inner if weight is None else inner * view.parameter(weight)
    if not form.constant:
        if sums is not None:
            along, mean_grad = (view.against(s) for s in sums)
        else:
            some = (total(_count(view)) if count is None else count).clamp(min=1.0)
            along, mean_grad = (total(view.sum(t)) / some for t in (g * x_hat, g))
        g = g - x_hat * along
        if form.axes.centred:
            g = g - mean_grad
    of_x = view.kept(g) * rstd
    return Gradients(like(of_x, x, form.axes), of_weight, of_bias, like(inner, x, form.axes))


def gradient_sums(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    residual: Tensor | None,
    given: Statistics,
    form: Form,
    *,
    by_output: bool = False,
) -> Tensor:
    """(2, channels, of each sample where statistics are): sums of grad · x̂ and of grad."""
    weight = _meant(weight, x, form)
    pulled = _pull(grad, x, weight, bias, mask, residual, given, form, by_output, _same)
    dims = [3] if form.axes.num_groups else [0, 3]
    return torch.stack(
        [t.sum(dims).reshape(-1) for t in (pulled.inner * pulled.x_hat, pulled.inner)]
    )


# ---------------------------------------------------------------- running statistics


def all_finite(record: Tensor) -> Tensor:
    """Whether every mean and variance is, where nobody waits for the answer."""
    return record[:2].isfinite().all()


def observed(record: Tensor, num_features: int) -> tuple[Tensor, Tensor, Tensor]:
    """What running statistics record: how many samples, and averages over these, by channel.

    Of mean and unbiased variance; what spans fewer than two values has none, and is left out.
    """
    mean, var, count = wide(record).reshape(3, -1, num_features)
    there = count > 1
    samples = there.sum(0).to(mean.dtype)
    some = samples.clamp(min=1.0)
    unbiased = var * (count / (count - 1.0).clamp(min=1.0))
    return (
        samples,
        torch.where(there, mean, 0.0).sum(0) / some,
        torch.where(there, unbiased, 0.0).sum(0) / some,
    )


def move(
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor | None,
    record: Tensor,
    momentum: float | None,
    skip_nonfinite: bool = False,
) -> None:
    """running = (1 − momentum) · running + momentum · observed; momentum None: 1 / batches seen.

    None moves where nothing has a variance. skip_nonfinite: none, nor a batch counted, where one of
    the statistics is not finite.
    """
    factor: float | Tensor
    if momentum is not None:
        factor = momentum
    else:
        assert num_batches_tracked is not None
        factor = 1.0 / (wide(num_batches_tracked) + 1.0)
    samples, *seen = observed(record, running_mean.numel())
    moves = samples > 0
    if skip_nonfinite:
        moves = moves & all_finite(record)
    for running, new in zip((running_mean, running_var), seen, strict=True):
        known = wide(running)
        running.copy_(torch.where(moves, (1.0 - factor) * known + factor * new, known))
    if num_batches_tracked is not None:
        num_batches_tracked.add_(all_finite(record) if skip_nonfinite else 1)


# ---------------------------------------------------------------- LocalResponseNorm


def _window_sum(values: Tensor, size: int, before: int) -> Tensor:
    """Sum over channels c − before … c − before + size − 1 of (N, C, S)."""
    channels = values.shape[1]
    # of a window there are no more than all channels
    after = min(size - 1 - before, max(channels - 1, 0))
    before = min(before, max(channels - 1, 0))
    padded = torch.nn.functional.pad(values, (0, 0, before, after))
    total = padded.narrow(1, 0, channels)
    for shift in range(1, before + after + 1):
        total = total + padded.narrow(1, shift, channels)
    return total


def response(x: Tensor, size: int, alpha: float, beta: float, k: float) -> Tensor:
    n, c, s = geometry.ncs(x.shape, geometry.BATCH)
    v = wide(x.reshape(n, c, s))
    d = k + alpha / size * _window_sum(v * v, size, size // 2)
    return like(v * d.pow(-beta), x, geometry.BATCH)


def response_backward(
    grad: Tensor, x: Tensor, size: int, alpha: float, beta: float, k: float
) -> Tensor:
    n, c, s = geometry.ncs(x.shape, geometry.BATCH)
    v, g = wide(x.reshape(n, c, s)), wide(grad.reshape(n, c, s))
    d = k + alpha / size * _window_sum(v * v, size, size // 2)
    across = _window_sum(g * v * d.pow(-beta - 1.0), size, (size - 1) // 2)
    result = g * d.pow(-beta) - (2.0 * alpha * beta / size) * v * across
    return like(result, x, geometry.BATCH)
