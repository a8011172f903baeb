"""One module's own forward as a graph in which what it calls stays a call, and what it read."""

from __future__ import annotations

import functools
import inspect
import operator
import sys
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Graph, Node, Proxy, Tracer
from torch.nn import Module

from ..leftovers import Attributes
from .reading import Fact, Recorder, is_recorded

_DEFAULTS = (type(None), bool, int, float, str)


def _in_place(name: str) -> Any:
    operation = getattr(operator, name)

    def traced(self: Proxy, other: Any) -> Proxy:
        return self.tracer.create_proxy("call_function", operation, (self, other), {})

    return traced


class _Proxy(Proxy):
    """Python's x += y as what it is: torch.fx takes it for x = x + y."""

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        # isinstance() asks for it where an object is not of the class by its own
        is_input = self.node.op == "placeholder"
        self.tracer.recorder.asks_for_type(sys._getframe(1), is_input)  # type: ignore[attr-defined]
        user = is_input and not sys._getframe(1).f_globals.get("__name__", "").startswith("torch.")
        return Tensor if user else type(self)


for _name in ("iadd", "isub", "imul", "itruediv", "ipow"):
    setattr(_Proxy, f"__{_name}__", _in_place(_name))


def _modes() -> tuple[Any, ...]:
    """What a `with` may change that no graph says."""
    autocast = [torch.is_autocast_enabled(device) for device in ("cpu", "cuda")]
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *autocast


class _OneLevel(Tracer):
    """A module's own forward: what it calls stays a call."""

    proxy_buffer_attributes = True

    def __init__(
        self, recorder: Recorder, calls: tuple[Any, ...], defaults: dict[int, Any]
    ) -> None:
        super().__init__(autowrap_functions=calls)
        self.recorder = recorder
        self.defaults = defaults  # by place, of arguments that a call leaves out

    def trace(self, *args: Any, **kwargs: Any) -> Graph:
        self._outside = _modes()
        return super().trace(*args, **kwargs)

    def create_args_for_root(self, *args: Any, **kwargs: Any) -> Any:
        forward, given = super().create_args_for_root(*args, **kwargs)

        @functools.wraps(forward)
        def recorded(*inputs: Any) -> Any:
            seen = [self.defaults.get(place, each) for place, each in enumerate(inputs)]
            with self.recorder.running(lambda: len(self.graph.nodes)):
                return forward(*seen)

        return recorded, given

    def create_node(self, *args: Any, **kwargs: Any) -> Node:
        if _modes() != self._outside:
            raise NotImplementedError("a part of the forward runs in another mode")
        with self.recorder.quiet():
            return super().create_node(*args, **kwargs)

    def create_proxy(self, *args: Any, **kwargs: Any) -> Any:
        with self.recorder.quiet():
            return super().create_proxy(*args, **kwargs)

    def call_module(self, m: Module, forward: Any, args: Any, kwargs: Any) -> Any:
        with self.recorder.quiet():
            return super().call_module(m, forward, args, kwargs)

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
    defaults: dict[str, Any]  # what optional arguments are where the graph stands for the forward


def _is_written(value: Any) -> bool:
    """Whether its repr is it."""
    return type(value) in _DEFAULTS and repr(value) not in ("nan", "inf", "-inf")


def read(module: Module) -> Read | None:
    """The module's forward, or None where no one graph stands for it.

    With the defaults of its optional arguments: which a call has may decide what is done.
    """
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    if any(p.kind is not p.POSITIONAL_OR_KEYWORD for p in parameters):
        return None
    if not all(p.default is p.empty or _is_written(p.default) for p in parameters):
        return None
    if not all(is_recorded(m) for m in module.modules()):
        return None
    # where a helper beside the class looks into its tensors, it can stay a call
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    found = _read(module, (), defaults)
    return _read(module, _helpers(module), defaults) if found is None else found


def _helpers(module: Module) -> tuple[Any, ...]:
    """The functions that the forward's own file defines."""
    forward = inspect.unwrap(type(module).forward)
    found = vars(sys.modules[forward.__module__]).values() if forward.__module__ else ()
    return tuple(
        f for f in found if isinstance(f, FunctionType) and f.__module__ == forward.__module__
    )


def _read(module: Module, calls: tuple[Any, ...], defaults: dict[str, Any]) -> Read | None:
    """The graph of the forward, the functions in `calls` being calls in it."""
    modules = list(module.modules())
    modes = [m.training for m in modules]
    attributes = Attributes(modules)
    recorder = Recorder(module)
    graphs = []
    names = list(inspect.signature(type(module).forward).parameters)
    by_place = {names.index(name): value for name, value in defaults.items()}
    try:
        for training in (True, False):
            for m in modules:
                m.training = training
            graphs.append(_OneLevel(recorder, calls, by_place).trace(module))
        for m, mode in zip(modules, modes, strict=True):
            m.training = mode
        graph, other = graphs
        if attributes.restore() or str(graph) != str(other):
            return None
        facts = recorder.finish()
        return Read(graph, facts, recorder.asked_for_type, recorder.asked_for_class, defaults)
    except Exception:  # whatever a forward raises on what stands for a tensor
        return None
    finally:
        attributes.restore()
