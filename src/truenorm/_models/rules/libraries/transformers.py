"""transformers: some 250 classes, copied from model to model, of a dozen forms.

Each class is told by the end of its name and by what it holds; where that leaves a choice, the
rules are tried in turn, and a class is what it is proven to be.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ...._core.rule import Rule

# x · (w · rsqrt(var + eps)) + (b − mean · w · rsqrt(var + eps)), eps in the code
_FROZEN = Rule("frozen", "steps", bias="bias", eps=1e-5, axis=1)


def _rms(eps: str, weight: str | None) -> Iterable[Rule]:
    rule = Rule("rms", eps=eps, weight=weight)
    if weight is None:
        return [rule]
    return [
        rule._replace(rounding="cast_first"),  # Llama and 140 more
        rule,  # torch's order: GptOss, NemotronH, OLMo, Moshi
        rule._replace(offset=1.0),  # Gemma, Qwen3-Next
        rule._replace(rounding="to_weight"),  # T5
        rule._replace(offset=1.0, rounding="cast_first", wide_offset=False),
        rule._replace(offset=1.0, wide_offset=False),
        rule._replace(wide_output=True),
        rule._replace(rounding="steps"),
    ]


def _gated(module: Any, eps: str) -> Iterable[Rule]:
    """An RMSNorm that takes a gate too: three orders, and groups."""
    held = vars(module)
    rule = Rule(
        "rms",
        eps=eps,
        gate="before",
        gate_act=held.get("activation", "silu"),
        groups="n_groups" if "n_groups" in held else None,
        group_size="group_size" if "group_size" in held else None,
    )
    within = rule._replace(gate="within")
    if held.get("norm_before_gate"):
        return [within]
    return [
        rule._replace(rounding="cast_first"),  # Mamba2, Bamba, Zamba2, NemotronH
        rule,  # FalconH1
        rule._replace(rounding="cast_first", gate="after"),  # Qwen3-Next, Qwen3.5, OLMo-hybrid
        within,  # Kimi-Linear, Bailing
    ]


def _layer(module: Any, kind: type, eps: str) -> Iterable[Rule]:
    held = module._parameters
    weight = "weight" if held.get("weight") is not None else None
    bias = "bias" if held.get("bias") is not None else None
    # SAM's, ConvNeXt's: told where the channels are
    axis = 1 if getattr(module, "data_format", None) == "channels_first" else -1
    if kind.__name__.endswith(("LayerNorm2d", "LayerNorm2D")):
        axis = 1
    rule = Rule("layer", eps=eps, weight=weight, bias=bias, axis=axis)
    return [
        rule,
        rule._replace(rounding="cast_first"),  # DeBERTa
        rule._replace(offset=1.0, wide_offset=False),  # Nemotron
        rule._replace(rounding="steps"),
        rule._replace(axis=1),  # SqueezeBert
        rule._replace(rounding="steps", axis=1),  # VitDet
    ]


def read(module: Any, kind: type) -> Rule | Iterable[Rule] | None:
    """By the end of the class's name; None leaves it to its formula."""
    name = kind.__name__
    if name.endswith("FrozenBatchNorm2d"):
        return _FROZEN
    if name == "OlmoLayerNorm":
        return Rule("layer", weight=None, eps=1e-5)
    if name == "ChameleonLayerNorm":
        return Rule("layer", "cast_first", bias="bias", eps=1e-5)
    held = vars(module)
    if name == "ConvNextV2GRN":
        return Rule("response", "steps", bias="bias", eps=1e-6)
    if name == "BitGroupNormActivation":
        return Rule("group", bias="bias", axis=1, groups="num_groups", after=("activation",))
    if name == "WeightStandardizedConv2d":  # BiT's
        return Rule("weight", "steps", weight=None)
    eps = next((n for n in ("variance_epsilon", "eps", "epsilon") if n in held), None)
    if eps is None:
        return None
    params = module._parameters
    weight = "weight" if params.get("weight") is not None else None
    if name.endswith("RMSNormGated"):
        return _gated(module, eps)
    if name.endswith("RMSNorm") or (name.endswith("LayerNorm") and "T5" in name):
        return _rms(eps, weight) if len([p for p in params.values() if p is not None]) < 2 else None
    if "LayerNorm" in name and "normalized_shape" in held:
        return _layer(module, kind, eps)
    return None
