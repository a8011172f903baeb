"""Moments and sums merged in pairs of neighbours: for threads' parts, batches and processes."""

from __future__ import annotations

import torch
from torch import Tensor


def merge_pairs(count: Tensor, mean: Tensor, m2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Merge moments along dim 0, neighbours in pairs, until one is left.

    The order depends on the number of parts alone, and every step is element by element: so the
    bits are the same wherever it runs. A part whose count is 0 changes nothing.

    Shapes: mean, m2 (parts, *); count (parts, *) or (parts, 1 …); the results without dim 0.
    """
    while mean.shape[0] > 1:
        even = mean.shape[0] // 2 * 2
        here, there = slice(0, even, 2), slice(1, even, 2)
        total = count[here] + count[there]
        share = torch.where(total > 0, count[there] / total, 0.0)
        delta = mean[there] - mean[here]
        merged_mean = mean[here] + delta * share
        merged_m2 = m2[here] + m2[there] + delta * delta * (count[here] * share)
        if even < mean.shape[0]:  # one without a neighbour
            total = torch.cat([total, count[even:]])
            merged_mean = torch.cat([merged_mean, mean[even:]])
            merged_m2 = torch.cat([merged_m2, m2[even:]])
        count, mean, m2 = total, merged_mean, merged_m2
    return count[0], mean[0], m2[0]


def add_pairs(values: Tensor) -> Tensor:
    """Sum along dim 0 in the order of `merge_pairs`."""
    while values.shape[0] > 1:
        even = values.shape[0] // 2 * 2
        merged = values[0:even:2] + values[1:even:2]
        values = torch.cat([merged, values[even:]]) if even < values.shape[0] else merged
    return values[0]
