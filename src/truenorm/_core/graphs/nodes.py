"""The nodes of a graph that are truenorm's, and what is known of a node's value."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

# where these are in the arguments of `norm`
X, WEIGHT, BIAS, MASK, RESIDUAL, MEAN, VAR, BITS, EPS, PARAMETER, PADDING = range(11)

# of Python's own functions, those of a graph that write
IN_PLACE = {
    getattr(operator, name)
    for name in dir(operator)
    if name in ("setitem", "delitem") or (name[0] == "i" and f"__{name[1:]}__" in dir(operator))
}


def norms(graph: Graph) -> Iterator[Node]:
    """Each call of the operator, as its schema has it."""
    norm = torch.ops.truenorm.norm.default
    for node in list(graph.nodes):
        ours = node.op == "call_function" and node.target is norm and not node.kwargs
        if ours and len(node.args) == PADDING + 1 and isinstance(node.args[BITS], int):
            yield node


def item(node: Node) -> Any:
    """Which of several outputs it takes."""
    return node.args[1] if node.target is operator.getitem else None


def outputs(norm: Node, number: int) -> list[Node]:
    return [user for user in norm.users if item(user) == number]


def value(node: Any) -> Tensor | None:
    """What stands for a node's tensor while a graph is made."""
    if not isinstance(node, Node):
        return None
    found = node.meta.get("example_value", node.meta.get("val"))
    return found if isinstance(found, Tensor) else None


def moves_running(node: Node) -> bool:
    return node.target is torch.ops.truenorm.move_once_.default
