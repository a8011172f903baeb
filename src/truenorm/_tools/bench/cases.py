"""What is timed: layers on the shapes of the networks that they come from, and the goals."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

Shape = tuple[int, ...]
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


@dataclass(frozen=True)
class Case:
    """One layer on one input.

    network: where the shape comes from.
    quick: whether `--quick` times it too.
    """

    layer: str
    kwargs: Mapping[str, Any]
    shape: Shape
    network: str
    channels_last: bool = False
    training: bool = True
    quick: bool = False

    @property
    def family(self) -> str:
        """The row of the table of goals."""
        name = self.layer.removesuffix("1d").removesuffix("2d").removesuffix("3d")
        layout = "channels_last" if self.channels_last else "contiguous"
        if name == "BatchNorm":
            return f"BatchNorm training {layout}" if self.training else "BatchNorm eval"
        return f"{name} {layout}" if name in ("InstanceNorm", "GroupNorm") else name

    @property
    def name(self) -> str:
        """The layer and what it is given: of no other case."""
        layout = " channels_last" if self.channels_last else ""
        return f"{self.layer} {self.shape}{layout}{'' if self.training else ' eval'}"

    @property
    def label(self) -> str:
        """The name, without what the family says."""
        layout = " channels_last" if self.channels_last else ""
        return f"{self.layer} {self.shape}" + ("" if layout in self.family else layout)

    @property
    def memory_format(self) -> torch.memory_format:
        return _CHANNELS_LAST[len(self.shape)] if self.channels_last else torch.contiguous_format

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def statistics(self) -> int:
        """How many the layer computes on this input; LocalResponseNorm: one per value."""
        if self.layer.startswith("BatchNorm"):
            return self.shape[1]
        if self.layer.startswith("InstanceNorm"):
            return self.shape[0] * self.shape[1]
        if self.layer == "GroupNorm":
            return self.shape[0] * int(self.kwargs["num_groups"])
        if self.layer == "LocalResponseNorm":
            return self.numel
        return self.numel // int(self.kwargs["normalized_shape"])

    def build(self, library: Any) -> Any:
        """The layer out of `torch.nn` or `truenorm.nn`."""
        return getattr(library, self.layer)(**self.kwargs).train(self.training)


class Goal(NamedTuple):
    """Issue 3's figures: geometric means of torch's time over truenorm's, float32, 2 threads.

    of_clone: least share of clone()'s speed in the forward, on tensors of at least 1 MiB.
    """

    forward: float
    both: float | None
    of_clone: float | None
    worst: float = 1.0


GOALS = {
    "InstanceNorm contiguous": Goal(5.0, 4.0, 0.9),
    "InstanceNorm channels_last": Goal(10.0, 6.0, 0.9),
    "BatchNorm training contiguous": Goal(4.0, 3.5, 0.7),
    "BatchNorm training channels_last": Goal(3.0, 3.0, 0.7),
    "BatchNorm eval": Goal(2.0, None, None),
    "GroupNorm contiguous": Goal(2.0, 2.5, 0.9),
    "GroupNorm channels_last": Goal(3.0, 5.0, 0.9),
    "LayerNorm": Goal(1.8, 1.8, 0.9),
    "RMSNorm": Goal(4.0, 5.0, 0.9),
    "LocalResponseNorm": Goal(8.0, 5.0, None),
}
# against torch.compile, on tensors of at least 1 MiB: geometric mean, and the worst case
COMPILE_GOAL = (1.5, 1.0)
LARGE_BYTES = 2**20

_EXAMPLE = "the layer's own example"
_MOBILE, _EFFICIENT = "MobileNetV2", "EfficientNet-B0"
# (shape, network, of --quick)
_BATCH_2D: tuple[tuple[Shape, str, bool], ...] = (
    ((32, 64, 112, 112), "ResNet-50", False),
    ((32, 64, 56, 56), "ResNet-50", True),
    ((32, 256, 56, 56), "ResNet-50", False),
    ((32, 128, 28, 28), "ResNet-50", False),
    ((32, 512, 28, 28), "ResNet-50", False),
    ((32, 1024, 14, 14), "ResNet-50", False),
    ((32, 512, 7, 7), "ResNet-50", False),
    ((32, 2048, 7, 7), "ResNet-50", True),
    ((32, 16, 112, 112), _MOBILE, False),
    ((32, 24, 56, 56), _MOBILE, False),
    ((32, 144, 56, 56), _MOBILE, False),
    ((32, 40, 28, 28), _EFFICIENT, False),
    ((32, 672, 14, 14), _EFFICIENT, False),
    ((32, 1152, 7, 7), _EFFICIENT, False),
)
_BATCH_EVAL: tuple[tuple[Shape, str, bool], ...] = (
    ((1, 64, 112, 112), "ResNet-50, one picture", True),
    ((32, 64, 112, 112), "ResNet-50", False),
    ((32, 256, 56, 56), "ResNet-50", False),
    ((32, 1024, 14, 14), "ResNet-50", True),
    ((32, 2048, 7, 7), "ResNet-50", False),
    ((32, 24, 56, 56), _MOBILE, False),
)
_BATCH_1D: tuple[tuple[Shape, str, bool], ...] = (
    ((128, 3, 512), _EXAMPLE, True),
    ((4, 8), "a small step", False),
    ((256, 512), "a perceptron", True),
    ((1024, 64), "a perceptron", False),
    ((64, 128, 1024), "PointNet", True),
    ((32, 512, 4096), "PointNet", False),
    ((65536, 128), "PointNet, points in rows", False),
)
_NNUNET: tuple[tuple[Shape, bool], ...] = (
    ((2, 32, 128, 128, 128), False),
    ((2, 64, 64, 64, 64), False),
    ((2, 128, 32, 32, 32), True),
    ((2, 256, 16, 16, 16), False),
    ((2, 320, 8, 8, 8), True),
    ((2, 320, 4, 4, 4), False),
)
_CYCLEGAN: tuple[Shape, ...] = ((64, 256, 256), (128, 128, 128), (256, 64, 64))
_DIFFUSION: tuple[Shape, ...] = ((2, 320, 64, 64), (2, 640, 32, 32), (2, 1280, 16, 16))
_FEATURES: tuple[tuple[Shape, str, bool], ...] = (
    ((8, 1024, 768), "GPT-2", True),
    ((4096, 4096), "a 7B language model", False),
    ((2, 512, 1024), "BERT-large", True),
)
_LRN: tuple[tuple[Shape, str, bool], ...] = (
    ((32, 64, 27, 27), "AlexNet", True),
    ((8, 192, 13, 13), "AlexNet", True),
    ((8, 192, 56, 56), "GoogLeNet", False),
)


def _instance() -> Iterator[Case]:
    """CycleGAN's and style transfer's have no weights, nnU-Net's have."""
    three = {"num_features": 3}
    yield Case("InstanceNorm1d", three, (2, 3, 5), _EXAMPLE)
    yield Case("InstanceNorm2d", three, (1, 3, 2, 2), _EXAMPLE, quick=True)
    for channels_last in (False, True):
        yield Case("InstanceNorm2d", three, (2, 3, 256, 512), _EXAMPLE, channels_last, quick=True)
        for batch, network in ((1, "CycleGAN"), (8, "style transfer")):
            for size in _CYCLEGAN:
                kwargs, quick = {"num_features": size[0]}, (batch, size[0]) == (1, 64)
                whole = (batch, *size)
                yield Case("InstanceNorm2d", kwargs, whole, network, channels_last, quick=quick)
        for shape, quick in _NNUNET:
            kwargs = {"num_features": shape[1], "affine": True}
            yield Case("InstanceNorm3d", kwargs, shape, "nnU-Net", channels_last, quick=quick)


