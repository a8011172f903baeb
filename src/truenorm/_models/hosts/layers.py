"""truenorm's layers beside torch's, and which of them do what torch's do."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import Module

from ... import nn

TORCHS: dict[type[Module], type[Module]] = {
    getattr(nn, name): getattr(torch.nn, name) for name in nn.__all__
}

# options that change what a layer computes of its input, its parameters and its statistics
_OTHERWISE = ("activation", "channel_axis", "process_group", "renorm", "virtual_batch_size")


def like(kinds: Any) -> dict[type[Module], type[Module]]:
    """Those of truenorm's classes, with torch's, whose torch class is among `kinds`."""
    return {ours: theirs for ours, theirs in TORCHS.items() if theirs in kinds}


def chosen(layer: Any) -> dict[str, Any]:
    """The options of a layer of truenorm's that differ from their defaults."""
    found: dict[str, Any] = layer._chosen()
    return found


def beyond(layer: Any) -> dict[str, Any]:
    """The options of a layer that make it compute something else than torch's class does."""
    held = chosen(layer) if type(layer) in TORCHS else {}
    return {name: value for name, value in held.items() if name in _OTHERWISE}


def stranger(layer: Module, options: dict[str, Any], to: str, remedy: str) -> str:
    """Why a layer with such options is refused."""
    named = ", ".join(f"{name}={value!r}" for name, value in options.items())
    return f"{to} does not know what truenorm's {type(layer).__name__} does with {named}: {remedy}"
