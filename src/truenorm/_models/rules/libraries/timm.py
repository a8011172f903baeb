"""timm: torch's norms with forwards of its own, norms with an activation behind them, RmsNorm."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ...._core.rule import Rule

_CONV = Rule("weight", "steps", weight=None)
_AFTER = ("drop", "act")
_GROUP = Rule("group", bias="bias", axis=1, groups="num_groups")
_LAYER = Rule("layer", bias="bias")
_RMS = Rule("rms")
_RULES: dict[str, Rule | tuple[Rule, ...]] = {
    "norm.GroupNorm": _GROUP,
    "norm.GroupNorm1": _GROUP,
    "norm.LayerNorm": _LAYER,
    "norm.LayerNormFp32": _LAYER,
    "norm.LayerNorm2d": _LAYER._replace(axis=1),
    "norm.LayerNorm2dFp32": _LAYER._replace(axis=1),
    # by torch's rms_norm where that is there, else by hand
    "norm.RmsNorm": (_RMS, _RMS._replace(wide_output=True), _RMS._replace(rounding="steps")),
    "norm.RmsNormFp32": _RMS,
    "norm.RmsNorm2d": _RMS._replace(axis=1, rounding="steps"),
    "norm.RmsNorm2dFp32": _RMS._replace(axis=1),
    "std_conv.StdConv2d": _CONV,
    "std_conv.StdConv2dSame": _CONV,
    "std_conv.ScaledStdConv2d": _CONV._replace(weight="gain"),
    "std_conv.ScaledStdConv2dSame": _CONV._replace(weight="gain"),
    "norm_act.BatchNormAct2d": Rule("batch", bias="bias", axis=1, after=_AFTER),
    "norm_act.FrozenBatchNormAct2d": Rule("frozen", "steps", bias="bias", axis=1, after=_AFTER),
    "norm_act.GroupNormAct": _GROUP._replace(after=_AFTER),
    "norm_act.GroupNorm1Act": _GROUP._replace(after=_AFTER),
    "norm_act.LayerNormAct": _LAYER._replace(after=_AFTER),
    "norm_act.LayerNormActFp32": _LAYER._replace(after=_AFTER),
    "norm_act.LayerNormAct2d": _LAYER._replace(axis=1, after=_AFTER),
    "norm_act.LayerNormAct2dFp32": _LAYER._replace(axis=1, after=_AFTER),
    "norm_act.RmsNormAct2d": _RMS._replace(axis=1, rounding="steps", after=_AFTER),
    "norm_act.RmsNormAct2dFp32": _RMS._replace(axis=1, after=_AFTER),
}


def read(module: Any, kind: type) -> Rule | Iterable[Rule] | None:
    name = f"{kind.__module__}.{kind.__qualname__}".removeprefix("timm.layers.")
    if name == "grn.GlobalResponseNorm":
        axis = 1 if module.channel_dim == 1 else -1
        return Rule("response", "steps", bias="bias", axis=axis)
    return _RULES.get(name)
