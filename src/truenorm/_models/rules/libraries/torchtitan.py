"""torchtitan: torch's RMSNorm with another weight, and Qwen3.5's own two."""

from __future__ import annotations

from typing import Any

from ...._core.rule import Rule

_RULES = {
    "qwen3_5.model.OffsetRMSNorm": Rule("rms", offset=1.0),
    "qwen3_5.model.RMSNormGated": Rule("rms", gate="after"),
}


def read(module: Any, kind: type) -> Rule | None:
    name = f"{kind.__module__}.{kind.__qualname__}".removeprefix("torchtitan.models.")
    if name == "muse_glimmer.model.RMSGainCenterNorm":
        return Rule("rms", offset=float(module.gain_center), wide_offset=False)
    return _RULES.get(name)
