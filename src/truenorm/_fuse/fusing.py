"""`fuse` and `unfuse`: a module's forward with its layers' epilogues in one pass, and as it was."""

from __future__ import annotations

import copy
import inspect
import operator
import sys
from types import FunctionType
from typing import Any, TypeVar

import torch
from torch.fx import Graph, GraphModule, Node, Proxy, Tracer
from torch.nn import Module

from .. import _checks
from ..nn._activation import Activated
from . import patterns

M = TypeVar("M", bound=Module)
_ORIGINAL = "_truenorm_unfused"  # the class that a fused one stands for


def _in_place(name: str) -> Any:
    operation = getattr(operator, name)

    def traced(self: Proxy, other: Any) -> Proxy:
        return self.tracer.create_proxy("call_function", operation, (self, other), {})

    return traced


class _Proxy(Proxy):
    """Python's x += y as what it is: torch.fx takes it for x = x + y."""


for _name in ("iadd", "isub", "imul", "itruediv", "ipow"):
    setattr(_Proxy, f"__{_name}__", _in_place(_name))


def _modes() -> tuple[Any, ...]:
    """What a `with` may change that no graph says."""
    autocast = [torch.is_autocast_enabled(device) for device in ("cpu", "cuda")]
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *autocast


class _OneLevel(Tracer):
    """A module's own forward: what it calls stays a call."""

    def trace(self, *args: Any, **kwargs: Any) -> Graph:
        self._outside = _modes()
        return super().trace(*args, **kwargs)

    def create_node(self, *args: Any, **kwargs: Any) -> Node:
        if _modes() != self._outside:
            raise NotImplementedError("a part of the forward runs in another mode")
        return super().create_node(*args, **kwargs)

    def proxy(self, node: Node) -> Proxy:
        return _Proxy(node, self)

    def create_arg(self, a: Any) -> Any:
        # a function that stays a call may be given a submodule
        if isinstance(a, Module):
            return self.create_node("get_attr", self.path_of_module(a), (), {})
        return super().create_arg(a)

    def is_leaf_module(self, m: Module, module_qualified_name: str) -> bool:
        return True


def _trace(module: Module) -> Graph | None:
    """The module's forward, or None where no one graph stands for it."""
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    if any(p.kind is not p.POSITIONAL_OR_KEYWORD or p.default is not p.empty for p in parameters):
        return None  # which arguments a call has may decide what is done
    # where a helper beside the class looks into its tensors, it can stay a call
    graph = _graph(module, ())
    return _graph(module, _helpers(module)) if graph is None else graph


def _helpers(module: Module) -> tuple[Any, ...]:
    """The functions that the forward's own file defines."""
    forward = type(module).forward
    found = vars(sys.modules[forward.__module__]).values() if forward.__module__ else ()
    return tuple(
        f for f in found if isinstance(f, FunctionType) and f.__module__ == forward.__module__
    )


def _graph(module: Module, calls: tuple[Any, ...]) -> Graph | None:
    """The graph of the forward, the functions in `calls` being calls in it."""
    held, training = _state(module), module.training
    graph: Graph | None = None
    other: Graph | None = None
    try:
        module.training = True
        graph = _OneLevel(autowrap_functions=calls).trace(module)
        module.training = False
        other = _OneLevel(autowrap_functions=calls).trace(module)
    except Exception:  # whatever a forward raises on what stands for a tensor
        graph = None
    finally:
        module.training = training
        changed = _restore(module, held)
    if changed or graph is None or str(graph) != str(other):
        return None
    return graph


def _state(module: Module) -> dict[str, Any]:
    """What a forward might set, or torch.fx for a constant that it finds."""
    return {k: dict(v) if isinstance(v, dict) else v for k, v in vars(module).items()}


def _restore(module: Module, held: dict[str, Any]) -> bool:
    """Put the module back as it was; whether it was not."""
    now = _state(module)

    def same(one: Any, other: Any) -> bool:
        if isinstance(one, dict) and isinstance(other, dict):
            return one.keys() == other.keys() and all(one[k] is other[k] for k in one)
        return one is other

    changed = [k for k in now.keys() | held.keys() if not same(now.get(k), held.get(k))]
    for name in changed:
        if name not in held:
            del vars(module)[name]
        elif isinstance(held[name], dict):
            vars(module)[name].clear()
            vars(module)[name].update(held[name])
        else:
            vars(module)[name] = held[name]
    return bool(changed)


def _reduce(self: Module, protocol: Any) -> Any:
    # a class made here cannot be imported where the file is read: there, it is as before
    reduced: Any = object.__reduce_ex__(self, 2)
    return _new, (getattr(type(self), _ORIGINAL),), *reduced[2:]


def _new(kind: type[Module]) -> Module:
    return kind.__new__(kind)


def _deepcopy(self: Module, memo: dict[int, Any]) -> Module:
    twin = _new(type(self))
    memo[id(self)] = twin
    vars(twin).update(copy.deepcopy(vars(self), memo))
    return twin


def _fused_class(module: Module, graph: Graph) -> type[Module]:
    kind = type(module)
    forward = type(GraphModule(module, graph)).forward
    members = {
        "forward": forward,
        "__reduce_ex__": _reduce,
        "__deepcopy__": _deepcopy,
        "__doc__": kind.__doc__,
        "__module__": kind.__module__,
        _ORIGINAL: kind,
    }
    return type(f"Fused{kind.__name__}", (kind,), members)


def fuse(model: M) -> M:
    """Let each truenorm layer do the activation, and the addition, that follow it; in place.

    y = act(norm(x)) and y = act(norm(x) + r), by one pass over the values in each direction, as
    with `activation=` and `residual=`. Found are calls that follow one another in one module's
    forward, read by torch.fx, module by module: layers in an `nn.Sequential`, and in a forward of
    your own; activations as modules, functions and methods (ReLU, ReLU6, LeakyReLU, ELU, GELU,
    SiLU, Hardswish), additions as `+`, `+=` and `torch.add`. Where the forward has optional
    arguments, depends on its tensors' values, or differs in training and evaluation, it stays as it
    is.

    A module in which something was found has a class of its own from then on, derived from the one
    it had, with another `forward`; what depends on its attributes there (`if self.downsample`) is
    as it was when `fuse` was called. Parameters, buffers, names, `state_dict` and hooks stay. A
    pickled model is as it was before. `unfuse` restores the classes.

    Errors: TypeError where `model` is no module; ValueError where it has no truenorm layer:
    `convert` first. The model is unchanged then.
    """
    _checks.check_module("model", model)
    layers = [m for m in model.modules() if isinstance(m, Activated)]
    _checks.check_has_own_layers("model", bool(layers))
    for module in list(model.modules()):
        if isinstance(module, Activated) or not any(True for _ in module.children()):
            continue
        if not any(isinstance(child, Activated) for child in module.children()):
            continue
        if hasattr(type(module), _ORIGINAL) or isinstance(module, torch.fx.GraphModule):
            continue
        graph = _trace(module)
        if graph is None:
            continue
        patterns.drop_passing(module, graph)
        if found := patterns.find(module, graph):
            patterns.replace(graph, found)
            module.__class__ = _fused_class(module, graph)
    return model


def unfuse(model: M) -> M:
    """Give each module that `fuse` has changed its own class again, in place: the inverse.

    Errors: TypeError where `model` is no module.
    """
    _checks.check_module("model", model)
    for module in model.modules():
        original = getattr(type(module), _ORIGINAL, None)
        if original is not None:
            module.__class__ = original
    return model
