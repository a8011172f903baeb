"""What a forward may be called with, and the arguments that it only hands on."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

from torch.fx import Graph, Node
from torch.nn import Module

from .classes import written
from .codes import Unreadable

_NONE = object()
PROBE = "_truenorm_more"
_DEFAULTS = (type(None), bool, int, float, str)


class Given(NamedTuple):
    """How a call that is traced gives a forward its arguments.

    constants: those that stand for themselves, not for what a call may bring.
    by_name: those that are given by name; the others by place.
    left_out: those that are not given.
    """

    constants: dict[str, Any]
    by_name: frozenset[str] = frozenset()
    left_out: frozenset[str] = frozenset()


class Signature:
    """A forward as it was written, and what it may be called with by name.

    `*args` and `**kwargs` are what a graph's calls have none of.
    """

    def __init__(self, kind: type[Module]) -> None:
        self.forward: Any = written(kind)
        first, *self.all = inspect.signature(self.forward).parameters.values()
        variable = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
        self.named = [p for p in self.all if p.kind not in variable]
        self.more = next((f"**{p.name}" for p in self.all if p.kind is p.VAR_KEYWORD), "")
        self.defaults = {p.name: p.default for p in self.named if p.default is not p.empty}
        if first.kind in variable or any(p.kind is p.POSITIONAL_ONLY for p in self.named):
            raise Unreadable("the forward has arguments without a name")
        missing = [p.default is p.empty for p in self.named]
        if sorted(missing, reverse=True) != missing:
            raise Unreadable("the forward has an argument that must be given by name")
        if unlike := [n for n, value in self.defaults.items() if not _is_written(value)]:
            raise Unreadable(f"the default of {unlike[0]!r} is neither a number nor a string")

    def arguments(self, values: dict[str, Any], given: Given) -> tuple[list[Any], dict[str, Any]]:
        """By place, and by name."""
        by_place: list[Any] = []
        by_name: dict[str, Any] = {}
        for p in self.named:
            if p.name in given.left_out:
                continue
            # behind one that is not given, there is no place
            in_place = p.kind is p.POSITIONAL_OR_KEYWORD and not by_name
            if in_place and p.name not in given.by_name and not self._skipped(p.name, given):
                by_place.append(values[p.name])
            else:
                by_name[p.name] = values[p.name]
        return by_place, by_name

    def _skipped(self, name: str, given: Given) -> bool:
        names = [p.name for p in self.named]
        return any(n in given.left_out for n in names[: names.index(name)])


def _is_written(value: Any) -> bool:
    """Whether its repr is it."""
    return type(value) in _DEFAULTS and repr(value) not in ("nan", "inf", "-inf")


def handing_on(module: Module, more: dict[str, Any], /, *args: Any, **named: Any) -> Any:
    """A call with whatever else the forward was called with by name."""
    return module(*args, **named, **more)


def hand_on(graph: Graph) -> None:
    """What was called with the stand-in for **kwargs is called with these."""
    for node in list(graph.nodes):
        if PROBE not in node.kwargs:
            continue
        named = dict(node.kwargs)
        with graph.inserting_before(node):
            module = graph.get_attr(str(node.target))
            args = module, named.pop(PROBE), *node.args
            call = graph.call_function(handing_on, args, named)
        node.replace_all_uses_with(call)
        graph.erase_node(node)


def same_but_for(graph: Graph, other: Graph, constants: dict[str, Any]) -> bool:
    """Whether the other graph is this one, with constants in the place of its inputs."""
    if len(graph.nodes) != len(other.nodes):
        return False
    meant: dict[Node, Node] = {}

    def alike(a: Any, b: Any) -> bool:
        if isinstance(a, Node):
            if meant.get(a) is b:
                return True
            constant = constants.get(str(a.target), _NONE) if a.op == "placeholder" else _NONE
            return type(constant) is type(b) and bool(constant == b)
        if isinstance(a, dict) and isinstance(b, dict):
            return list(a) == list(b) and all(alike(a[k], b[k]) for k in a)
        if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
            return len(a) == len(b) and all(map(alike, a, b))
        if isinstance(a, slice) and isinstance(b, slice):
            return alike((a.start, a.stop, a.step), (b.start, b.stop, b.step))
        return type(a) is type(b) and bool(a == b)

    for a, b in zip(graph.nodes, other.nodes, strict=True):
        if a.op != b.op or a.target != b.target:
            return False
        named = dict(a.kwargs)
        if a.op == "call_module":
            named.pop(PROBE, None)
        if a.op != "placeholder" and not alike((a.args, named), (b.args, dict(b.kwargs))):
            return False
        meant[a] = b
    return True
