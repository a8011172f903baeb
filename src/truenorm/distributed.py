"""Statistics across the processes of a torch.distributed group, on any backend.

Each process sums up its own part, one all-gather carries the moments (2 float64 numbers per
statistic, and 2 more) to all, and every process merges them in the same order: so all hold the same
bits. The backward does the same with the 2 sums per statistic that the input's gradient needs.
Every process must therefore run the same layers in the same order, forward and backward; one with
an empty input takes part too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from . import _agreement, _axes, _checks, _plain
from ._axes import Axes
from ._ops import Running, autograd, channel_moments, operators
from .moments import add_pairs, merge_pairs

__all__ = ["WORLD", "active_group"]

# as `process_group`: every process, found out when the layer is called
WORLD = "world"

_HEAD = 2  # of a message: how many values each statistic spans, and how many statistics follow


def active_group(process_group: Any) -> Any:
    """The group to exchange statistics with, or None where this process is alone in it.

    process_group: a ProcessGroup, or None or "world" for all processes.

    Errors: ValueError for anything else, and for a group without this process.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return None
    if process_group is None or process_group == WORLD:
        process_group = dist.group.WORLD
    _checks.check_process_group(process_group)
    return process_group if dist.get_world_size(process_group) > 1 else None


class Call(NamedTuple):
    """One layer's input, and what to do with it."""

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    axes: Axes
    eps: float
    running: Running | None = None
    layer: Any = None


class _Spec(NamedTuple):
    axes: Axes
    eps: float


# ---------------------------------------------------------------- exchange


def gather(message: Tensor, group: Any) -> Tensor:
    """The messages of all ranks (equally long), in rank order: (ranks, length)."""
    ranks = dist.get_world_size(group)
    if torch.compiler.is_compiling():
        functional = torch.ops._c10d_functional
        gathered = functional.all_gather_into_tensor(message, ranks, group.group_name)
        return cast(Tensor, functional.wait_tensor(gathered)).view(ranks, -1)
    gathered = message.new_empty(ranks * message.numel())
    with _agreement.explained(group):
        _all_gather(gathered, message, group=group)
    return gathered.view(ranks, -1)


# torch 2.13 gave it another name
_all_gather: Any = getattr(dist, "all_gather_single", None) or getattr(
    dist, "all_gather_into_tensor", None
)


class _AllSum(Function):
    """The sum over all ranks, of which the gradient is the sum of all ranks' gradients."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return add_pairs(gather(values.reshape(-1), group)).view(values.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return all_sum(grad, ctx.group), None


def all_sum(values: Tensor, group: Any) -> Tensor:
    """Sum over all ranks, differentiable any number of times."""
    return cast(Tensor, _AllSum.apply(values, group))  # type: ignore[no-untyped-call]


# ---------------------------------------------------------------- one process's part


def _parts(x: Tensor, axes: Axes) -> list[Tensor]:
    """x as tensors whose batch statistics per channel are those of x, per sample where it has so."""
    if not axes.num_groups or x.shape[0] == 1:
        return [x]
    if x.is_contiguous():
        return [x.view(1, x.shape[0] * x.shape[1], *x.shape[2:])]
    return list(x.split(1)) if x.shape[0] else [x.reshape(1, 0, *x.shape[2:])]


def _joined(parts: list[Tensor], x: Tensor, axes: Axes) -> Tensor:
    """The inverse of `_parts`, for results."""
    if len(parts) == 1:
        return parts[0].view(x.shape) if parts[0].shape != x.shape else parts[0]
    result = _axes.empty_result(x, axes)
    for sample, part in zip(result.split(1), parts, strict=True):
        sample.copy_(part)
    return result


def _repeated(parameter: Tensor | None, part: Tensor, x: Tensor) -> Tensor | None:
    """A weight or bias against the channels of a part."""
    if parameter is None or part.shape[1] == x.shape[1]:
        return parameter
    return parameter.repeat(part.shape[1] // x.shape[1])


def _per_group(axes: Axes, x: Tensor) -> int:
    """Channels that share a statistic."""
    return x.shape[1] // axes.num_groups if axes.num_groups else 1


def _by_part(statistic: Tensor, parts: list[Tensor], per_group: int) -> Sequence[Tensor]:
    """One value per statistic as one per channel, part by part."""
    channels = statistic.repeat_interleave(per_group) if per_group > 1 else statistic
    return channels.split(parts[0].shape[1]) if len(parts) > 1 else [channels]


def _run(op: Any, *args: Any) -> Any:
    if torch.compiler.is_compiling():
        return op(*args)
    with autograd._below_autograd():
        return op._op(*args)


def _moments(x: Tensor, axes: Axes) -> Tensor:
    """This process's message: values per statistic, number of statistics, means, m2."""
    parts, per_group = _parts(x, axes), _per_group(axes, x)
    found = [channel_moments(part) for part in parts]
    mean, var = found[0] if len(found) == 1 else map(torch.cat, zip(*found, strict=True))
    count = _values(x, axes) // per_group
    m2 = var * count
    if per_group > 1:
        _, mean, m2 = merge_pairs(
            mean.new_full((per_group, 1), count),
            mean.view(-1, per_group).t(),
            m2.view(-1, per_group).t(),
        )
    head = mean.new_full((1,), count * per_group), mean.new_full((1,), mean.numel())
    return torch.cat([*head, mean, m2])


