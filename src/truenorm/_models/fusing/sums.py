"""A sum and the norm of it, h = x + r and norm(h), as the one call that a layer has for both."""

from __future__ import annotations

import operator
from collections.abc import Callable, Container, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.fx import Graph, Node
from torch.nn import Module

from ..._core import added, recomputed
from ...nn._options import options_of
from ...nn._orders import has_pass
from ...nn._padded import PaddedRows
from ...nn._ruled import Ruled
from .memory import is_left, is_plain, may_write, module_of

# bytes of an input from which on a whole step takes less; see docs/performance.md
LARGE = 4 << 20


def _at_once(layer: Any, x: Any, other: Any) -> tuple[Tensor, Tensor] | None:
    """(layer(h), h) of h = x + other by one pass; None where that takes more time than two."""
    if not added.is_large(x, other) or is_compiling() or recomputed.asked():
        return None
    return layer.of_sum(x, other) if isinstance(layer, Ruled) else layer(x, add=other)


def pay(*inputs: Any) -> bool:
    """Whether a module's inputs are so large that one pass for a sum and its norm takes less."""
    return any(getattr(each, "nbytes", 0) >= LARGE for each in inputs)


def _calls(add: Callable[[Any, Any], Any], name: str) -> Callable[..., tuple[Any, Any]]:
    """A graph holds no functions but those that it calls: one for each way of adding."""

    def call_of_sum(layer: Any, x: Any, other: Any) -> tuple[Any, Any]:
        made = _at_once(layer, x, other)
        if made is not None:
            return made
        h = add(x, other)
        return layer(h), h

    call_of_sum.__qualname__ = call_of_sum.__name__ = name
    return call_of_sum


by_operator = _calls(operator.add, "by_operator")
by_function = _calls(torch.add, "by_function")
by_method = _calls(lambda x, other: x.add(other), "by_method")
# in place, whoever else knows x would see the sum
_BY: dict[Any, Callable[..., tuple[Any, Any]]] = {
    operator.add: by_operator,
    torch.add: by_function,
    "add": by_method,
}


class Sum(NamedTuple):
    """A sum, and a layer's call on it."""

    add: Node
    norm: Node


def takes_sums(module: Module) -> bool:
    """Whether a layer has a pass for a sum and its norm."""
    if isinstance(module, Ruled):
        # a class that somebody derived from that may do more
        return "_rule" in vars(type(module)) and has_pass(module._rule)
    ours = isinstance(module, PaddedRows) and type(module).forward.__module__.startswith(
        "truenorm."
    )
    if not ours:
        return False
    options = options_of(module)
    return options.activation is None and not options.overwrite_input


def _adds(node: Node) -> bool:
    """Whether it is the sum of two and nothing else."""
    if node.op not in ("call_function", "call_method") or node.target not in _BY or node.kwargs:
        return False
    return len(node.args) == 2 and all(isinstance(a, Node) for a in node.args)


def find(
    root: Module,
    graph: Graph,
    but: Container[Node],
    layers: Callable[[Module], bool] = takes_sums,
) -> list[Sum]:
    """Each of these layers' calls on a sum that is still what it was; no node of it in `but`."""
    found: list[Sum] = []
    taken: set[Node] = set()
    for norm in graph.nodes:
        layer = module_of(root, norm)
        if layer is None or norm in but or not (is_plain(layer) and layers(layer)):
            continue
        add = norm.args[0] if len(norm.args) == 1 and not norm.kwargs else None
        if not isinstance(add, Node) or not _adds(add) or add in but or add in taken:
            continue
        # the norm is called where the sum is made
        if is_left(root, add, norm):
            taken.add(add)
            found.append(Sum(add, norm))
    return found


def replace(graph: Graph, found: list[Sum]) -> None:
    """Make each of these one call, with two results."""
    for add, norm in found:
        with graph.inserting_before(add):
            layer = graph.get_attr(str(norm.target))
            both = graph.call_function(_BY[add.target], (layer, *add.args))
            y, h = (graph.call_function(operator.getitem, (both, place)) for place in (0, 1))
        norm.replace_all_uses_with(y)
        graph.erase_node(norm)
        add.replace_all_uses_with(h)
        graph.erase_node(add)


def requirements(root: Module, found: list[Sum]) -> Iterator[tuple[Module, bool, str]]:
    """As `patterns.requirements`."""
    for add, norm in found:
        layer = module_of(root, norm)
        assert layer is not None
        yield layer, True, ""
        yield from may_write(root, add, norm)
