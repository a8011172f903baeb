"""One module's own forward as a graph in which what it calls stays a call, and what it read."""

from __future__ import annotations

import inspect
import operator
import sys
import weakref
from collections.abc import Iterator
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Graph, Node, Proxy, Tracer
from torch.nn import Module

from ..leftovers import Attributes
from .arguments import PROBE, Given, Signature, hand_on, same_but_for
from .codes import Unreadable, step_at
from .reading import Fact, Recorder, is_recorded


def _in_place(name: str) -> Any:
    operation = getattr(operator, name)

    def traced(self: Proxy, other: Any) -> Proxy:
        return self.tracer.create_proxy("call_function", operation, (self, other), {})

    return traced


def unpacked(value: Any, count: int) -> tuple[Any, ...]:
    """What `a, b = value` takes of it.

    Of a tensor by one operator, whose gradient is one too; torch.fx indexes it, and the gradient of
    each part is then a tensor of zeros with the part in it.
    """
    parts = tuple(value)
    if len(parts) != count:
        few_or_many = "too many" if len(parts) > count else "not enough"
        raise ValueError(f"{few_or_many} values to unpack (expected {count})")
    return parts


class _Proxy(Proxy):
    """What stands for a value; Python's x += y is what it is, which torch.fx takes for x = x + y.

    What else Python can ask of a value has no place in a graph, and is refused.
    """

    def __iter__(self) -> Iterator[Proxy]:
        step, count = step_at(sys._getframe(1))
        if step != "UNPACK_SEQUENCE":
            return self.tracer.iter(self)
        parts: Any = self.tracer.create_proxy("call_function", unpacked, (self, count), {})
        return (parts[place] for place in range(count))

    def __getattr__(self, name: str) -> Any:
        self.tracer.recorder.asks_by_name(sys._getframe(1), name)  # type: ignore[attr-defined]
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("node", "tracer"):
            self.tracer.recorder.refuse("the forward sets attributes")  # type: ignore[attr-defined]
        super().__setattr__(name, value)

    def __repr__(self) -> str:
        self.tracer.recorder.is_shown(sys._getframe(1))  # type: ignore[attr-defined]
        return super().__repr__()

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        # isinstance() asks for it where an object is not of the class by its own
        is_input = self.node.op == "placeholder" and self.node.target
        self.tracer.recorder.asks_for_type(sys._getframe(1), is_input)  # type: ignore[attr-defined]
        user = is_input and not sys._getframe(1).f_globals.get("__name__", "").startswith("torch.")
        return Tensor if user else type(self)


# all that tensors have
for _name in dir(Tensor):
    if _name.startswith("__i") and hasattr(operator, _name) and f"__{_name[3:]}" in dir(Tensor):
        setattr(_Proxy, _name, _in_place(_name))


def _modes() -> tuple[Any, ...]:
    """What a `with` may change that no graph says."""
    autocast = [torch.is_autocast_enabled(device) for device in ("cpu", "cuda")]
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *autocast


