"""The norms of each library, by the names of its classes; none of them is imported."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from ...._core.rule import Rule
from . import (
    detectron2,
    diffusers,
    monai,
    segment_anything,
    timm,
    torchtitan,
    torchvision,
    transformers,
    ultralytics,
)

# by the package that a class is from: its rule, several to be tried in turn, or None: by formula
READERS: dict[str, Callable[[Any, type], Rule | Iterable[Rule] | None]] = {
    "detectron2": detectron2.read,
    "diffusers": diffusers.read,
    "monai": monai.read,
    "segment_anything": segment_anything.read,
    "timm": timm.read,
    "torchtitan": torchtitan.read,
    "torchvision": torchvision.read,
    "transformers": transformers.read,
    "ultralytics": ultralytics.read,
}
