"""The explanation pictures of the four main layers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ... import nn
from ..explain import explain


def explain_all(
    examples: Sequence[tuple[str, str, tuple[int, ...]]], folder: Path
) -> dict[str, tuple[str, float, float]]:
    """Draw (file, layer, shape) each; by file: title, and truenorm's and torch's error."""
    explained = {}
    for file, name, shape in examples:
        e = explain(getattr(nn, name)(shape[1]), shape, picture=folder / file)
        by_hand = e.differences
        explained[file] = (e.title, by_hand["truenorm and by hand"], by_hand["torch and by hand"])
    return explained
