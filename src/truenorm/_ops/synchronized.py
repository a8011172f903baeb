"""Normalization by statistics that span the processes of a group, and its gradients.

Each process sums up its own part, one all-gather carries the moments (2 float64 numbers per
statistic, and 2 more) to all, and every process merges them in the same order: so all hold the same
bits. The backward does the same with the 2 sums per statistic that the input's gradient needs.
Every process must therefore run the same layers in the same order, forward and backward; one with
an empty input takes part too.

Several independent layers may share one exchange: everything here takes a list of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from .. import _axes, _checks, _exchange, _plain
from .._axes import Axes
from .._exchange import all_sum, gather
from .._pairs import add_pairs, merge_pairs
from . import autograd, operators, parts, route, sharding
from .autograd import Running
from .parts import Spec

_HEAD = 2  # of a message: how many values each statistic spans, and how many statistics follow


class Call(NamedTuple):
    """One layer's input, and what to do with it."""

    layer: Any
    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    axes: Axes
    eps: float
    running: Running | None = None


class Statistics(NamedTuple):
    """Values per statistic (1,), means and biased variances, over all ranks."""

    values: Tensor
    mean: Tensor
    var: Tensor


def _threes(flat: Sequence[Any]) -> Iterator[Any]:
    """A flat list, as autograd wants it, in threes: one for each layer."""
    return (flat[i : i + 3] for i in range(0, len(flat), 3))


def _flat(threes: Iterable[Any]) -> list[Any]:
    return [each for three in threes for each in three]


def _joined(messages: list[Tensor]) -> Tensor:
    return torch.cat(messages) if len(messages) > 1 else messages[0]


