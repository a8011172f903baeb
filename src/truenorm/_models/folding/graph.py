"""Which layer's output goes to which layer alone: read by torch.fx, or off a Sequential's order."""

from __future__ import annotations

import inspect
from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.nn import Module

from ..fusing.reading import Recorder
from ..fusing.tracing import Watched
from ..layers import has_hooks, kind_of
from ..leftovers import Attributes

LINEAR = (torch.nn.modules.conv._ConvNd, torch.nn.Linear)
_PASSING = (torch.nn.Identity, torch.nn.modules.dropout._DropoutNd)


def passes(module: Module) -> bool:
    """Whether the module gives its input back."""
    return isinstance(module, _PASSING) and not module.training and not has_hooks(module)


@dataclass
class Order:
    """What was found out about the order in which a model's layers run.

    following: name of a layer: name of the one that alone takes its output, and nothing else.
    calls: how often each layer is called in its parent's forward.
    read: layers whose parameters are read beside their own call.
    untraced: modules that torch.fx could not follow, with what it said.
    """

    following: dict[str, str] = field(default_factory=dict)
    calls: Counter[str] = field(default_factory=Counter)
    read: set[str] = field(default_factory=set)
    untraced: dict[str, str] = field(default_factory=dict)

    def preceding(self) -> dict[str, str]:
        return {after: before for before, after in self.following.items()}


class _Tracer(Watched):
    def create_args_for_root(self, *args: Any, **kwargs: Any) -> Any:
        call, given = super().create_args_for_root(*args, **kwargs)
        return self.watched(call), given

    def is_leaf_module(self, m: Module, module_qualified_name: str) -> bool:
        # hooks would be called with what stands for a tensor here
        if isinstance(m, LINEAR) or kind_of(m) is not None or has_hooks(m):
            return True
        return bool(super().is_leaf_module(m, module_qualified_name))


def _defaults(module: Module) -> dict[str, Any]:
    """Optional arguments at their defaults: the path that a plain call takes."""
    parameters = inspect.signature(type(module).forward).parameters.values()
    plain = (type(None), bool, int, float, str)
    return {p.name: p.default for p in parameters if isinstance(p.default, plain)}


def _trace(module: Module) -> Graph:
    attributes = Attributes(module.modules())
    recorder = Recorder(module, type(module).forward, constants=True)
    try:
        graph = _Tracer(recorder).trace(module, concrete_args=_defaults(module))
    finally:
        attributes.restore()
    # a forward that asks for what a graph cannot say may take another way with a tensor
    recorder.finish()
    return graph


def _read_graph(order: Order, graph: Graph, root: Module, prefix: str) -> list[str]:
    """Enter a graph's edges; the modules in it that hold others and were not followed."""
    inside = []
    for node in graph.nodes:
        if node.op == "get_attr":
            order.read.add((prefix + str(node.target)).rpartition(".")[0])
        if node.op != "call_module":
            continue
        name = prefix + str(node.target)
        order.calls[name] += 1
        if any(True for _ in root.get_submodule(str(node.target)).children()):
            inside.append(str(node.target))
        source = node.args[0] if len(node.args) == 1 and not node.kwargs else None
        if isinstance(source, Node) and source.op == "call_module" and len(source.users) == 1:
            order.following[prefix + str(source.target)] = name
    return inside


def _read_sequence(order: Order, module: Module, prefix: str) -> None:
    names = [name for name, _ in module.named_children()]
    for name in names:
        order.calls[prefix + name] += 1
    for before, after in pairwise(names):
        order.following[prefix + before] = prefix + after


def find_order(model: Module) -> Order:
    """The order of a model's layers, as far as it can be known without running it."""
    order = Order()
    waiting: list[tuple[str, Module]] = [("", model)]
    seen = set()
    while waiting:
        prefix, module = waiting.pop()
        if id(module) in seen or isinstance(module, LINEAR) or kind_of(module) is not None:
            continue
        seen.add(id(module))
        children = dict(module.named_children())
        if not children:
            continue
        try:
            inside = _read_graph(order, _trace(module), module, prefix)
        except Exception as error:  # whatever a model's forward raises on what stands for a tensor
            if type(module).forward is torch.nn.Sequential.forward:
                _read_sequence(order, module, prefix)
            else:
                name = prefix.removesuffix(".") or "the model itself"
                order.untraced[name] = " ".join(str(error).split())
            inside = list(children)
        waiting += [(f"{prefix}{name}.", module.get_submodule(name)) for name in inside]
    return order