class Watched(Tracer):
    """A tracer that takes down what else than its input a forward depends on."""

    def __init__(self, recorder: Recorder, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.recorder = recorder

    def trace(self, *args: Any, **kwargs: Any) -> Graph:
        self._outside = _modes()
        return super().trace(*args, **kwargs)

    def watched(self, call: Any) -> Any:
        """The same call, while which the forward runs."""

        def recorded(*args: Any, **kwargs: Any) -> Any:
            with self.recorder.running(lambda: len(self.graph.nodes)):
                return call(*args, **kwargs)

        return recorded

    def create_node(self, *args: Any, **kwargs: Any) -> Node:
        if _modes() != self._outside:
            raise NotImplementedError("a part of the forward runs in another mode")
        with self.recorder.quiet():
            return super().create_node(*args, **kwargs)

    def create_proxy(self, *args: Any, **kwargs: Any) -> Any:
        with self.recorder.quiet():
            return super().create_proxy(*args, **kwargs)

    def call_module(self, m: Module, forward: Any, args: Any, kwargs: Any) -> Any:
        if self.is_leaf_module(m, self.path_of_module(m)):
            with self.recorder.quiet():
                return super().call_module(m, forward, args, kwargs)

        def followed(*args: Any, **kwargs: Any) -> Any:
            with self.recorder.aloud():
                return m._call_impl(*args, **kwargs)

        return super().call_module(m, followed, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        with self.recorder.quiet():
            return super().getattr(attr, attr_val, parameter_proxy_cache)

    def to_bool(self, obj: Proxy) -> bool:
        # a forward that catches the error would go on otherwise than with a tensor
        self.recorder.refuse("the forward depends on a tensor's values")
        return super().to_bool(obj)

    def iter(self, obj: Proxy) -> Any:
        self.recorder.refuse("the forward goes through a tensor")
        return super().iter(obj)

    def proxy(self, node: Node) -> Proxy:
        return _Proxy(node, self)


class _OneLevel(Watched):
    """A module's own forward: what it calls stays a call."""

    proxy_buffer_attributes = True

    def __init__(
        self, recorder: Recorder, called: Signature, calls: tuple[Any, ...], given: Given
    ) -> None:
        super().__init__(recorder, autowrap_functions=calls)
        self.called, self.given = called, given
        if calls:  # a decorated forward's own file is another than its functions'
            self._autowrap_search.append(sys.modules[calls[0].__module__])

    def create_args_for_root(self, *args: Any, **kwargs: Any) -> Any:
        called, given = self.called, self.given
        inputs = {}
        for p in called.named:
            left_out = () if p.default is p.empty else (p.default,)
            inputs[p.name] = self.create_proxy("placeholder", p.name, left_out, {})
        if more := called.more if called.more in self.recorder.free else "":
            inputs[more] = self.create_proxy("placeholder", more, (), {})

        def recorded(root: Module, *_: Any) -> Any:
            by_place, by_name = called.arguments({**inputs, **given.constants}, given)
            if more and more not in given.left_out:
                by_name[PROBE] = inputs[more]
            return self.watched(called.forward)(root, *by_place, **by_name)

        return recorded, [self.root, *inputs.values()]

    def create_arg(self, a: Any) -> Any:
        # a function that stays a call may be given a submodule
        with self.recorder.quiet():
            if isinstance(a, Module):
                return self.create_node("get_attr", self.path_of_module(a), (), {})
            return super().create_arg(a)

    def is_leaf_module(self, m: Module, module_qualified_name: str) -> bool:
        return True


class Read(NamedTuple):
    """A forward's graph, and all that it depends on."""

    graph: Graph
    facts: list[Fact]
    asked_for_type: bool  # of an input
    asked_for_class: bool  # of modules
    parameters: list[inspect.Parameter]
    defaults: dict[str, Any]  # what optional arguments are where the graph stands for the forward
    calls: tuple[Any, ...] = ()  # functions that stay calls
    free: frozenset[str] = frozenset()  # arguments that may be anything, "**kwargs" among them
    strings: frozenset[str] = frozenset()  # which no name in **kwargs may be


def read(module: Module) -> Read:
    """The module's forward; raises Unreadable where no one graph stands for it.

    With the defaults of its optional arguments: which a call has may decide what is done.
    """
    called = Signature(type(module))
    if not all(is_recorded(m) for m in module.modules()):
        raise Unreadable("a class of its own reads attributes in a way of its own")
    try:
        return _read(module, called, ())
    except Unreadable:
        # where a helper beside the class looks into its tensors, it can stay a call
        if not (helpers := _helpers(called.forward)):
            raise
        return _read(module, called, helpers)


def _helpers(forward: Any) -> tuple[Any, ...]:
    """The functions that the forward's own file defines."""
    forward = inspect.unwrap(forward)
    home = sys.modules.get(forward.__module__ or "")
    if home is None:  # made by exec, say
        return ()
    return tuple(
        f
        for f in vars(home).values()
        if isinstance(f, FunctionType) and f.__module__ == forward.__module__
    )


_freed: weakref.WeakKeyDictionary[type, frozenset[str]] = weakref.WeakKeyDictionary()


def with_free_arguments(module: Module, before: Read) -> Read:
    """The same where arguments that the forward only hands on may be whatever a call gives.

    Such a one stands where it is handed on, in a graph that is the same with and without it.
    """
    called = Signature(type(module))
    asked = {str(n.target): n for n in before.graph.nodes if n.op == "placeholder"}
    candidates = [n for n in asked if n in called.defaults or _is_handed_on(asked[n])]
    candidates += [called.more] if called.more else []
    if not candidates:
        return before
    known = _freed.get(type(module))
    for free in (frozenset(candidates), *(() if known is None else (known,))):
        if found := _freely(module, called, before.calls, free):
            return found
    last = before
    for name in candidates:
        last = _freely(module, called, before.calls, last.free | {name}) or last
    _freed[type(module)] = last.free
    return last


def _is_handed_on(given: Node) -> bool:
    return all(user.op == "call_module" for user in given.users)


def _freely(
    module: Module, called: Signature, calls: tuple[Any, ...], free: frozenset[str]
) -> Read | None:
    try:
        return _read(module, called, calls, free) if free else None
    except Unreadable:
        return None


def _read(
    module: Module, called: Signature, calls: tuple[Any, ...], free: frozenset[str] = frozenset()
) -> Read:
    """The graph of the forward, the functions in `calls` being calls in it."""
    modules = list(module.modules())
    modes = [m.training for m in modules]
    attributes = Attributes(modules)
    recorder = Recorder(module, called.forward, free)
    held = {n: value for n, value in called.defaults.items() if n not in free}
    # by place and by name, in training and evaluation
    ways = [Given(held), Given(held, free, frozenset(held))]
    if free:
        bound = {p.name: called.defaults.get(p.name) for p in called.named if p.name in free}
        ways.append(Given({**held, **bound}, left_out=frozenset({called.more})))
    graphs = []
    try:
        for way, given in enumerate(ways):
            for m in modules:
                m.training = way != 1
            graphs.append(_OneLevel(recorder, called, calls, given).trace(module))
        for m, mode in zip(modules, modes, strict=True):
            m.training = mode
        if attributes.restore():
            raise Unreadable("the forward sets attributes")
        if str(graphs[0]) != str(graphs[1]):
            raise Unreadable("the forward differs in training and evaluation")
        if free and not same_but_for(graphs[0], graphs[2], ways[2].constants):
            raise Unreadable("the forward depends on its optional arguments")
        facts = recorder.finish()
        asked = recorder.asked_for_type, recorder.asked_for_class
        strings = recorder.strings() if called.more in free else frozenset()
        hand_on(graphs[0])
        return Read(graphs[0], facts, *asked, called.all, held, calls, free, strings)
    except Unreadable:
        raise
    except Exception as error:  # whatever a forward raises on what stands for a tensor
        why = recorder.why or f"it raises {type(error).__name__} where it is traced"
        raise Unreadable(why) from error
    finally:
        attributes.restore()
