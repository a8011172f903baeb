"""The layers that are verified, each with its oracle, and the inputs they are given."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ... import reference
from ...reference import Gradients

# several channels wide, and strong enough that neighbours matter (torch's default alpha, 1e-4,
# leaves the input almost as it is)
LRN_SIZE, LRN_ALPHA, LRN_BETA, LRN_K = 5, 0.1, 0.75, 1.0
NUM_GROUPS = 3

_SPATIAL_SHAPES = {
    3: ((3, 6, 35), (5, 24, 511)),
    4: ((3, 6, 5, 7), (4, 24, 33, 31)),
    5: ((3, 6, 3, 5, 3), (2, 24, 9, 11, 13)),
}
_FEATURE_SHAPES = ((3, 7, 35), (4, 129, 96))


@dataclass(frozen=True)
class Spec:
    """One layer, in training or in evaluation, and the shapes it is measured on.

    axes: which values share a statistic: "batch", "instance", "group", "features" (LayerNorm and
        RMSNorm) or "window" (LocalResponseNorm).
    """

    layer: str
    axes: str
    rank: int
    training: bool = True

    @property
    def name(self) -> str:
        return self.layer if self.training else f"{self.layer} eval"

    @property
    def family(self) -> str:
        """Layers that share a row of the tables: those of one formula, whatever their rank."""
        if self.layer == "SyncBatchNorm":
            return self.layer
        return self.name.replace("1d", "").replace("2d", "").replace("3d", "")

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """A small odd shape, and one that a kernel splits into blocks."""
        if self.axes == "features":
            return _FEATURE_SHAPES
        small, large = _SPATIAL_SHAPES[self.rank]
        # BatchNorm1d takes (N, C) too
        return (small, (257, 24), large) if self.layer == "BatchNorm1d" else (small, large)

    @property
    def per_sample(self) -> bool:
        """Whether a sample's result does not depend on the rest of the batch."""
        return self.axes != "batch" or not self.training

    @property
    def follows_offset(self) -> bool:
        """Whether the layer subtracts a mean, so that a shifted input has the same output."""
        return self.axes != "window" and self.layer != "RMSNorm"


SPECS = (
    *(Spec(f"BatchNorm{d}d", "batch", d + 2, t) for t in (True, False) for d in (1, 2, 3)),
    *(Spec(f"InstanceNorm{d}d", "instance", d + 2) for d in (1, 2, 3)),
    Spec("GroupNorm", "group", 4),
    Spec("LayerNorm", "features", 3),
    Spec("RMSNorm", "features", 3),
    Spec("LocalResponseNorm", "window", 4),
    Spec("SyncBatchNorm", "batch", 4),
    Spec("SyncBatchNorm", "batch", 4, training=False),
)
LAYERS = tuple(dict.fromkeys(spec.layer for spec in SPECS))


def groups_of(channels: int) -> int:
    return NUM_GROUPS if channels % NUM_GROUPS == 0 else 1


def build(library: Any, spec: Spec, shape: Sequence[int], eps: float) -> Any:
    """The layer out of `torch.nn` or `truenorm.nn`, weight 1 and bias 0."""
    kind = getattr(library, spec.layer)
    if spec.axes == "window":
        return kind(LRN_SIZE, LRN_ALPHA, LRN_BETA, LRN_K)
    if spec.axes == "features":
        return kind(shape[-1], eps)
    if spec.axes == "group":
        return kind(groups_of(shape[1]), shape[1], eps)
    if spec.axes == "instance":
        return kind(shape[1], eps, affine=True)
    return kind(shape[1], eps).train(spec.training)


def exact_output(layer: Any, spec: Spec, x: Tensor) -> Tensor:
    """The layer's output by its formula in float64."""
    if spec.axes == "window":
        return reference.local_response_norm(x, LRN_SIZE, LRN_ALPHA, LRN_BETA, LRN_K)
    if spec.layer == "RMSNorm":
        return reference.rms_norm(x, layer.normalized_shape, layer.weight, layer.eps)
    w, b, eps = layer.weight, layer.bias, layer.eps
    if spec.axes == "features":
        return reference.layer_norm(x, layer.normalized_shape, w, b, eps)
    if spec.axes == "group":
        return reference.group_norm(x, layer.num_groups, w, b, eps)
    if spec.axes == "instance":
        return reference.instance_norm(x, w, b, eps)
    mean, var = layer.running_mean, layer.running_var
    return reference.batch_norm(x, mean, var, w, b, spec.training, eps)


