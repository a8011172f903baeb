"""What running_mean and running_var become after one batch, by the formula."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import Module

from .groups import Group
from .layers import Subject


@dataclass(frozen=True)
class Running:
    """One channel's running statistics: before this batch, seen in it, after it.

    var_seen is the unbiased variance (divided by n − 1): stored, though the batch is normalized by
    the biased one. layer_mean and layer_var are what truenorm's layer holds after the batch.
    """

    channel: int
    momentum: float
    mean_before: float
    mean_seen: float
    mean_after: float
    var_before: float
    var_seen: float
    var_after: float
    layer_mean: float
    layer_var: float


def _numbers(module: Module, name: str) -> list[float]:
    buffer = getattr(module, name)
    return [] if buffer is None else list(buffer.detach().cpu().double().tolist())


def running_updates(
    before: Any, subject: Subject, after: Any, groups: list[Group]
) -> list[Running]:
    """running = (1 − momentum) · running + momentum · seen, for each channel.

    before: the layer as given; after: truenorm's copy of it once it has seen the batch. Where each
    sample has its own statistics (InstanceNorm), seen are their averages.
    """
    if not getattr(after, "track_running_stats", False):
        return []
    after_mean, after_var = _numbers(after, "running_mean"), _numbers(after, "running_var")
    channels = len(after_mean)
    lazy = torch.nn.parameter.is_lazy(before.running_mean)
    old_mean = [0.0] * channels if lazy else _numbers(before, "running_mean")
    old_var = [1.0] * channels if lazy else _numbers(before, "running_var")
    momentum = after.momentum
    if momentum is None:
        # a plain average over batches for BatchNorm; torch's InstanceNorm leaves them alone
        batch = subject.sharing.kind == "batch"
        momentum = 1.0 / float(after.num_batches_tracked) if batch else 0.0
    updates = []
    for c in range(channels):
        seen = groups[c::channels]
        mean = sum(g.mean or 0.0 for g in seen) / len(seen)
        var = sum(g.unbiased_variance or 0.0 for g in seen) / len(seen)
        updates.append(
            Running(
                channel=c,
                momentum=momentum,
                mean_before=old_mean[c],
                mean_seen=mean,
                mean_after=(1.0 - momentum) * old_mean[c] + momentum * mean,
                var_before=old_var[c],
                var_seen=var,
                var_after=(1.0 - momentum) * old_var[c] + momentum * var,
                layer_mean=after_mean[c],
                layer_var=after_var[c],
            )
        )
    return updates