def _values(x: Tensor, axes: Axes) -> int:
    """Values of this process in each statistic, also where x is empty."""
    return x.numel() // max(_axes.num_statistics(x.shape, axes), 1)


def _outputs(x: Tensor, weight: Any, bias: Any, spec: _Spec, mean: Tensor, var: Tensor) -> Tensor:
    axes, eps = spec
    parts, per_group = _parts(x, axes), _per_group(axes, x)
    means, variances = (_by_part(s, parts, per_group) for s in (mean, var))
    made = [
        _run(operators.apply, p, m, v, _repeated(weight, p, x), _repeated(bias, p, x), eps)
        for p, m, v in zip(parts, means, variances, strict=True)
    ]
    return _joined(made, x, axes)


def _gradient_sums(grad: Tensor, x: Tensor, spec: _Spec, mean: Tensor, var: Tensor) -> Tensor:
    """Sums of grad · x̂ and of grad, per channel (per sample where the statistics are): (2, ·)."""
    axes, eps = spec
    parts, per_group = _parts(x, axes), _per_group(axes, x)
    means, variances = (_by_part(s, parts, per_group) for s in (mean, var))
    found = []
    for g, p, m, v in zip(_like_parts(grad, x, axes), parts, means, variances, strict=True):
        # a weight of float64 asks for the sums in float64
        wide = m.new_ones(p.shape[1])
        needs = operators.NEEDS_WEIGHT | operators.NEEDS_BIAS
        _, of_weight, of_bias = _run(
            operators.backward, g, p, m, v, wide, *_axes.BATCH, eps, True, needs
        )
        found.append(torch.stack([of_weight, of_bias]))
    return torch.cat(found, 1) if len(found) > 1 else found[0]


def _like_parts(grad: Tensor, x: Tensor, axes: Axes) -> list[Tensor]:
    """The output's gradient, cut as x is."""
    if axes.num_groups and x.shape[0] != 1 and x.is_contiguous():
        return _parts(grad.contiguous(), axes)
    return [grad] if not axes.num_groups or x.shape[0] == 1 else list(grad.split(1)) or [grad]


def _input_gradient(
    grad: Tensor, x: Tensor, weight: Any, spec: _Spec, mean: Tensor, var: Tensor, means: Tensor
) -> Tensor:
    """means: of weight · grad · x̂ and of weight · grad, over all ranks, per statistic: (2, ·)."""
    axes, eps = spec
    parts, per_group = _parts(x, axes), _per_group(axes, x)
    each = [_by_part(s, parts, per_group) for s in (mean, var, means[1], means[0])]
    made = [
        _run(operators.backward_of_part, g, p, m, v, _repeated(weight, p, x), of_grad, of_x_hat, eps)
        for g, p, m, v, of_grad, of_x_hat in zip(
            _like_parts(grad, x, axes), parts, *each, strict=True
        )
    ]
    return _joined(made, x, axes)


# ---------------------------------------------------------------- all processes together