def exact_gradients(layer: Any, spec: Spec, grad: Tensor, x: Tensor) -> Gradients:
    """The layer's gradients by their formulas in float64."""
    if spec.axes == "window":
        return reference.local_response_norm_backward(grad, x, LRN_SIZE, LRN_ALPHA, LRN_BETA, LRN_K)
    if spec.layer == "RMSNorm":
        shape = layer.normalized_shape
        return reference.rms_norm_backward(grad, x, shape, layer.weight, layer.eps)
    w, b, eps = layer.weight, layer.bias, layer.eps
    if spec.axes == "features":
        return reference.layer_norm_backward(grad, x, layer.normalized_shape, w, b, eps)
    if spec.axes == "group":
        return reference.group_norm_backward(grad, x, layer.num_groups, w, b, eps)
    if spec.axes == "instance":
        return reference.instance_norm_backward(grad, x, w, b, eps)
    mean, var = layer.running_mean, layer.running_var
    return reference.batch_norm_backward(grad, x, mean, var, w, b, spec.training, eps)


def _statistic_shape(spec: Spec, shape: Sequence[int]) -> tuple[int, ...]:
    """The input's shape with 1 for every dimension that shares an offset and a spread."""
    ones = [1] * (len(shape) - 2)
    if spec.axes == "batch":
        return (1, shape[1], *ones)
    if spec.axes == "instance":
        return (shape[0], shape[1], *ones)
    if spec.axes == "features":
        return (*shape[:-1], 1)
    return (shape[0], 1, *ones)


@dataclass(frozen=True)
class Data:
    """An input, contiguous, and the running statistics that fit it in evaluation."""

    x: Tensor
    running_mean: Tensor
    running_var: Tensor
    centre: Tensor


@functools.lru_cache(maxsize=64)
def data(
    spec: Spec, shape: tuple[int, ...], dtype: torch.dtype, offset: float, scale: float
) -> Data:
    """Normal values with means of ±`offset` standard deviations, rounded to `dtype`.

    Each statistic has its own sign of the offset and its own spread, `scale` times 0.5 … 2, so that
    a value read from a neighbour's statistic shows.
    """
    generator = torch.Generator().manual_seed(20)

    def uniform(size: Sequence[int]) -> Tensor:
        return torch.rand(tuple(size), generator=generator, dtype=torch.float64)

    per_statistic = _statistic_shape(spec, shape)
    sign = (uniform(per_statistic) < 0.5).double() * 2.0 - 1.0
    spread = scale * (0.5 + 1.5 * uniform(per_statistic))
    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    largest = torch.finfo(dtype).max
    x = ((noise + sign * offset) * spread).clamp(-largest, largest).to(dtype)
    # running statistics near, but not at, those of the input; float32 cannot hold (1e30)²
    channels = [1, shape[1], *[1] * (len(shape) - 2)]
    mean, std = torch.zeros(shape[1], dtype=torch.float64), torch.ones(shape[1]).double()
    if spec.axes == "batch":
        std = (spread * (0.9 + 0.2 * uniform(channels))).reshape(-1)
        mean = ((sign * offset + 0.1) * spread).reshape(-1)
    return Data(x, mean.to(dtype), (std**2).to(_wide(dtype)), (sign * offset * spread).to(dtype))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


LAYOUTS = ("contiguous", "channels_last", "transposed", "permuted", "sliced", "unaligned")


def layouts_of(spec: Spec) -> tuple[str, ...]:
    if spec.axes == "features":
        return tuple(name for name in LAYOUTS if name != "channels_last")
    return LAYOUTS


def in_layout(x: Tensor, layout: str) -> Tensor:
    """The same values, otherwise in memory.

    channels_last: the channels innermost, of any rank. transposed: the last two dimensions swapped
    (LayerNorm behind a permute). permuted: the first two swapped. sliced: every second value of a
    larger tensor. unaligned: contiguous, starting one value into its memory. expanded: the first
    sample for every sample, at a stride of 0.
    """
    if layout == "sliced":
        result = x.new_zeros((*x.shape[:-1], 2 * x.shape[-1]))[..., ::2]
    elif layout == "unaligned":
        result = x.new_zeros(x.numel() + 1)[1:].view(x.shape)
    elif layout == "expanded":
        return x[:1].clone().expand(x.shape)
    else:
        order = list(range(x.dim()))
        if layout == "channels_last":
            order = [0, *order[2:], 1]
        elif layout == "transposed":
            order[-2:] = order[:-3:-1]
        elif layout == "permuted":
            order[:2] = order[1::-1]
        back = [order.index(d) for d in range(x.dim())]
        result = x.new_empty([x.shape[d] for d in order]).permute(back)
    return result.copy_(x)