def _statistics(xs: Sequence[Tensor], specs: Sequence[Spec], group: Any) -> list[Statistics]:
    """Statistics of every x over all ranks, by one exchange."""
    messages = []
    for x, spec in zip(xs, specs, strict=True):
        own, mean, m2 = parts.moments(x, spec.axes)
        head = mean.new_full((1,), own), mean.new_full((1,), mean.numel())
        messages.append(torch.cat([*head, mean, m2]))
    gathered = gather(_joined(messages), group).split([m.numel() for m in messages], 1)
    found = []
    for x, spec, part in zip(xs, specs, gathered, strict=True):
        per_sample = spec.axes.num_groups > 0
        _exchange.check_messages(part[:, 0], part[:, 1], x, per_sample=per_sample)
        mean, m2 = part[:, _HEAD:].split((part.shape[1] - _HEAD) // 2, 1)
        values, mean, m2 = merge_pairs(part[:, :1], mean, m2)
        found.append(Statistics(values, mean, m2 / values.clamp(min=1.0)))
    return found


def _gradients(
    tensors: Sequence[Any],
    statistics: Sequence[Statistics],
    specs: Sequence[Spec],
    wanted: Sequence[Sequence[bool]],
    group: Any,
) -> list[Tensor | None]:
    """Gradients of (x, weight, bias), layer by layer, by one exchange.

    tensors: (grad, x, weight) of each layer. The parameters' gradients are this process's share:
    over all ranks they sum to those of the whole batch.
    """
    sums, messages = [], []
    for (grad, x, weight), s, spec, (of_x, *_) in zip(
        _threes(tensors), statistics, specs, wanted, strict=True
    ):
        sums.append(parts.gradient_sums(grad, x, spec, s.mean, s.var))
        if of_x:
            messages.append(parts.weighted_sums(sums[-1], x, weight, spec.axes).reshape(-1))
    if messages:
        totals = add_pairs(gather(_joined(messages), group))
        total = iter(totals.split([m.numel() for m in messages]))
    found: list[Tensor | None] = []
    for (grad, x, weight), s, spec, (of_x, of_weight, of_bias), own in zip(
        _threes(tensors), statistics, specs, wanted, sums, strict=True
    ):
        if of_x:
            means = next(total).view(2, -1) / s.values
            found.append(parts.input_gradient(grad, x, weight, spec, s.mean, s.var, means))
        else:
            found.append(None)
        own = own.view(2, -1, x.shape[1]).sum(1) if spec.axes.num_groups else own
        _, dtype = operators.parameter_like(x, weight, 0)
        found += [own[0].to(dtype) if of_weight else None, own[1].to(dtype) if of_bias else None]
    return found


def _plain_gradients(
    grad: Tensor, x: Tensor, weight: Tensor | None, s: Statistics, spec: Spec, group: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of (x, weight, bias) as differentiable functions of grad, x and weight.

    The mean of s serves as a constant to count from; how it depends on x is worked out again.
    """
    axes, eps = spec
    v, dims = _axes.grouped_view(x, axes)
    g, _ = _axes.grouped_view(grad, axes)
    v, g = _plain._wide(v), _plain._wide(g)

    def against(statistic: Tensor) -> Tensor:
        return _plain._against(statistic, v, axes)

    d = v - against(s.mean)
    d = d - against(all_sum(d.sum(dims), group) / s.values)
    rstd = torch.rsqrt(against(all_sum((d * d).sum(dims), group) / s.values) + eps)
    x_hat = d * rstd
    of_weight, of_bias = (values.sum([0, 3]).reshape(-1) for values in (g * x_hat, g))
    if weight is not None:
        g = g * _plain._per_channel(weight, v)
    mean_grad, along = all_sum(torch.stack([g.sum(dims), (g * x_hat).sum(dims)]), group) / s.values
    of_x = (g - against(mean_grad) - x_hat * against(along)) * rstd
    _, dtype = operators.parameter_like(x, weight, 0)
    return _plain._like(of_x, x, axes), of_weight.to(dtype), of_bias.to(dtype)


class _Backward(Function):
    """The gradients of `_Normalize`, differentiable."""

    @staticmethod
    def forward(ctx: Any, kept: Any, wanted: Any, statistics: Any, *tensors: Any) -> Any:
        ctx.save_for_backward(*tensors)
        ctx.kept = kept, wanted, statistics
        ctx.set_materialize_grads(False)
        specs, group = kept
        return tuple(_gradients(tensors, statistics, specs, wanted, group))

    @staticmethod
    def backward(ctx: Any, *incoming: Any) -> Any:
        (specs, group), wanted, statistics = ctx.kept

        def gradients(*tensors: Any) -> Sequence[Tensor]:
            return _flat(
                _plain_gradients(grad, x, weight, s, spec, group)
                for (grad, x, weight), s, spec in zip(
                    _threes(tensors), statistics, specs, strict=True
                )
            )

        asked = tuple(g if w else None for g, w in zip(incoming, _flat(wanted), strict=True))
        again = autograd._differentiate(gradients, ctx.saved_tensors, asked)
        return None, None, None, *again


class _Normalize(Function):
    """Several x by the statistics of all ranks: outputs, then the statistics."""

    @staticmethod
    def forward(ctx: Any, kept: Any, *tensors: Any) -> Any:
        specs, group = kept
        statistics = _statistics(tensors[::3], specs, group)
        outputs = [
            parts.outputs(x, weight, bias, spec, s.mean, s.var)
            for (x, weight, bias), s, spec in zip(_threes(tensors), statistics, specs, strict=True)
        ]
        flat = _flat(statistics)
        saved = [t for x, weight, _ in _threes(tensors) for t in (x, weight)]
        ctx.save_for_backward(*saved, *flat)
        ctx.kept = kept
        ctx.bias_dtypes = [None if b is None else b.dtype for b in tensors[2::3]]
        ctx.mark_non_differentiable(*flat)
        return (*outputs, *flat)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        specs, group = ctx.kept
        layers = len(specs)
        kept = ctx.saved_tensors  # once: checkpointing gives them out only once
        saved = kept[: 2 * layers]
        statistics = [Statistics(*three) for three in _threes(kept[2 * layers :])]
        tensors = _flat(zip(grads[:layers], saved[::2], saved[1::2], strict=True))
        wanted = list(_threes(ctx.needs_input_grad[1:]))
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            found = list(_Backward.apply(ctx.kept, wanted, statistics, *tensors))  # type: ignore[no-untyped-call]
        else:
            found = _gradients(tensors, statistics, specs, wanted, group)
        for i, dtype in enumerate(ctx.bias_dtypes):
            of_bias = found[3 * i + 2]
            if of_bias is not None and of_bias.dtype != dtype:
                found[3 * i + 2] = of_bias.to(dtype)
        return None, *found


def normalize_together(calls: Sequence[Call], group: Any) -> list[Tensor]:
    """Outputs of several independent layers, with one exchange forward and one backward."""
    if any(sharding.wanted(c.x, c.weight, c.bias) for c in calls):
        return [_alone(c, group) for c in calls]
    for c in calls:
        if route.standard():
            _checks.fail_spanning(type(c.layer).__name__, group)
        _checks.check_no_transform(route.transformed(c.x, c.weight, c.bias))
        _exchange.agree(c.layer, _axes.num_statistics(c.x.shape, c.axes), c.x.device, group)
    return _normalized(calls, group)


def _alone(call: Call, group: Any) -> Tensor:
    from . import sharded  # which imports this module

    if not sharding.wanted(call.x):
        return normalize(call, group)
    sharded.check_group(call.x, group)
    return sharded.normalize(*call[1:], None)


def _normalized(calls: Sequence[Call], group: Any) -> list[Tensor]:
    kept = [Spec(c.axes, c.eps) for c in calls], group
    made = _Normalize.apply(kept, *_flat((c.x, c.weight, c.bias) for c in calls))  # type: ignore[no-untyped-call]
    outputs, statistics = made[: len(calls)], _threes(made[len(calls) :])
    for c, (values, mean, var) in zip(calls, statistics, strict=True):
        if c.running is not None:
            with torch.no_grad():
                autograd.track(c.running, c.x, mean, var, values)
    return list(outputs)


def normalize(call: Call, group: Any) -> Tensor:
    """The output of one layer by the statistics of all ranks of the group."""
    return normalize_together([call], group)[0]


def part(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    spec: Spec,
    running: Running | None,
    group: Any,
) -> Tensor:
    """The output of this rank's part of a tensor that is known to have one on every rank."""
    return _normalized([Call(None, x, weight, bias, *spec, running)], group)[0]
