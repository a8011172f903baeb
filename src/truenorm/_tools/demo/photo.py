"""Two real photographs, normalized together by batch statistics and each by its own."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from sklearn.datasets import load_sample_image
from torch import Tensor

from ... import nn, reference
from ..explain.explanation import largest_difference

NAMES = ("china.jpg", "flower.jpg")
OFFSETS = (0.0, 1e2, 1e4)
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@dataclass(frozen=True)
class Photographs:
    """x: both photographs as one batch (2, 3, H, W) in [0, 1]; and what the layers make of it."""

    x: Tensor
    by_batch: Tensor
    by_instance: Tensor


@dataclass(frozen=True)
class PhotoError:
    """The largest errors against float64, in standard deviations, of one layer on the photographs.

    offset: added to every pixel before (the formula is not changed by it: the mean is subtracted).
    """

    layer: str
    layout: str
    offset: float
    torch: float
    truenorm: float


def _layers() -> dict[str, tuple[torch.nn.Module, torch.nn.Module]]:
    return {
        "BatchNorm2d": (torch.nn.BatchNorm2d(3), nn.BatchNorm2d(3)),
        "InstanceNorm2d": (torch.nn.InstanceNorm2d(3), nn.InstanceNorm2d(3)),
    }


def load() -> Tensor:
    """(2, 3, H, W): china.jpg and flower.jpg, which scikit-learn ships in one size."""
    pictures = [torch.as_tensor(load_sample_image(name).copy()) for name in NAMES]
    return (torch.stack(pictures).permute(0, 3, 1, 2).float() / 255.0).contiguous()


@torch.no_grad()
def normalize(x: Tensor) -> Photographs:
    layers = _layers()
    return Photographs(x, layers["BatchNorm2d"][1](x), layers["InstanceNorm2d"][1](x))


@torch.no_grad()
def errors(x: Tensor) -> list[PhotoError]:
    """Both libraries against `truenorm.reference`, which gets the very same float32 input."""
    found = []
    for name, (theirs, ours) in _layers().items():
        for layout, memory_format in LAYOUTS.items():
            for offset in OFFSETS:
                shifted = (x + offset).contiguous(memory_format=memory_format)
                formula = reference.batch_norm if name == "BatchNorm2d" else reference.instance_norm
                true = formula(shifted)
                found.append(
                    PhotoError(
                        layer=name,
                        layout=layout,
                        offset=offset,
                        torch=largest_difference(theirs(shifted), true),
                        truenorm=largest_difference(ours(shifted), true),
                    )
                )
    return found
