"""Captum: layerwise relevance propagation takes a layer by the rule of torch's class."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch.nn import Module

from . import layers

_REMEDY = "call truenorm.unfuse(model) or truenorm.revert(model) first, or give the layer a `rule`"


def register(lrp: Any) -> None:
    rules = lrp.SUPPORTED_LAYERS_WITH_RULES
    for ours, theirs in layers.like(rules).items():
        rules[ours] = _checked(rules[theirs])
    lrp.LRP._clear_properties = _sparing_ours(lrp.LRP._clear_properties)


def _checked(rule: Any) -> Any:
    def forward_hook(self: Any, module: Module, inputs: Any, outputs: Any) -> Any:
        if options := layers.beyond(module):
            raise NotImplementedError(layers.stranger(module, options, "Captum's LRP", _REMEDY))
        return rule.forward_hook(self, module, inputs, outputs)

    return type(rule.__name__, (rule,), {"forward_hook": forward_hook, "__doc__": rule.__doc__})


def _sparing_ours(clear: Callable[[Any], None]) -> Callable[[Any], None]:
    """Captum ends by deleting `activation` of every layer: of truenorm's that is an option."""

    @functools.wraps(clear)
    def clear_theirs(self: Any) -> None:
        every = self.layers
        self.layers = [layer for layer in every if type(layer) not in layers.TORCHS]
        try:
            clear(self)
        finally:
            self.layers = every

    return clear_theirs
