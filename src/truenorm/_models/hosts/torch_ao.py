"""torch.ao.quantization: `prepare` and `convert` take a layer by itself as torch's class.

What follows a convolution is for `fuse_modules`, which takes `truenorm.fuse_config()`.
"""

from __future__ import annotations

from typing import Any

from torch.nn import Module

from . import layers

_REMEDY = "call truenorm.unfuse(model) or truenorm.revert(model) before you quantize"


def register(mappings: Any) -> None:
    static = mappings.DEFAULT_STATIC_QUANT_MODULE_MAPPINGS
    for ours, theirs in layers.like(static).items():
        static[ours] = _quantized(static[theirs])


def _quantized(kind: Any) -> type:
    """What `convert` asks for a quantized layer; the layer itself is torch's."""

    class Quantized:
        @classmethod
        def from_float(cls, mod: Module, use_precomputed_fake_quant: bool = False) -> Module:
            if options := layers.beyond(mod):
                raise NotImplementedError(
                    layers.stranger(mod, options, "torch.ao.quantization", _REMEDY)
                )
            made: Module = kind.from_float(mod, use_precomputed_fake_quant)
            return made

    Quantized.__name__ = Quantized.__qualname__ = kind.__name__
    return Quantized
