"""One process's part of a tensor whose statistics span several processes.

Everything is made of three operators with one statistic per channel. Statistics of each sample's
own are got by seeing samples as further channels: without a copy where x is contiguous or has one
sample, else sample by sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _axes
from .._axes import Axes
from .._pairs import merge_pairs
from . import autograd, channel_moments, operators


class Spec(NamedTuple):
    """Which values share a statistic, and what is added to the variance."""

    axes: Axes
    eps: float


def _run(op: Any, *args: Any) -> Any:
    if torch.compiler.is_compiling():
        return op(*args)
    with autograd._below_autograd():
        return op._op(*args)


def _cut(x: Tensor, like: Tensor, axes: Axes) -> list[Tensor]:
    """x as tensors whose statistics per channel are its own, in the way that `like` is cut."""
    samples, channels, *positions = like.shape
    if not axes.num_groups or samples == 1:
        return [x]
    if like.is_contiguous():
        return [x.reshape(1, samples * channels, *positions)]
    return list(x.split(1)) if samples else [x.reshape(1, 0, *positions)]


def _joined(parts: Sequence[Tensor], x: Tensor, axes: Axes) -> Tensor:
    """The inverse of `_cut`, for results."""
    if len(parts) == 1:
        return parts[0] if parts[0].shape == x.shape else parts[0].view(x.shape)
    result = _axes.empty_result(x, axes)
    for sample, part in zip(result.split(1), parts, strict=True):
        sample.copy_(part)
    return result


def _per_group(x: Tensor, axes: Axes) -> int:
    """Channels that share a statistic."""
    return x.shape[1] // axes.num_groups if axes.num_groups else 1


def _by_part(statistic: Tensor, parts: Sequence[Tensor], per_group: int) -> Sequence[Tensor]:
    """One value per statistic as one per channel, part by part."""
    channels = statistic.repeat_interleave(per_group) if per_group > 1 else statistic
    return channels.split(parts[0].shape[1]) if len(parts) > 1 else [channels]


def _repeated(parameter: Tensor | None, part: Tensor) -> Tensor | None:
    """A weight or bias against the channels of a part."""
    if parameter is None or part.shape[1] == parameter.numel():
        return parameter
    return parameter.repeat(part.shape[1] // parameter.numel())


def moments(x: Tensor, axes: Axes) -> tuple[int, Tensor, Tensor]:
    """Values per statistic, means and sums of squared deviations."""
    parts, per_group = _cut(x, x, axes), _per_group(x, axes)
    found = [channel_moments(part) for part in parts]
    mean, var = found[0] if len(found) == 1 else map(torch.cat, zip(*found, strict=True))
    count = parts[0].numel() // max(parts[0].shape[1], 1)
    m2 = var * count
    if per_group > 1:
        each = mean.view(-1, per_group).t(), m2.view(-1, per_group).t()
        _, mean, m2 = merge_pairs(mean.new_full((per_group, 1), count), *each)
    return count * per_group, mean, m2


def outputs(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, spec: Spec, mean: Tensor, var: Tensor
) -> Tensor:
    """y for statistics of all ranks."""
    parts, per_group = _cut(x, x, spec.axes), _per_group(x, spec.axes)
    made = [
        _run(operators.apply, p, m, v, _repeated(weight, p), _repeated(bias, p), spec.eps)
        for p, m, v in zip(
            parts, _by_part(mean, parts, per_group), _by_part(var, parts, per_group), strict=True
        )
    ]
    return _joined(made, x, spec.axes)


def gradient_sums(grad: Tensor, x: Tensor, spec: Spec, mean: Tensor, var: Tensor) -> Tensor:
    """Sums of grad · x̂ and of grad for each channel, of each sample where the statistics are."""
    parts, per_group = _cut(x, x, spec.axes), _per_group(x, spec.axes)
    needs = operators.NEEDS_WEIGHT | operators.NEEDS_BIAS
    found = []
    for g, p, m, v in zip(
        _cut(grad, x, spec.axes),
        parts,
        _by_part(mean, parts, per_group),
        _by_part(var, parts, per_group),
        strict=True,
    ):
        # a weight of float64 asks for the sums in float64
        wide = m.new_ones(p.shape[1])
        _, of_weight, of_bias = _run(
            operators.backward, g, p, m, v, wide, *_axes.BATCH, spec.eps, True, needs
        )
        found.append(torch.stack([of_weight, of_bias]))
    return torch.cat(found, 1) if len(found) > 1 else found[0]


def weighted_sums(sums: Tensor, x: Tensor, weight: Tensor | None, axes: Axes) -> Tensor:
    """`gradient_sums` of weight · grad instead of grad, per statistic."""
    if weight is not None:
        wide = weight.to(sums.dtype)
        sums = sums * (wide.repeat(sums.shape[1] // x.shape[1]) if axes.num_groups else wide)
    per_group = _per_group(x, axes)
    return sums.view(2, -1, per_group).sum(2) if per_group > 1 else sums


def input_gradient(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    spec: Spec,
    mean: Tensor,
    var: Tensor,
    means: Tensor,
) -> Tensor:
    """means: of weight · grad · x̂ and of weight · grad over all ranks, per statistic."""
    parts, per_group = _cut(x, x, spec.axes), _per_group(x, spec.axes)
    each = [_by_part(s, parts, per_group) for s in (mean, var, means[1], means[0])]
    made = [
        _run(operators.backward_of_part, g, p, m, v, _repeated(weight, p), a, b, spec.eps)
        for g, p, m, v, a, b in zip(_cut(grad, x, spec.axes), parts, *each, strict=True)
    ]
    return _joined(made, x, spec.axes)
