"""Hugging Face's `kernels`: what it must be told, to put truenorm into the layers that it knows.

Its mapping goes from a name to a layer for each device, and one name, "RMSNorm", stands for classes
of every order of casts. But the forward that it binds to a module is given that module: truenorm's
looks up what the module's own class computes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor
from torch.nn import Module

from .rules.recognise import recognise
from .rules.swapping import still_proven
from .swap import Kind

_kinds: WeakKeyDictionary[Module, Kind | None] = WeakKeyDictionary()


def _as_served(module: Module) -> Module:
    """The module as an instance of the class that `convert` would give it; else the module."""
    try:
        kind = _kinds[module]
    except KeyError:
        found = recognise(module)
        kind = _kinds[module] = None if found is None else found.kind
    if kind is None or not still_proven(module, kind):
        return module
    shown: Module = kind.__new__(kind)
    # one and the same state: what is set on either is set on both
    object.__setattr__(shown, "__dict__", vars(module))
    return shown


class Norm(Module):
    """A layer for `kernels`: stateless, and its forward is bound to the module that it serves."""

    can_torch_compile = False  # the class's own operators are fused with their neighbours
    has_backward = True

    def forward(self, hidden_states: Tensor) -> Any:
        served = _as_served(self)
        return type(served).forward(served, hidden_states)


class GatedNorm(Module):
    """The same for one with a gate."""

    can_torch_compile = False
    has_backward = True

    def forward(self, hidden_states: Tensor, gate: Tensor | None = None) -> Any:
        served = _as_served(self)
        return type(served).forward(served, hidden_states, gate)


@dataclass(frozen=True)
class Repository:
    """Where `kernels` finds a layer: here, not on the Hub."""

    layer: Kind

    def load(self) -> Kind:
        return self.layer

    def __str__(self) -> str:
        return f"truenorm, layer `{self.layer.__name__}`"


def kernel_mapping() -> dict[str, dict[str, Any]]:
    """What lets Hugging Face's `kernels` put truenorm into the norms that it knows by name.

        with kernels.use_kernel_mapping(truenorm.kernel_mapping()):
            kernels.kernelize(model, mode=kernels.Mode.TRAINING, device="cpu")

    For transformers' names "RMSNorm", "RMSNormGated" and "RMSNormZeroCentered", on "cpu" and
    "cuda". Each module keeps its own class's order of casts, proven as `convert` proves it; one
    whose class is not recognised, and a mode with torch.compile, keeps its own forward.
    """
    layers = {"RMSNorm": Norm, "RMSNormGated": GatedNorm, "RMSNormZeroCentered": Norm}
    return {
        name: dict.fromkeys(("cpu", "cuda"), Repository(layer)) for name, layer in layers.items()
    }
