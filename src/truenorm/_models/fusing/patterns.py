"""What follows a normalization layer in a graph, and the graph with that as part of the layer."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.nn import Module

from ..._core import activation
from ..._core.activation import Act
from ...nn._activation import Activated
from ...nn._options import options_of
from .activations import PARAMETERS, activation_of
from .memory import is_alone, is_plain, lasts, may_write, module_of

_ADDS = {operator.add, operator.iadd, torch.add}
_PRODUCTS = {operator.mul, operator.imul, torch.mul}
_SUMS = {operator.add, torch.add, "add"}


class Found(NamedTuple):
    """A layer's call, and what one pass can do of what follows.

    between: the nodes from there to the last one. given: the call's arguments by name.
    """

    norm: Node
    between: tuple[Node, ...]
    last: Node
    act_of: Act
    given: dict[str, Node]
    over_one: Node | None = None  # 1 + scale


def _only_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _residual(norm: Node, add: Node) -> Node | None:
    """What an addition adds to the layer's output."""
    return _other(norm, add, _ADDS, operator.iadd, "add")


def _other(norm: Node, node: Node, functions: set[Any], in_place: Any, method: str) -> Node | None:
    """What a sum or product of two joins with `norm`."""
    if node.op == "call_function" and node.target in functions:
        overwrites = node.target is in_place
    elif node.op == "call_method" and node.target in (method, f"{method}_"):
        overwrites = node.target != method
    else:
        return None
    if len(node.args) != 2 or node.kwargs:
        return None
    first, second = node.args
    if first is second or not (isinstance(first, Node) and isinstance(second, Node)):
        return None
    if first is norm:
        return second
    # in place, the other one would be overwritten
    return first if second is norm and not overwrites else None


def _scale(norm: Node, mul: Node) -> tuple[Node, Node] | None:
    """(1 + scale, scale) where a product is of those and the layer's output."""
    by = _other(norm, mul, _PRODUCTS, operator.imul, "mul")
    if by is None or by.target not in _SUMS or len(by.args) != 2 or by.kwargs:
        return None
    return None if (scale := _over_one(by)) is None else (by, scale)


def _over_one(add: Node) -> Node | None:
    """What 1 is added to."""
    for one, other in (add.args, add.args[::-1]):
        if type(one) in (int, float) and one == 1 and isinstance(other, Node):
            return other
    return None


def _modulation(root: Module, norm: Node, mul: Node) -> Found | None:
    """norm(x) · (1 + scale), with a shift and an activation behind it where they are."""
    if (pair := _scale(norm, mul)) is None:
        return None
    by, scale = pair
    between, last, given = [], mul, {"scale": scale}
    user, add = _only_user(mul), mul
    if user is not None and (shift := _residual(mul, user)) is not None:
        between.append(mul)
        last, add, given["shift"] = user, user, shift
        user = _only_user(user)
    act = None if user is None else activation_of(root, user)
    if user is not None and act is not None:
        between.append(last)
        last = user
    written = {*between, last}
    kept = lasts(root, norm.args[0], norm, last, written)
    kept = kept and lasts(root, scale, by, last, written)
    if "shift" in given:
        kept = kept and lasts(root, given["shift"], add, last, written)
    nothing = activation.NONE, 0.0
    return Found(norm, tuple(between), last, act or nothing, given, by) if kept else None


def call_modulated(layer: Activated, x: Any, scale: Any, shift: Any, act_of: Act) -> Any:
    """act(layer(x) · (1 + scale) + shift), as torch's operators broadcast and promote."""
    given = [_against(t, x) for t in (scale, shift)]
    if all(t is None or g is not None for t, g in zip((scale, shift), given, strict=True)):
        return layer(x, scale=given[0], shift=given[1], _then=act_of)
    y = layer(x) * (1 + scale)
    return activation.act(y if shift is None else y + shift, *act_of)


