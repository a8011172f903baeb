"""A normalization by given statistics is y = scale · x + shift: its product with a linear layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from ..layers import eps_of


def affine(norm: Any) -> tuple[Tensor, Tensor]:
    """Scale and shift of each channel, in float64.

    scale = weight / sqrt(running_var + eps), shift = bias − running_mean · scale.
    """
    var = norm.running_var.detach().double()
    scale = torch.rsqrt(var + eps_of(norm, norm.running_var.dtype))
    if norm.weight is not None:
        scale = scale * norm.weight.detach().double()
    shift = -norm.running_mean.detach().double() * scale
    if norm.bias is not None:
        shift = shift + norm.bias.detach().double()
    return scale, shift


def padding_of(layer: _ConvNd) -> int:
    """Zeros added around the input, on the side with the most."""
    if layer.padding_mode != "zeros" or layer.padding == "valid":
        return 0
    if layer.padding == "same":
        return max(d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True))
    return max(int(p) for p in layer.padding)


def _one_tap(layer: _ConvNd) -> bool:
    """Whether each output position comes of one input position, and each gives one."""
    return padding_of(layer) == 0 and all(
        k == 1 and s == 1 for k, s in zip(layer.kernel_size, layer.stride, strict=True)
    )


def why_not_before(layer: Any, shift: Tensor) -> str:
    """Why a normalization cannot be folded into the layer after it; "" where it can."""
    if not isinstance(layer, _ConvNd) or not bool(shift.any()):
        return ""
    if isinstance(layer, _ConvTransposeNd):
        if _one_tap(layer) and not any(layer.output_padding):
            return ""
        return (
            "the transposed convolution after it reaches some positions more often than others, "
            "so its shift is no constant"
        )
    if padding_of(layer):
        return "the zeros that pad the convolution after it would have to be its shift's opposite"
    return ""


def _by_input(values: Tensor, layer: Any, weight: Tensor) -> Tensor:
    """One value per input channel, in the weight's shape."""
    spatial = (1,) * (weight.dim() - 2)
    if isinstance(layer, _ConvTransposeNd):
        return values.reshape(-1, 1, *spatial).expand(weight.shape)
    groups = layer.groups if isinstance(layer, _ConvNd) else 1
    per_group = values.reshape(groups, 1, -1, *spatial)
    per_output = per_group.expand(groups, weight.shape[0] // groups, *per_group.shape[2:])
    return per_output.reshape(weight.shape[0], -1, *spatial).expand(weight.shape)


def _by_output(values: Tensor, layer: Any, weight: Tensor) -> Tensor:
    """One value per output channel, in the weight's shape."""
    spatial = (1,) * (weight.dim() - 2)
    if isinstance(layer, _ConvTransposeNd):
        rows = values.reshape(layer.groups, 1, -1).expand(-1, weight.shape[0] // layer.groups, -1)
        return rows.reshape(weight.shape[0], -1, *spatial).expand(weight.shape)
    return values.reshape(-1, 1, *spatial).expand(weight.shape)


def _sum_of_inputs(values: Tensor, layer: Any) -> Tensor:
    """Values in the weight's shape, summed into one per output channel."""
    if isinstance(layer, _ConvTransposeNd):
        per_group = values.reshape(layer.groups, -1, *values.shape[1:])
        return per_group.sum([1, *range(3, per_group.dim())]).reshape(-1)
    return values.sum(list(range(1, values.dim())))


def fold_after(layer: Any, w: Tensor, b: Tensor, scale: Tensor, shift: Tensor) -> Any:
    """Weight and bias of scale · (W x + b) + shift."""
    return w * _by_output(scale, layer, w), b * scale + shift


def fold_before(layer: Any, w: Tensor, b: Tensor, scale: Tensor, shift: Tensor) -> Any:
    """Weight and bias of W (scale · x + shift) + b."""
    return (
        w * _by_input(scale, layer, w),
        b + _sum_of_inputs(w * _by_input(shift, layer, w), layer),
    )