def _merged(gathered: Tensor, x: Tensor, axes: Axes) -> tuple[Tensor, Tensor, Tensor]:
    """Values per statistic, means and biased variances of all ranks: (1,), (statistics,) twice."""
    _agreement.check_messages(gathered[:, :_HEAD], x, axes)
    statistics = (gathered.shape[1] - _HEAD) // 2
    mean, m2 = gathered[:, _HEAD:].split(statistics, 1)
    count, mean, m2 = merge_pairs(gathered[:, :1], mean, m2)
    return count, mean, m2 / count.clamp(min=1.0)


def _statistics(xs: Sequence[Tensor], specs: Sequence[_Spec], group: Any) -> list[Tensor]:
    """(count, mean, var) of every x, one after the other, by one exchange."""
    messages = [_moments(x, spec.axes) for x, spec in zip(xs, specs, strict=True)]
    gathered = gather(torch.cat(messages) if len(messages) > 1 else messages[0], group)
    found: list[Tensor] = []
    each = gathered.split([m.numel() for m in messages], 1)
    for x, spec, part in zip(xs, specs, each, strict=True):
        found += _merged(part, x, spec.axes)
    return found


def _gradients(
    tensors: Sequence[Any], statistics: Sequence[Tensor], specs: Sequence[_Spec], wanted: Any,
    group: Any,
) -> list[Tensor | None]:  # fmt: skip
    """Gradients of (x, weight, bias), call by call, by one exchange.

    tensors: (grad, x, weight) of each call; wanted: which gradients, for each call. The parameters'
    gradients are this process's share: over all ranks they sum to those of the whole batch.
    """
    sums, messages = [], []
    for i, spec in enumerate(specs):
        (grad, x, weight), (_, mean, var) = tensors[3 * i : 3 * i + 3], statistics[3 * i : 3 * i + 3]
        sums.append(_gradient_sums(grad, x, spec, mean, var))
        if wanted[i][0]:
            weighted = sums[i]
            if weight is not None:
                of_channel = weight.to(weighted.dtype)
                weighted = weighted * of_channel.repeat(weighted.shape[1] // weight.numel())
            per_group = _per_group(spec.axes, x)
            if per_group > 1:
                weighted = weighted.view(2, -1, per_group).sum(2)
            messages.append(weighted.reshape(-1))
    if messages:
        gathered = gather(torch.cat(messages) if len(messages) > 1 else messages[0], group)
        totals = iter(add_pairs(gathered).split([m.numel() for m in messages]))
    found: list[Tensor | None] = []
    for i, spec in enumerate(specs):
        grad, x, weight = tensors[3 * i : 3 * i + 3]
        count, mean, var = statistics[3 * i : 3 * i + 3]
        of_x = None
        if wanted[i][0]:
            means = next(totals).view(2, -1) / count
            of_x = _input_gradient(grad, x, weight, spec, mean, var, means)
        shape, dtype = operators.parameter_like(x, weight, 0)
        by_channel = sums[i].view(2, -1, x.shape[1]).sum(1) if spec.axes.num_groups else sums[i]
        found += [
            of_x,
            by_channel[0].to(dtype) if wanted[i][1] else None,
            by_channel[1].to(dtype) if wanted[i][2] else None,
        ]
    return found


def _plain_gradients(
    grad: Tensor, x: Tensor, weight: Any, spec: _Spec, count: Tensor, mean: Tensor, group: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of (x, weight, bias) as differentiable functions of grad, x and weight.

    mean: that of all ranks, as a constant to count from; how it depends on x is worked out again.
    """
    axes, eps = spec
    v, dims = _axes.grouped_view(x, axes)
    g, _ = _axes.grouped_view(grad, axes)
    v, g = _plain._wide(v), _plain._wide(g)

    def against(statistic: Tensor) -> Tensor:
        return _plain._against(statistic, v, axes)

    d = v - against(mean)
    d = d - against(all_sum(d.sum(dims), group) / count)
    rstd = torch.rsqrt(against(all_sum((d * d).sum(dims), group) / count) + eps)
    x_hat = d * rstd
    of_weight, of_bias = (s.sum([0, 3]).reshape(-1) for s in (g * x_hat, g))
    if weight is not None:
        g = g * _plain._per_channel(weight, v)
    mean_grad, along = all_sum(torch.stack([g.sum(dims), (g * x_hat).sum(dims)]), group) / count
    of_x = (g - against(mean_grad) - x_hat * against(along)) * rstd
    _, dtype = operators.parameter_like(x, weight, 0)
    return _plain._like(of_x, x, axes), of_weight.to(dtype), of_bias.to(dtype)


class _Backward(Function):
    """The gradients of `_Normalize`, differentiable."""

    @staticmethod
    def forward(
        ctx: Any, specs: Any, wanted: Any, group: Any, statistics: Any, *tensors: Any
    ) -> Any:
        ctx.save_for_backward(*tensors)
        ctx.kept = specs, wanted, group, statistics
        ctx.set_materialize_grads(False)
        return tuple(_gradients(tensors, statistics, specs, wanted, group))

    @staticmethod
    def backward(ctx: Any, *incoming: Any) -> Any:
        specs, wanted, group, statistics = ctx.kept

        def gradients(*tensors: Any) -> Sequence[Tensor]:
            found: list[Tensor] = []
            for i, spec in enumerate(specs):
                count, mean = statistics[3 * i : 3 * i + 2]
                each = tensors[3 * i : 3 * i + 3]
                found += _plain_gradients(*each, spec, count, mean, group)
            return found

        flat = [asked for each in wanted for asked in each]
        asked = tuple(g if w else None for g, w in zip(incoming, flat, strict=True))
        again = autograd._differentiate(gradients, ctx.saved_tensors, asked)
        return None, None, None, None, *again


class _Normalize(Function):
    """Several x by the statistics of all ranks; outputs, then (count, mean, var) of each."""

    @staticmethod
    def forward(ctx: Any, specs: Any, group: Any, *tensors: Any) -> Any:
        xs = tensors[::3]
        statistics = _statistics(xs, specs, group)
        outputs = [
            _outputs(*tensors[3 * i : 3 * i + 3], spec, *statistics[3 * i + 1 : 3 * i + 3])
            for i, spec in enumerate(specs)
        ]
        kept = [t for i in range(len(specs)) for t in tensors[3 * i : 3 * i + 2]]
        ctx.save_for_backward(*kept, *statistics)
        ctx.kept = specs, group
        ctx.bias_dtypes = [None if b is None else b.dtype for b in tensors[2::3]]
        ctx.mark_non_differentiable(*statistics)
        return (*outputs, *statistics)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        specs, group = ctx.kept
        count = len(specs)
        saved, statistics = ctx.saved_tensors[: 2 * count], ctx.saved_tensors[2 * count :]
        needs = ctx.needs_input_grad[2:]
        wanted = [tuple(needs[3 * i : 3 * i + 3]) for i in range(count)]
        tensors: list[Any] = []
        for i in range(count):
            tensors += [grads[i], *saved[2 * i : 2 * i + 2]]
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            found = list(_Backward.apply(specs, wanted, group, statistics, *tensors))  # type: ignore[no-untyped-call]
        else:
            found = _gradients(tensors, statistics, specs, wanted, group)
        for i, dtype in enumerate(ctx.bias_dtypes):
            of_bias = found[3 * i + 2]
            if of_bias is not None and of_bias.dtype != dtype:
                found[3 * i + 2] = of_bias.to(dtype)
        return None, None, *found


def normalize_together(calls: Sequence[Call], group: Any) -> list[Tensor]:
    """Outputs of several independent layers, with one exchange forward and one backward."""
    for call in calls:
        _checks.check_no_transform(autograd.transformed(call.x, call.weight, call.bias))
        statistics = _axes.num_statistics(call.x.shape, call.axes)
        _agreement.agree(call.layer, statistics, call.x.device, group)
    specs = [_Spec(c.axes, c.eps) for c in calls]
    tensors = [t for c in calls for t in (c.x, c.weight, c.bias)]
    made = _Normalize.apply(specs, group, *tensors)  # type: ignore[no-untyped-call]
    outputs, found = made[: len(calls)], made[len(calls) :]
    for i, call in enumerate(calls):
        if call.running is not None:
            count, mean, var = found[3 * i : 3 * i + 3]
            with torch.no_grad():
                _plain.move_running(*call.running[:3], mean, var, count, call.running.momentum)
    return list(outputs)


def normalize(call: Call, group: Any) -> Tensor:
    """The output of one layer by the statistics of all ranks of the group."""
    return normalize_together([call], group)[0]
