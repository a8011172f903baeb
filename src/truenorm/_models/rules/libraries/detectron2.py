"""detectron2: BatchNorm that never moves, and LayerNorm over channels."""

from __future__ import annotations

from typing import Any

from ...._core.rule import Rule

_RULES = {
    "detectron2.layers.batch_norm.FrozenBatchNorm2d": Rule("frozen", "steps", bias="bias", axis=1),
    "detectron2.layers.batch_norm.LayerNorm": Rule("layer", "steps", bias="bias", axis=1),
}


def read(module: Any, kind: type) -> Rule | None:
    return _RULES.get(f"{kind.__module__}.{kind.__qualname__}")
