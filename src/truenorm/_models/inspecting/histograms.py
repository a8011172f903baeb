"""Distributions of samples: a few thousand values out of each tensor, all layers at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .tables import Histogram

SAMPLE, BINS = 2048, 48
# share of the values beyond each end, which are counted in the first and the last bin
OUTSIDE = 0.002


def sample(x: Tensor) -> Tensor:
    """SAMPLE values, evenly out of the tensor's memory; NaN where there are fewer, and for Inf."""
    flat = x
    if x.is_contiguous():
        flat = x.view(-1)
    elif x.dim() in (4, 5):
        last = x.movedim(1, -1)
        flat = last.view(-1) if last.is_contiguous() else x[:1].reshape(-1)
    else:
        flat = x[:1].reshape(-1)
    step = -(-flat.numel() // SAMPLE)
    # odd, so that it does not walk along one column
    some = flat[:: step + (step > 1 and step % 2 == 0)].detach()
    values = x.new_full((SAMPLE,), torch.nan, dtype=torch.float32)
    values[: some.numel()] = some
    return values


def histograms(samples: Sequence[Tensor | None]) -> list[Histogram | None]:
    """The distribution of each sample; None where it is missing or has no two finite values."""
    given = [i for i, s in enumerate(samples) if s is not None]
    found: list[Histogram | None] = [None] * len(samples)
    if not given:
        return found
    values = torch.stack([s.cpu() for s in samples if s is not None]).double()
    kept = values.isfinite()
    counts = kept.sum(1)
    outside = (counts * OUTSIDE).long()[:, None]
    # the ends alone are sorted; what is not finite is at neither
    most = int(SAMPLE * OUTSIDE) + 1
    low = values.where(kept, torch.inf).topk(most, largest=False).values.gather(1, outside)
    high = values.where(kept, -torch.inf).topk(most).values.gather(1, outside)
    flat = low >= high
    low, high = torch.where(flat, low - 0.5, low), torch.where(flat, high + 0.5, high)
    bins = ((values - low) / (high - low) * BINS).floor().clamp(0, BINS - 1)
    rows = torch.arange(len(given))[:, None] * BINS
    total = torch.bincount((bins + rows)[kept].long(), minlength=BINS * len(given))
    for row, i in enumerate(given):
        if counts[row] > 1:
            each = total[row * BINS : (row + 1) * BINS].tolist()
            found[i] = Histogram(low[row].item(), high[row].item(), tuple(each))
    return found
