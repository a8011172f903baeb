"""The norms of each library, by the names of its classes; none of them is imported."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from ...._core.rule import Rule
from . import diffusers, timm, torchvision, transformers

# by the package that a class is from: its rule, several to be tried in turn, or None: by formula
READERS: dict[str, Callable[[Any, type], Rule | Iterable[Rule] | None]] = {
    "diffusers": diffusers.read,
    "timm": timm.read,
    "torchvision": torchvision.read,
    "transformers": transformers.read,
}
