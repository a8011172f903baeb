"""Statistics that span the processes of a group, and the sums that their gradients need.

Each process sums up its own part, one all-gather carries the moments (2 float64 numbers per
statistic, and 2 more; under a mask 3) to all, and every process merges them in the same order: so
all hold the same bits. The backward does the same with the 2 sums per statistic that the input's
gradient needs. Every process must therefore run the same layers in the same order, forward and
backward, all with a mask or all without; one with an empty input takes part too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import exchange, operators
from .call import BY_OUTPUT, Form
from .exchange import all_sum, gather
from .merging import add_pairs, merge_pairs
from .operators import run_masked

_HEAD = 2  # of a message: how many values each statistic spans, and how many statistics follow


def _joined(messages: list[Tensor]) -> Tensor:
    return torch.cat(messages) if len(messages) > 1 else messages[0]


def statistics(
    forms: Sequence[Form], xs: Sequence[Tensor], masks: Sequence[Tensor | None], group: Any
) -> list[Tensor]:
    """The records of every x over all processes, by one exchange."""
    messages = []
    for form, x, mask in zip(forms, xs, masks, strict=True):
        args = x, mask, form.bits(x)
        mean, var, count = run_masked(operators.statistics, x, mask, *args)
        values = x.numel() // max(mean.numel(), 1)
        head = mean.new_full((1,), values), mean.new_full((1,), mean.numel())
        counts = () if mask is None else (count,)
        messages.append(torch.cat([*head, mean, var * count, *counts]))
    gathered = gather(_joined(messages), group).split([m.numel() for m in messages], 1)
    found = []
    for form, x, mask, part in zip(forms, xs, masks, gathered, strict=True):
        per_sample = form.axes.num_groups > 0
        exchange.check_messages(part[:, 0], part[:, 1], x, per_sample=per_sample)
        body = part[:, _HEAD:]
        mean, m2, *counts = body.split(body.shape[1] // (2 if mask is None else 3), 1)
        count, mean, m2 = merge_pairs(counts[0] if counts else part[:, :1], mean, m2)
        record = torch.stack([mean, m2 / count.clamp(min=1.0), count.expand(mean.shape)])
        found.append(record)
    return found


class Across(NamedTuple):
    """Of one call: means that the input's gradient needs, and this process's parameter gradients.

    Over all processes these sum to those of the whole batch.
    """

    means: Tensor | None
    of_parameters: list[Tensor]


def gradient_sums(
    forms: Sequence[Form],
    by_output: Sequence[bool],
    pulled: Sequence[Any],
    group: Any,
    wanted: Sequence[Sequence[bool]],
) -> list[Across]:
    """By one exchange; pulled: as gradients.py has them."""
    sums, messages = [], []
    for form, output, p, (of_x, *_) in zip(forms, by_output, pulled, wanted, strict=True):
        sums.append(_own_sums(form, output, p))
        if of_x:
            messages.append(_weighted(sums[-1], p.x, p.weight, form).reshape(-1))
    if messages:
        totals = add_pairs(gather(_joined(messages), group))
        total = iter(totals.split([m.numel() for m in messages]))
    found = []
    for own, p, (of_x, *_) in zip(sums, pulled, wanted, strict=True):
        means = None
        if of_x:
            means = next(total).view(2, -1) / p.record[2].clamp(min=1.0)
        shape, dtype = operators.parameter_like(p.x, p.weight, 0)
        channels = own.view(2, -1, p.x.shape[1]).sum(1)
        found.append(Across(means, [s.view(shape).to(dtype) for s in channels]))
    return found


def _own_sums(form: Form, by_output: bool, p: Any) -> Tensor:
    tensors = p.grad, p.x, p.record, p.weight, p.bias, p.mask, p.residual
    numbers = form.numbers(p.x, BY_OUTPUT * by_output)
    sums: Tensor = run_masked(operators.gradient_sums, p.x, p.mask, *tensors, *numbers)
    return sums


def _weighted(sums: Tensor, x: Tensor, weight: Tensor | None, form: Form) -> Tensor:
    """The sums of weight · grad instead of grad, per statistic."""
    groups, channels = form.axes.num_groups, x.shape[1]
    if weight is not None:
        wide = weight.to(sums.dtype)
        sums = (sums.view(2, -1, channels) * wide).view(sums.shape)
    per_group = channels // groups if groups else 1
    return sums.view(2, -1, per_group).sum(2) if per_group > 1 else sums


def total(group: Any) -> Callable[[Tensor], Tensor]:
    """The sum over the processes of a group, differentiable any number of times."""
    return (lambda values: values) if group is None else (lambda values: all_sum(values, group))
