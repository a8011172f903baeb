"""The norms of a whole model that are swapped by a rule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from torch.nn import Module

from ...nn._ruled import Ruled
from .. import swap
from ..swap import Kind, Left
from .recognise import Found, recognise
from .swapping import derived


def find(
    model: Module, rounding: str, progress: Callable[[str], None] | None = None
) -> dict[Module, tuple[str, Found]]:
    """By module, its name and what was found out; those that are swapped already, too."""
    found = {}
    for name, module in model.named_modules():
        kind = swap.core(module)
        if progress is not None:
            progress(name)
        if issubclass(kind, Ruled):
            again = derived(kind._theirs, kind._read, kind._proof, rounding)
            if again is not kind:
                found[module] = name, Found(kind._read, again, "")
        elif (what := recognise(module)) is not None:
            if what.kind is not None and what.rule is not None and rounding != "module":
                proof = cast(Any, what.kind)._proof
                what = what._replace(kind=derived(kind, what.rule, proof, rounding))
            found[module] = name, what
    return found


def swappable(
    found: dict[Module, tuple[str, Found]],
) -> tuple[dict[Module, Kind], list[Left]]:
    """The class that each module would have, and those whose instance stands in the way."""
    kinds: dict[Module, Kind] = {}
    left = []
    for module, (name, what) in found.items():
        if what.kind is None:
            continue
        if (why := swap.obstacle(module, what.kind)) is not None:
            left.append(Left(name, swap.core(module), why, True))
        else:
            kinds[module] = what.kind
    return kinds, left
