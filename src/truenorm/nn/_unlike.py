"""What other libraries call norms and torch has no layer for, of plain operators and truenorm's.

Weight standardization (Qiao et al., 2019), and ConvNeXt V2's global response normalization.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv2d, pad

from .. import functional


def response(x: Tensor, weight: Tensor, bias: Tensor, eps: float, axis: int) -> Tensor:
    """y = x + weight · (x · n) + bias, n = ‖x‖ / (E[‖x‖] + eps): ‖x‖ of each sample's channel over
    its positions, E over the channels; computed as bias + x · (1 + weight · n), in one pass.
    """
    dims = [d for d in range(1, x.dim()) if d != axis % x.dim()]
    size = torch.linalg.vector_norm(x, 2, dims, keepdim=True)
    share = size / (size.mean(axis, keepdim=True) + eps)
    against = share[:1].shape
    return torch.addcmul(bias.reshape(against), x, 1 + weight.reshape(against) * share)


def standardized(weight: Tensor, gain: Tensor | None, eps: float) -> Tensor:
    """Each output's weights as a normalized row, times its gain."""
    rows = weight.reshape(1, weight.shape[0], -1)
    gain = None if gain is None else gain.reshape(-1)
    return functional.batch_norm(rows, None, None, gain, None, True, 0.0, eps).reshape_as(weight)


def padded(x: Tensor, layer: Any) -> Tensor:
    """As TensorFlow's "SAME" has it, where the layer is told so."""
    own = layer._modules.get("pad")
    if own is not None:
        return own(x)  # type: ignore[no-any-return]
    if not getattr(layer, "same_pad", False):
        return x
    sides: list[int] = []
    for d in (-1, -2):
        size, stride = x.shape[d], layer.stride[d]
        reach = (layer.kernel_size[d] - 1) * layer.dilation[d] + 1
        more = max((-(-size // stride) - 1) * stride + reach - size, 0)
        sides += [more // 2, more - more // 2]
    return pad(x, sides)


def convolved(x: Tensor, layer: Any, weight: Tensor) -> Tensor:
    """The layer's convolution by these weights."""
    return conv2d(
        padded(x, layer), weight, layer.bias, layer.stride, layer.padding, layer.dilation,
        layer.groups,
    )  # fmt: skip
