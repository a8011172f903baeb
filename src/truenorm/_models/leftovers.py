"""What running or tracing somebody's forward leaves on the modules, and taking that away again."""

from __future__ import annotations

from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterable
from typing import Any

from torch.nn import Module

_CONTAINERS = (dict, OrderedDict, defaultdict, list, set, deque)


def copied(value: Any) -> Any:
    """The items of a container that a forward may write to; None for everything else."""
    if type(value) not in _CONTAINERS:
        return None
    return list(value.items()) if isinstance(value, dict) else list(value)


def _same(one: list[Any], other: list[Any], pairs: bool) -> bool:
    if len(one) != len(other):
        return False
    if pairs:
        return all(a is c and b is d for (a, b), (c, d) in zip(one, other, strict=True))
    return all(a is b for a, b in zip(one, other, strict=True))


def put_back(value: Any, items: list[Any]) -> bool:
    """Give a container these items again; whether it had others."""
    if _same(copied(value), items, isinstance(value, dict)):
        return False
    value.clear()
    value.extend(items) if isinstance(value, (list, deque)) else value.update(items)
    return True


class Attributes:
    """The attributes of some modules, as they were: torch.fx adds one for each constant."""

    def __init__(self, modules: Iterable[Module]) -> None:
        self._held = [
            (vars(m), [(name, value, copied(value)) for name, value in vars(m).items()])
            for m in modules
        ]

    def restore(self) -> bool:
        """Put them back; whether one had changed."""
        changed = False
        for now, before in self._held:
            names = {name for name, _, _ in before}
            for name in now.keys() - names:
                del now[name]
                changed = True
            for name, value, items in before:
                if name not in now or now[name] is not value:
                    now[name] = value
                    changed = True
                if items is not None:
                    changed |= put_back(value, items)
        return changed