def _batch() -> Iterator[Case]:
    yield Case("BatchNorm2d", {"num_features": 3}, (2, 3, 5, 6), _EXAMPLE)
    for shape, network, quick in _BATCH_1D:
        yield Case("BatchNorm1d", {"num_features": shape[1]}, shape, network, quick=quick)
    for training, cases in ((True, _BATCH_2D), (False, _BATCH_EVAL)):
        for channels_last in (False, True):
            for shape, network, quick in cases:
                kwargs = {"num_features": shape[1]}
                yield Case("BatchNorm2d", kwargs, shape, network, channels_last, training, quick)


def _others() -> Iterator[Case]:
    for channels_last in (False, True):
        for size in _DIFFUSION:
            kwargs: dict[str, Any] = {"num_groups": 32, "num_channels": size[1]}
            quick = size[1] != 640
            yield Case("GroupNorm", kwargs, size, "diffusion U-Net", channels_last, quick=quick)
    for layer in ("LayerNorm", "RMSNorm"):
        for shape, network, quick in _FEATURES:
            yield Case(layer, {"normalized_shape": shape[-1]}, shape, network, quick=quick)
    kwargs = {"size": 5, "alpha": 1e-4, "beta": 0.75, "k": 2.0}
    for shape, network, quick in _LRN:
        yield Case("LocalResponseNorm", kwargs, shape, network, quick=quick)
    yield Case("LocalResponseNorm", kwargs, _LRN[0][0], "AlexNet", channels_last=True)


def _large() -> Iterator[Case]:
    """For a GPU: what fills its memory bandwidth, tensors of 64 MiB and more."""
    for channels_last in (False, True):
        kwargs: dict[str, Any] = {"num_features": 32, "affine": True}
        shape = (2, 32, 160, 160, 160)
        yield Case("InstanceNorm3d", kwargs, shape, "nnU-Net, patch 160³", channels_last)
        for channels, size in ((64, 112), (256, 56), (512, 28), (1024, 14), (2048, 7)):
            kwargs, quick = {"num_features": channels}, size == 56
            shape_2d = (256, channels, size, size)
            yield Case(
                "BatchNorm2d", kwargs, shape_2d, "ResNet-50, batch 256", channels_last, quick=quick
            )
        for channels, size in ((320, 64), (640, 32)):
            kwargs = {"num_groups": 32, "num_channels": channels}
            shape_2d = (32, channels, size, size)
            yield Case("GroupNorm", kwargs, shape_2d, "diffusion U-Net, batch 32", channels_last)
    for layer in ("LayerNorm", "RMSNorm"):
        kwargs = {"normalized_shape": 4096}
        yield Case(layer, kwargs, (16384, 4096), "a 7B language model, batch 4", quick=True)


FAMILIES = tuple(GOALS)
CASES = tuple(
    sorted((*_instance(), *_batch(), *_others()), key=lambda case: FAMILIES.index(case.family))
)
CUDA_CASES = tuple(sorted(_large(), key=lambda case: FAMILIES.index(case.family)))
LAYERS = tuple(dict.fromkeys(case.layer for case in CASES))
