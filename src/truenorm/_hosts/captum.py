"""Captum: layerwise relevance propagation takes a layer by the rule of torch's class."""

from __future__ import annotations

from typing import Any

from torch.nn import Module

from . import layers

_REMEDY = "call truenorm.unfuse(model) or truenorm.revert(model) first, or give the layer a `rule`"


def register(lrp: Any) -> None:
    rules = lrp.SUPPORTED_LAYERS_WITH_RULES
    for ours, theirs in layers.like(rules).items():
        rules[ours] = _checked(rules[theirs])


def _checked(rule: Any) -> Any:
    def forward_hook(self: Any, module: Module, inputs: Any, outputs: Any) -> Any:
        if options := layers.beyond(module):
            raise NotImplementedError(layers.stranger(module, options, "Captum's LRP", _REMEDY))
        return rule.forward_hook(self, module, inputs, outputs)

    return type(rule.__name__, (rule,), {"forward_hook": forward_hook, "__doc__": rule.__doc__})
