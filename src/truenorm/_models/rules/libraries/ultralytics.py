"""ultralytics: LayerNorm over channels, by torch's layer_norm; by hand in older versions."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ...._core.rule import Rule


def read(module: Any, kind: type) -> Iterable[Rule] | None:
    if f"{kind.__module__}.{kind.__qualname__}" == "ultralytics.nn.modules.transformer.LayerNorm2d":
        rule = Rule("layer", bias="bias", axis=1)
        return [rule, rule._replace(rounding="steps")]
    return None
