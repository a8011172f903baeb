"""In a compiler's graph: what follows a norm becomes part of its operator.

A compiler sees no further than an operator, so an activation behind one costs a pass forward and,
in the backward, either the norm's output or a mask of it that is kept. Here the operator takes the
activation in, and a sum before it, wherever in the model these stand: before Inductor
differentiates the graph, so that forward and backward are the operators' own.
"""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch
from torch.fx import Graph, Node

from .. import activation
from ..activation import Act
from ..call import ACT, ROUNDS
from . import nodes
from .nodes import BITS, MASK, PARAMETER, RESIDUAL

_ADDS = {operator.add, operator.iadd, torch.add}
# functions of these do what their names say
_HOMES = torch, torch.nn.functional, torch._C._nn, operator
_NOTHING: Act = activation.NONE, 0.0
# what changes nothing that a graph computes
_HARMLESS = {torch._C._are_functorch_transforms_active}


class _Found(NamedTuple):
    """A norm, its output, the sum that follows where there is one, and the activation."""

    norm: Node
    y: Node
    add: Node | None
    residual: Node | None
    last: Node
    act: Act


def join(graph: Graph, norm: Node) -> Node | None:
    """Take into a norm what follows it, where that can be; the norm that does."""
    found = _find(norm) if _is_bare(norm) else None
    return None if found is None else _replace(graph, found)


def _is_bare(node: Node) -> bool:
    """A norm with neither mask, residual nor activation, whose output is rounded once."""
    args: Any = node.args
    if args[MASK] is not None or args[RESIDUAL] is not None:
        return False
    return not args[BITS] & (0xFF << ACT | ROUNDS)


def _find(norm: Node) -> _Found | None:
    y = next((user for user in norm.users if nodes.item(user) == 0), None)
    user = None if y is None else _only_user(y)
    if y is None or user is None:
        return None
    found = None
    if (act := _activation(user)) is not None:
        found = _Found(norm, y, None, None, user, act)
    elif (residual := _residual(y, user)) is not None:
        last = _only_user(user)
        after = _activation(last) if last is not None else None
        end, what = (user, _NOTHING) if last is None or after is None else (last, after)
        found = _Found(norm, y, user, residual, end, what)
    return found if found is not None and _can_wait(found) else None


def _activation(node: Node) -> Act | None:
    return activation.of_call(node.op, node.target, node.args, dict(node.kwargs))


def _only_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _residual(y: Node, add: Node) -> Node | None:
    """What is added to y: of its shape and dtype, so that the sum has these too."""
    if add.op == "call_function" and add.target in (*_ADDS, torch.ops.aten.add.Tensor):
        in_place = add.target is operator.iadd
    elif add.op == "call_method" and add.target in ("add", "add_"):
        in_place = add.target == "add_"
    else:
        return None
    if len(add.args) != 2 or add.kwargs or not all(isinstance(a, Node) for a in add.args):
        return None
    first, second = add.args
    other = second if first is y else first
    # in place, the other one would be written to
    if first is second or (in_place and first is not y):
        return None
    return other if isinstance(other, Node) and _alike(y, other) else None


def _alike(y: Node, other: Node) -> bool:
    of_y, of_other = nodes.value(y), nodes.value(other)
    if of_y is None or of_other is None:
        return False
    same = of_y.dtype == of_other.dtype and of_y.device == of_other.device
    return bool(same and of_y.dim() == of_other.dim() and _same_sizes(of_y, of_other))


def _same_sizes(a: Any, b: Any) -> bool:
    # symbols that are the same, not sizes that happen to be: a guess would be a guard
    return all(
        str(m) == str(n) if isinstance(m, torch.SymInt) or isinstance(n, torch.SymInt) else m == n
        for m, n in zip(a.shape, b.shape, strict=True)
    )


# ---------------------------------------------------------------- moving the norm to the last node


def _can_wait(found: _Found) -> bool:
    """Whether the norm may be computed where the last of its followers is.

    Nothing that it reads is written to until then, and its statistics go to nothing but running
    statistics, which nothing else asks for until then.
    """
    norm, y, add, _, last, _ = found
    moves = _moves(norm)
    if moves is None or any(user is not y and nodes.item(user) != 1 for user in norm.users):
        return False
    moved = {norm, y, *moves, *nodes.outputs(norm, 1)}
    buffers = {n for m in moves for n in m.args[:3] if isinstance(n, Node)}
    node = norm.next
    while node is not last:
        asks = node not in moved and node is not add
        if asks and (_may_write(node) or buffers & set(node.all_input_nodes)):
            return False
        node = node.next
    return True


def _moves(norm: Node) -> list[Node] | None:
    """The updates of running statistics; None where something else reads the statistics."""
    moves = [user for record in nodes.outputs(norm, 1) for user in record.users]
    return moves if all(map(nodes.moves_running, moves)) else None


def _may_write(node: Node) -> bool:
    """Whether a node may write to something, or change how others compute: what is unknown may."""
    if node.op in ("placeholder", "get_attr") or node.target in _HARMLESS:
        return False
    name = str(node.target if node.op == "call_method" else getattr(node.target, "__name__", ""))
    if node.op not in ("call_method", "call_function") or "out" in node.kwargs:
        return True
    if (schema := getattr(node.target, "_schema", None)) is not None:
        # running statistics are asked for by name
        return bool(schema.is_mutable) and not nodes.moves_running(node)
    if node.op == "call_function" and not any(_is_of(h, name, node.target) for h in _HOMES):
        return True
    in_place = (name.endswith("_") and not name.endswith("__")) or node.target in nodes.IN_PLACE
    return in_place or bool(activation.argument(node.target, "inplace", node.args, node.kwargs))


def _is_of(home: Any, name: str, function: Any) -> bool:
    return getattr(home, name, None) is function


def _replace(graph: Graph, found: _Found) -> Node:
    norm, y, add, residual, last, (act, parameter) = found
    args: list[Any] = list(norm.args)
    target: Any = norm.target
    args[RESIDUAL], args[PARAMETER] = residual, parameter
    args[BITS] |= act << ACT
    with graph.inserting_before(last):
        joined = graph.call_function(target, tuple(args))
        output = graph.call_function(operator.getitem, (joined, 0))
        joined.meta, output.meta = dict(norm.meta), dict(y.meta)
    behind: Node = output
    for record in nodes.outputs(norm, 1):
        record.replace_input_with(norm, joined)
        for node in (record, *record.users):
            behind.append(node)
            behind = node
    last.replace_all_uses_with(output)
    for gone in dict.fromkeys((last, add, y, norm)):
        if gone is not None:
            graph.erase_node(gone)
    return joined
