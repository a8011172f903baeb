"""Which nodes of a graph may see, and write to, the memory of which."""

from __future__ import annotations

from collections.abc import Container, Iterator
from types import FunctionType
from typing import Any

from torch.fx import Node
from torch.nn import Module

from ..._core import activation
from ..._core.graphs.nodes import IN_PLACE
from ...nn._options import options_of
from ..layers import has_hooks
from .tracing import unpacked


def module_of(root: Module, node: Node) -> Module | None:
    return root.get_submodule(str(node.target)) if node.op == "call_module" else None


def is_plain(module: Module) -> bool:
    """No hooks, and the forward of its class."""
    return not has_hooks(module) and "forward" not in vars(module)


def _overwrites(root: Module, node: Node) -> bool:
    """Whether a node may write over its first tensor."""
    if (module := module_of(root, node)) is not None:
        own = options_of(module).overwrite_input
        return own or bool(getattr(module, "inplace", False))
    target = node.target
    if target is unpacked:
        return False
    if isinstance(target, FunctionType) and not target.__module__.startswith("torch."):
        return True  # who knows
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__")
    asked = activation.argument(target, "inplace", node.args, node.kwargs)
    return in_place or bool(asked) or target in IN_PLACE


def _sees(node: Node) -> list[Node]:
    """Whose memory a node's output may be; a module's is its own."""
    if node.op not in ("call_function", "call_method"):
        return []
    return [a for a in node.all_input_nodes if a.op != "get_attr"]


def _memory(source: Any) -> set[Node]:
    """The nodes whose memory may be that of `source`."""
    if not isinstance(source, Node):
        return set()
    found, waiting = set(), [source]
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += _sees(node)
            waiting += [user for user in node.users if node in _sees(user)]
    return found


def is_alone(norm: Node) -> bool:
    """Whether nothing but this call knows its input."""
    source = norm.args[0]
    return _memory(source) <= {source, norm} and isinstance(source, Node) and len(source.users) == 1


def lasts(root: Module, source: Any, first: Node, last: Node, but: Container[Node]) -> bool:
    """Whether `source` is the same at `last`, where it is read, as it was at `first`."""
    memory = _memory(source)
    node = first.next
    while node is not last:
        written = node.args[0] if node.args else None
        if node not in but and written in memory and _overwrites(root, node):
            return False
        node = node.next
    return True


def is_left(root: Module, source: Node, last: Node) -> bool:
    """Whether nothing writes between the two, nor knows `source` that could do so unseen."""
    memory = _memory(source)
    node = source.next
    while node is not last:
        unseen = node.op == "call_module" and not memory.isdisjoint(node.all_input_nodes)
        if unseen or _overwrites(root, node):
            return False
        node = node.next
    return True


def may_write(root: Module, first: Node, last: Node) -> Iterator[tuple[Module, bool, str]]:
    """What does not write over its input now might do so later."""
    node = first.next
    while node is not last:
        between = module_of(root, node)
        if between is not None and hasattr(between, "inplace"):
            yield between, False, "inplace"
        node = node.next
