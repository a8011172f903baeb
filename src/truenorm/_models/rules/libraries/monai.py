"""MONAI: MAISI's GroupNorm, group by group in float32; the rest is torch's own."""

from __future__ import annotations

from typing import Any

from ...._core.rule import Rule


def read(module: Any, kind: type) -> Rule | None:
    if kind.__module__.startswith("monai.apps.generation.maisi.") and (
        kind.__name__ == "MaisiGroupNorm3D"
    ):
        return Rule("group", "steps", bias="bias", axis=1, groups="num_groups")
    return None
