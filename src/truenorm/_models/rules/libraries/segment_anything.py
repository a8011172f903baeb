"""segment-anything: LayerNorm over channels, by hand."""

from __future__ import annotations

from typing import Any

from ...._core.rule import Rule


def read(module: Any, kind: type) -> Rule | None:
    if f"{kind.__module__}.{kind.__qualname__}" == "segment_anything.modeling.common.LayerNorm2d":
        return Rule("layer", "steps", bias="bias", axis=1)
    return None
