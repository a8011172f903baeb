"""torchvision: BatchNorm that never moves, and ConvNeXt's LayerNorm over channels."""

from __future__ import annotations

from typing import Any

from ...._core.rule import Rule

_RULES = {
    "torchvision.ops.misc.FrozenBatchNorm2d": Rule("frozen", "steps", bias="bias", axis=1),
    "torchvision.models.convnext.LayerNorm2d": Rule("layer", bias="bias", axis=1),
}


def read(module: Any, kind: type) -> Rule | None:
    return _RULES.get(f"{kind.__module__}.{kind.__qualname__}")
