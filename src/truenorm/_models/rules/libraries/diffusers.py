"""diffusers: T5's RMSNorm with a bias if asked, and LayerNorm in float32."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ...._core.rule import Rule


def read(module: Any, kind: type) -> Rule | Iterable[Rule] | None:
    name = f"{kind.__module__}.{kind.__qualname__}".removeprefix("diffusers.models.")
    held = module._parameters
    weight = "weight" if held.get("weight") is not None else None
    bias = "bias" if held.get("bias") is not None else None
    short = kind.__name__
    if short.endswith(("GlobalResponseNorm", "GRN")) and "gamma" in held:
        return Rule("response", "steps", "gamma", "beta", eps=1e-6)
    if "scale" in vars(module) and "gamma" in held and short.lower().endswith(("norm", "norm3d")):
        # Wan's, QwenImage's, HunyuanVideo 1.5's: the channels are first unless told otherwise
        axis = 1 if getattr(module, "channel_first", True) else -1
        return Rule("l2", "steps", "gamma", bias, eps=1e-12, axis=axis)
    match name:
        case "normalization.RMSNorm":
            return Rule("rms", "once" if weight is None else "to_weight", weight, bias)
        case "normalization.MochiRMSNorm":
            return Rule("rms", weight=weight)
        case "normalization.FP32LayerNorm" | "normalization.LayerNorm":
            return Rule("layer", weight=weight, bias=bias)
    return None
