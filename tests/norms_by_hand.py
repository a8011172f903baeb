"""Norms as people write them into their models, whose classes no reader knows by name."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Module
from torch.nn import functional as F


class UnitNorm(Module):
    """x / ‖x‖ over the last dimension, times the root of its size and a weight."""

    def __init__(self, *shape: int, plus: float = 0.0) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(shape))
        self.plus = plus
        self.root = shape[-1] ** 0.5

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1) * self.root * (self.gamma + self.plus)


class UnitChannelNorm(Module):
    """The same over an image's channels, or a signal's."""

    def __init__(self, channels: int, dims: int = 2) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.ones(1, channels, *(1,) * dims))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=1) * self.g * x.shape[1] ** 0.5


class UnitChannelNormByWidth(UnitChannelNorm):
    """A slip: the root of another size."""

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=1) * self.g * x.shape[-1] ** 0.5


class ChannelNorm(Module):
    """LayerNorm over an image's channels; weights that are broadcast against x, or a sample."""

    def __init__(self, *shape: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.g = nn.Parameter(torch.ones(shape))
        self.b = nn.Parameter(torch.zeros(shape))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(1, keepdim=True)
        var = x.var(1, unbiased=False, keepdim=True)
        return (x - mean) / (var + self.eps).sqrt() * self.g + self.b


class PermutedNorm(nn.LayerNorm):
    """LayerNorm over an image's channels, by torch's."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.layer_norm(
            x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps
        )
        return y.permute(0, 3, 1, 2)


class AnyRankNorm(Module):
    """The same with weights (C,), on inputs of any rank: (N, C) too."""

    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        against = (-1, *(1,) * (x.dim() - 2))
        mean = x.mean(1, keepdim=True)
        square = (x - mean).pow(2).mean(1, keepdim=True)
        x = (x - mean) / torch.sqrt(square + self.eps)
        return self.weight.view(against) * x + self.bias.view(against)


class BiaslessNorm(Module):
    """torch's layer_norm, its bias a buffer of zeros."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(features))
        self.beta: Any
        self.register_buffer("beta", torch.zeros(features))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.gamma, self.beta)


class FixedUnitNorm(Module):
    """Without weights, and with the root of a size that is not the input's."""

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1) * 3.0


class RowsNorm(Module):
    """An RMSNorm of (N, C) alone, its product rounded after x̂."""

    def __init__(self, features: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(features))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        n, c = x.shape
        wide = x.float().view(n, c)
        return self.weight * (wide * torch.rsqrt(wide.square().mean(-1, True) + self.eps)).to(
            x.dtype
        )
