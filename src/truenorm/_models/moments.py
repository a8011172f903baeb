"""Mean and biased variance of tensors, by truenorm's kernels: one read of the tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from .._core.normalize import channel_moments


def of_channels(x: Tensor) -> tuple[Tensor, Tensor]:
    """Of each channel of (N, C, *), over samples and positions: (C,) in float64."""
    return channel_moments(x)


def of_samples(x: Tensor) -> tuple[Tensor, Tensor]:
    """Of each channel of each sample of (N, C, *positions): (N, C) in float64."""
    n, c = x.shape[:2]
    if x.is_contiguous():
        mean, var = channel_moments(x.view(1, n * c, -1))
        return mean.view(n, c), var.view(n, c)
    each = [channel_moments(x[i : i + 1]) for i in range(n)]
    return torch.stack([m for m, _ in each]), torch.stack([v for _, v in each])


def of_rows(x: Tensor, dims: int, *, centred: bool) -> tuple[Tensor, Tensor]:
    """Of the last `dims` dimensions, one for each leading index, flat, in float64.

    Not `centred`: zero, and the mean square.
    """
    rows = x.reshape(1, -1, x.shape[x.dim() - dims :].numel())
    mean, var = channel_moments(rows)
    return (mean, var) if centred else (torch.zeros_like(mean), var + mean * mean)