def _against(t: Any, x: Any) -> Tensor | None:
    """A tensor that changes neither the shape nor the dtype of what it meets, seen against x."""
    alike = isinstance(t, Tensor) and isinstance(x, Tensor) and t.dtype == x.dtype
    if not alike or t.dim() > x.dim() or torch.is_autocast_enabled(x.device.type):
        return None
    sizes = (*(1,) * (x.dim() - t.dim()), *t.shape)
    fits = all(n in (1, m) for n, m in zip(sizes, x.shape, strict=True))
    return t.reshape(sizes) if fits else None


def is_layer(module: Module) -> bool:
    """Whether it is a layer that takes what follows it; a subclass with a forward may not."""
    ours = isinstance(module, Activated) and type(module).forward.__module__.startswith("truenorm.")
    return ours and options_of(module).activation is None


def _is_norm(root: Module, node: Node, layers: Callable[[Module], bool]) -> bool:
    module = module_of(root, node)
    if module is None or not layers(module):
        return False
    if len(node.args) != 1 or node.kwargs or not is_plain(module):
        return False
    # where the call is moved to, who reads the input in between would see another one
    return not options_of(module).overwrite_input or is_alone(node)


def is_sum(norm: Node, node: Node) -> bool:
    """Whether a node adds something to the layer's output."""
    return _residual(norm, node) is not None


def drop_passing(root: Module, graph: Graph) -> list[Module]:
    """Take out what gives its input back: Identity, and dropout of nothing; these."""
    dropped = []
    for node in graph.nodes:
        module = module_of(root, node)
        nothing = type(module).__module__ == "torch.nn.modules.dropout" and module.p == 0  # type: ignore[union-attr]
        passes = nothing or type(module) is torch.nn.Identity
        if module is not None and passes and len(node.args) == 1 and is_plain(module):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
            dropped.append(module)
    return dropped


def find(root: Module, graph: Graph, layers: Callable[[Module], bool] = is_layer) -> list[Found]:
    """Each call of one of these layers that one pass can go on from."""
    found: list[Found] = []
    taken: set[Node] = set()
    for norm in graph.nodes:
        user = _only_user(norm)
        if user is None or user in taken or not _is_norm(root, norm, layers):
            continue
        source = norm.args[0]
        if (act := activation_of(root, user)) is not None and lasts(root, source, norm, user, ()):
            found.append(Found(norm, (), user, act, {}))
        elif (modulation := _modulation(root, norm, user)) is not None:
            found.append(modulation)
            taken.update((*modulation.between, modulation.last))
        elif (
            (added := _residual(norm, user)) is not None
            and (last := _only_user(user)) is not None
            and (act := activation_of(root, last)) is not None
            and lasts(root, source, norm, last, (user,))
            and lasts(root, added, user, last, ())
        ):
            found.append(Found(norm, (user,), last, act, {"residual": added}))
            taken.add(user)
    return found


def nodes_of(found: list[Found]) -> set[Node]:
    """All that `replace` takes out."""
    return {node for each in found for node in (each.norm, *each.between, each.last)}


def replace(graph: Graph, found: list[Found]) -> None:
    """Make each of these one call of the layer."""
    for norm, between, last, act_of, given, over_one in found:
        # where all that it needs has been made
        with graph.inserting_before(last):
            if "scale" in given:
                layer = graph.get_attr(str(norm.target))
                pair = given["scale"], given.get("shift")
                fused = graph.call_function(call_modulated, (layer, *norm.args, *pair, act_of))
            else:
                named: dict[str, Any] = {"_then": act_of, **given}
                fused = graph.call_module(str(norm.target), norm.args, named)
        last.replace_all_uses_with(fused)
        for node in (last, *reversed(between), norm):
            graph.erase_node(node)
        if over_one is not None and not over_one.users:
            graph.erase_node(over_one)


def requirements(
    root: Module, found: list[Found], dropped: list[Module]
) -> Iterator[tuple[Module, bool, str]]:
    """(module, whether it is no longer called as it was, attribute) for what `found` depends on."""
    for module in dropped:
        yield module, True, "p" if hasattr(module, "p") else ""
    for norm, _, end, *_ in found:
        layer, last = module_of(root, norm), module_of(root, end)
        assert layer is not None
        yield layer, True, ""
        if last is not None:
            yield last, True, PARAMETERS.get(type(last), "")
        yield from may_write(root, norm, end)
