"""What follows a normalization layer in a graph, and the graph with that as part of the layer."""

from __future__ import annotations

import operator
from types import FunctionType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.fx import Graph, Node
from torch.nn import Module

from .._model.layers import has_hooks
from .._ops import activation
from ..nn._activation import Activated
from ..nn._options import options_of

Act = tuple[int, float]
_ADDS = {operator.add, operator.iadd, torch.add}
_IN_PLACE = {operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ipow}
_FUNCTIONS = {
    F.relu: activation.RELU,
    torch.relu: activation.RELU,
    torch.relu_: activation.RELU,
    F.relu_: activation.RELU,
    F.relu6: activation.RELU6,
    F.silu: activation.SILU,
    F.hardswish: activation.HARDSWISH,
}
_PLAIN = {
    torch.nn.ReLU: activation.RELU,
    torch.nn.ReLU6: activation.RELU6,
    torch.nn.SiLU: activation.SILU,
    torch.nn.Hardswish: activation.HARDSWISH,
}


class Found(NamedTuple):
    """A layer's call, and what one pass can do of what follows."""

    norm: Node
    add: Node | None
    act: Node
    act_of: Act


def _module(root: Module, node: Node) -> Module | None:
    return root.get_submodule(str(node.target)) if node.op == "call_module" else None


def _leaky(negative_slope: Any = 0.01, inplace: Any = False) -> Act | None:
    number = isinstance(negative_slope, (int, float))
    return (activation.LEAKY_RELU, float(negative_slope)) if number else None


def _elu(alpha: Any = 1.0, inplace: Any = False) -> Act | None:
    return (activation.ELU, float(alpha)) if isinstance(alpha, (int, float)) else None


def _gelu(*, approximate: Any = "none") -> Act | None:
    kinds = {"none": activation.GELU, "tanh": activation.GELU_TANH}
    return (kinds[approximate], 0.0) if approximate in kinds else None


def _of_module(module: Module) -> Act | None:
    kind = type(module)
    if has_hooks(module):
        return None
    if kind in _PLAIN:
        return _PLAIN[kind], 0.0
    if isinstance(module, torch.nn.LeakyReLU):
        return _leaky(module.negative_slope)
    if isinstance(module, torch.nn.ELU):
        return _elu(module.alpha)
    if isinstance(module, torch.nn.GELU):
        return _gelu(approximate=module.approximate)
    return None


def _activation(root: Module, node: Node) -> Act | None:
    """The activation that a node applies to its only tensor."""
    if (module := _module(root, node)) is not None:
        return _of_module(module) if len(node.args) == 1 and not node.kwargs else None
    if node.op == "call_method" and node.target in ("relu", "relu_") and len(node.args) == 1:
        return activation.RELU, 0.0
    if node.op != "call_function" or not node.args:
        return None
    rest, named = node.args[1:], dict(node.kwargs)
    try:
        if node.target is F.leaky_relu:
            return _leaky(*rest, **named)
        if node.target is F.elu:
            return _elu(*rest, **named)
        if node.target is F.gelu:
            return _gelu(*rest, **named)
    except TypeError:  # arguments that these know nothing of
        return None
    if node.target in _FUNCTIONS and set(named) <= {"inplace"} and len(rest) <= 1:
        return _FUNCTIONS[node.target], 0.0
    return None


def _only_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _residual(norm: Node, add: Node) -> Node | None:
    """What an addition adds to the layer's output."""
    if add.op == "call_function" and add.target in _ADDS:
        in_place = add.target is operator.iadd
    elif add.op == "call_method" and add.target in ("add", "add_"):
        in_place = add.target == "add_"
    else:
        return None
    if len(add.args) != 2 or add.kwargs:
        return None
    first, second = add.args
    if first is second or not (isinstance(first, Node) and isinstance(second, Node)):
        return None
    if first is norm:
        return second
    # in place, the other one would be overwritten
    return first if second is norm and not in_place else None


def _is_norm(root: Module, node: Node) -> bool:
    module = _module(root, node)
    return (
        isinstance(module, Activated)
        and module._truenorm_options.activation is None
        and len(node.args) == 1
        and not node.kwargs
        and not has_hooks(module)
    )


def _overwrites(root: Module, node: Node) -> bool:
    """Whether a node may write over its first tensor."""
    if (module := _module(root, node)) is not None:
        own = options_of(module).overwrite_input
        return own or bool(getattr(module, "inplace", False))
    target = node.target
    if isinstance(target, FunctionType) and not target.__module__.startswith("torch."):
        return True  # who knows
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__")
    return in_place or bool(node.kwargs.get("inplace")) or target in _IN_PLACE


def _input_lasts(root: Module, norm: Node, last: Node) -> bool:
    """Whether the layer's input is the same where its call is moved to."""
    node = norm.next
    while node is not last:
        if node.args and node.args[0] is norm.args[0] and _overwrites(root, node):
            return False
        node = node.next
    return True


def drop_passing(root: Module, graph: Graph) -> None:
    """Take out what gives its input back: Identity, and dropout of nothing."""
    for node in graph.nodes:
        module = _module(root, node)
        nothing = isinstance(module, torch.nn.modules.dropout._DropoutNd) and module.p == 0
        passes = nothing or type(module) is torch.nn.Identity
        if module is not None and passes and len(node.args) == 1 and not has_hooks(module):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def find(root: Module, graph: Graph) -> list[Found]:
    """Each layer's call that one pass can go on from."""
    found: list[Found] = []
    taken: set[Node] = set()
    for norm in graph.nodes:
        user = _only_user(norm)
        if user is None or user in taken or not _is_norm(root, norm):
            continue
        if (act := _activation(root, user)) is not None and _input_lasts(root, norm, user):
            found.append(Found(norm, None, user, act))
        elif (
            _residual(norm, user) is not None
            and (last := _only_user(user)) is not None
            and (act := _activation(root, last)) is not None
            and _input_lasts(root, norm, last)
        ):
            found.append(Found(norm, user, last, act))
            taken.add(user)
    return found


def replace(graph: Graph, found: list[Found]) -> None:
    """Make each of these one call of the layer."""
    for norm, add, act, act_of in found:
        given: dict[str, Any] = {"_then": act_of}
        if add is not None:
            given["residual"] = _residual(norm, add)
        # where all that it needs has been made
        with graph.inserting_before(act):
            fused = graph.call_module(str(norm.target), norm.args, given)
        act.replace_all_uses_with(fused)
        for node in (act, add, norm):
            if node is not None:
                graph.erase_node(node)
