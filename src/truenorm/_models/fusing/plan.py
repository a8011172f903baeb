"""What a fused module runs in place of its forward, and when."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.fx import Graph, GraphModule
from torch.nn import Module

from ...nn._activation import Activated
from . import patterns, sums
from .codes import Unreadable
from .conditions import MISSING, Conditions, compiled, of_copy
from .reading import value_of
from .tracing import Read


class _Held:
    """The modules that a graph calls."""


class Plan:
    """The graph of a fused forward, and the conditions under which it stands for that.

    `holds` takes the module and its inputs, `graph` the modules that it calls before these. What
    both know is held by name, so that a model's deep copy has a plan of its own modules.
    """

    def __init__(self, source: str, held: dict[str, Any], name: str, graph: Any, calls: set[str]):
        self._made_of = source, held, name, graph, calls
        self.holds: Callable[..., bool] = compiled(source, held, name)
        self.graph = graph
        self.calls = _Held()
        for key in calls:
            setattr(self.calls, key, held[key])

    def __deepcopy__(self, memo: dict[int, Any]) -> Plan:
        source, held, name, graph, calls = self._made_of
        return Plan(source, of_copy(held, memo), name, graph, calls)

    def __reduce__(self) -> Any:
        # a file has no plans, and needs no truenorm to say so
        return type(None), ()


def _resolved(root: Module, path: str) -> Any:
    value: Any = root
    for name in path.split("."):
        value = getattr(value, name)
    return value


def _detached(root: Module, graph: Graph, conditions: Conditions) -> set[str]:
    """Let the graph take modules from what is held, and tensors from the modules; the names."""
    calls: set[str] = set()
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    with graph.inserting_before(inputs[0]):
        owner = graph.placeholder("_owner")
    for node in list(graph.nodes):
        if node.op not in ("call_module", "get_attr"):
            continue
        path = str(node.target)
        value = _resolved(root, path)
        if not isinstance(value, Tensor):
            node.target = conditions.name(value)
            calls.add(node.target)
            continue
        holder, _, name = path.rpartition(".")
        with graph.inserting_before(node):
            module = owner
            if holder:
                target = conditions.name(_resolved(root, holder))
                calls.add(target)
                module = graph.get_attr(target)
            tensor = graph.call_function(getattr, (module, name))
        node.replace_all_uses_with(tensor)
        graph.erase_node(node)
    return calls


def _plain(parameter: inspect.Parameter) -> inspect.Parameter:
    return parameter.replace(annotation=parameter.empty)


def _arguments(read: Read, conditions: Conditions) -> None:
    for p in read.parameters:
        if p.name in conditions.held or p.name in ("self", "now"):
            raise Unreadable(f"the forward has an argument called {p.name!r}")
        if f"**{p.name}" in read.free:
            conditions.are_unknown(p.name, read.strings)
        elif p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
            conditions.is_empty(p.name)
        elif p.name in read.defaults:
            conditions.is_left_out(p.name, read.defaults[p.name])
        elif p.name not in read.free:
            conditions.is_input(p.name, read.asked_for_type)


def _inputs(read: Read) -> list[str]:
    """Names of the arguments that are tensors."""
    variable = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
    names = (p.name for p in read.parameters if p.kind not in variable)
    return [name for name in names if name not in {*read.free, *read.defaults}]


def finds_something(root: Module, read: Read) -> bool:
    """Whether there is something to be fused in this forward."""
    graph = copy.deepcopy(read.graph)
    patterns.drop_passing(root, graph)
    return bool(patterns.find(root, graph) or sums.find(root, graph, ()))


def plan(root: Module, kind: type[Module], read: Read) -> Plan:
    """One for what can be fused in this forward.

    kind: the class that the module will have.

    Raises Unreadable where what the forward depends on may change unseen.
    """
    graph = read.graph
    dropped = patterns.drop_passing(root, graph)
    found = patterns.find(root, graph)
    added = sums.find(root, graph, patterns.nodes_of(found))
    conditions = Conditions(root, kind, read.asked_for_class)
    _arguments(read, conditions)
    if not found and not dropped:
        # a look at all that a forward depends on takes longer than a small sum
        conditions.pays(sums.pay, _inputs(read))
    elif all(each.over_one is None for each in found):
        conditions.is_for_eager()
    for fact in read.facts:
        conditions.is_as_read(fact, value_of(fact, MISSING))
    needed = *patterns.requirements(root, found, dropped), *sums.requirements(root, added)
    for module, replaced, attribute in needed:
        if replaced:
            conditions.is_plain(module)
        if attribute:
            conditions.equals(module, attribute, getattr(module, attribute))
    for norm in (*(each.norm for each in found), *(each.norm for each in added)):
        layer = _resolved(root, str(norm.target))
        if isinstance(layer, Activated):
            conditions.ends_as_read(layer)
    patterns.replace(graph, found)
    sums.replace(graph, added)
    calls = _detached(root, graph, conditions)
    try:
        forward = type(GraphModule({key: conditions.held[key] for key in calls}, graph)).forward
    except SyntaxError as error:
        raise Unreadable("it calls something with what cannot be written down") from error
    name = getattr(type(root).forward, "__qualname__", "forward")
    signature = str(inspect.Signature([_plain(p) for p in read.parameters]))[1:-1]
    return Plan(conditions.source(signature), conditions.held, name, forward, calls)
