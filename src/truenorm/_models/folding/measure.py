"""How far a folded layer is from the layers it replaces, in float64."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.conv import _ConvNd


def share_of_largest(got: list[Tensor], exact: list[Tensor]) -> float:
    """Largest error over all tensors, as a share of each one's largest value."""
    worst = 0.0
    for a, b in zip(got, exact, strict=True):
        if b.numel():
            size = b.abs().max().item()
            worst = max(worst, (a - b).abs().max().item() / (size or 1.0))
    return worst


def _probe(layer: Any, norms_before: list[Any]) -> Tensor:
    """A random input with two positions more than the kernel spans."""
    generator = torch.Generator().manual_seed(0)
    if isinstance(layer, _ConvNd):
        reach = (d * (k - 1) + 3 for d, k in zip(layer.dilation, layer.kernel_size, strict=True))
        shape: tuple[int, ...] = (1, layer.in_channels, *reach)
    else:
        shape = (3, layer.in_features)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    if norms_before:
        each = (-1, *(1,) * (x.dim() - 2))
        mean, var = (
            s.detach().cpu().double().view(each)
            for s in (norms_before[0].running_mean, norms_before[0].running_var)
        )
        x = mean + x * var.sqrt()
    return x.to(layer.weight.device)


def pair_errors(
    layer: Any, before: list[Any], after: list[Any], stays: list[Any], weight: Tensor, bias: Tensor
) -> tuple[float, float]:
    """(error of the folded layer, error of the layers as they were), on a random input.

    stays: what the last of the layers after it does, besides what was folded.
    """
    chain = torch.nn.Sequential(*before, layer, *after)
    x = _probe(layer, before)
    own = x.to(layer.weight.dtype)
    with torch.no_grad():
        exact = copy.deepcopy(chain).double()(own.double())
        folded = copy.deepcopy(layer)
        folded.weight = torch.nn.Parameter(weight.to(layer.weight.dtype))
        folded.bias = torch.nn.Parameter(bias.to(layer.weight.dtype))
        made = torch.nn.Sequential(folded, *stays)
        errors = [share_of_largest([f(own).double()], [exact]) for f in (made, chain)]
    return errors[0], errors[1]
