"""A recorded reading as one expression that says whether all is still as it was read."""

from __future__ import annotations

import copy
import enum
import logging
from collections import OrderedDict
from collections.abc import Callable
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn import Module
from torch.nn.modules import module as of_torch

from ..._core.graphs.options import joins
from ...nn._options import options_of
from .codes import Unreadable
from .reading import Fact, is_object

_NUMBERS = (int, float, complex, str, bytes)
_THEMSELVES = (
    type(None), bool, type, FunctionType, BuiltinFunctionType, ModuleType, property, enum.Enum,
    torch.dtype, torch.device, torch.layout, torch.memory_format, type(Ellipsis),
    type(NotImplemented), logging.Logger,
)  # fmt: skip
_SEQUENCES = (list, tuple, torch.Size)
_DICTS = (dict, OrderedDict)
_SETS = (set, frozenset)
_GLOBAL_HOOKS = [
    getattr(of_torch, f"_global_{kind}_hooks")
    for kind in ("forward_pre", "forward", "backward_pre", "backward")
]
_CALL = Module.__call__
_SNAPSHOT = "_was_"
MISSING = object()


def _is_itself(value: Any) -> bool:
    """Whether being the same object says all."""
    if isinstance(value, _THEMSELVES) or value is MISSING:
        return True
    # torch's C functions, which are methods of a class without instances
    return type(value).__name__ in ("method_descriptor", "wrapper_descriptor", "getset_descriptor")


def frozen(value: Any, depth: int = 0) -> Any:
    """A value that will not change when the one that was read does; raises where there is none."""
    kind = type(value)
    if isinstance(value, Module) or kind in _NUMBERS or _is_itself(value):
        return value
    if depth < 4 and kind in _SEQUENCES:
        return kind(frozen(v, depth + 1) for v in value)
    if depth < 4 and kind in _DICTS:
        return kind((frozen(k, depth + 1), frozen(v, depth + 1)) for k, v in value.items())
    if depth < 4 and kind in _SETS:
        return frozenset(frozen(v, depth + 1) for v in value), kind
    raise Unreadable(f"the forward reads a {kind.__name__}, which may change unseen")


def same(value: Any, held: Any) -> bool:
    """Whether a value is what `frozen` made `held` of."""
    kind = type(value)
    if isinstance(value, _SETS):
        return type(held) is tuple and len(held) == 2 and held[1] is kind and value == held[0]
    if kind is not type(held):
        return False
    if kind in _NUMBERS:
        return bool(value == held)
    if kind in _SEQUENCES:
        if len(value) != len(held):
            return False
        return all(same(v, h) for v, h in zip(value, held, strict=True))
    if kind in _DICTS:
        return same(list(value), list(held)) and all(same(value[k], held[k]) for k in held)
    return value is held


def _surroundings() -> bool:
    """Whether no tool has put itself between modules and their calls, which fused ones have not."""
    # while a graph is traced by other means, it is of the forward as it was written
    return Module.__call__ is _CALL and torch._C._get_tracing_state() is None


def _extends(kind: type, fused: type) -> bool:
    """Whether a class that a tool derived from the fused one leaves what `super()` finds there."""
    return kind.__mro__[-len(fused.__mro__) :] == fused.__mro__


class Conditions:
    """Builds the expression: parts joined by `and`, over the names in `held`.

    Each part is there twice: as the compiler follows it, and as it is quickest.

    kind: the class that the module has where it holds.
    classes: whether the forward asks for those of its modules.
    """

    def __init__(self, root: Module, kind: type[Module], classes: bool) -> None:
        self.root, self.kind, self.classes = root, kind, classes
        self._plain: list[str] = []
        self._quick: list[str] = []
        self._first = ""
        self._scopes: dict[type, Any] = {}  # vars(kind) is another object each time
        self.held: dict[str, Any] = {
            "MISSING": MISSING, "same": same, "Tensor": Tensor, "is_compiling": is_compiling,
            "surroundings": _surroundings, "extends": _extends, "getattr": getattr,
            "isinstance": isinstance, "type": type, "tuple": tuple,
        }  # fmt: skip
        self._known = {id(value): name for name, value in self.held.items()}
        self._fused = self.name(kind)
        self._plain.append(f"(type(self) is {self._fused} or extends(type(self), {self._fused}))")
        self._plain.append("(is_compiling() or surroundings())")
        for hooks in _GLOBAL_HOOKS:
            self._add(f"not {self.name(hooks)}")
        self._quick.append("surroundings()")

    def _add(self, part: str, *quick: str) -> None:
        self._plain.append(part)
        self._quick += quick or (part,)

    def name(self, value: Any) -> str:
        """The name by which the expression knows an object."""
        if value is self.root:
            return "self"
        known = self._known.get(id(value))
        if known is None:
            known = self._known[id(value)] = f"_{len(self.held)}"
            self.held[known] = value
        return known

    def snapshot(self, value: Any) -> str:
        """The name of what a value was, which has nothing but itself to change it."""
        name = f"{_SNAPSHOT}{len(self.held)}"
        self.held[name] = frozen(value)
        return name

    def is_as_read(self, fact: Fact, value: Any) -> None:
        owner = self.name(fact.owner)
        if fact.how == "item":
            now = f"{owner}.get({fact.name!r}, MISSING)"
        elif fact.how == "cell":
            now = f"{owner}.cell_contents"
        else:
            now = f"getattr({owner}, {fact.name!r}, MISSING)"
        if fact.how == "attribute" and fact.name == "_modules" and isinstance(fact.owner, Module):
            self._children(f"{owner}._modules", value)
        elif isinstance(value, Module):
            self._add(f"{now} is {self.name(value)}", *self._child(fact, value))
            self._class(value)
        elif isinstance(value, MethodType):
            held, own = self.name(value.__func__), self.name(value.__self__)
            if not isinstance(value.__self__, (Module, type)) and not is_object(value.__self__):
                raise Unreadable("the forward calls a method of what is no module")
            function = f"getattr((now := {now}), '__func__', MISSING) is {held}"
            self._add(f"({function} and now.__self__ is {own})")
        elif isinstance(value, Tensor):
            self._tensor(fact, now)
        elif is_object(value):
            self._add(f"{now} is {self.name(value)}")
            self._add(f"type({self.name(value)}) is {self.name(type(value))}")
        elif _is_itself(value):
            self._add(f"{now} is {self.name(value)}")
        elif type(value) in _NUMBERS:
            kind = self.name(type(value))
            self._add(f"(type(now := {now}) is {kind} and now == {self.snapshot(value)})")
        else:
            self._add(f"same({now}, {self.snapshot(value)})")

    def _child(self, fact: Fact, value: Module) -> list[str]:
        """Module.__getattr__ takes longer than to see that it would find this."""
        owner, name = fact.owner, fact.name
        if fact.how != "attribute" or not isinstance(owner, Module):
            return []
        kinds: Any = self.kind.__mro__ if owner is self.root else type(owner).__mro__
        shadowed = any(name in vars(scope) for scope in (owner, *kinds))
        if shadowed or owner._modules.get(name) is not value:
            return []
        own = self.name(owner)
        quick = [f"{own}._modules.get({name!r}) is {self.name(value)}"]
        for kind in kinds:
            if kind not in self._scopes:
                self._scopes[kind] = vars(kind)
            quick.append(f"{name!r} not in {self.name(self._scopes[kind])}")
        return [*quick, f"{name!r} not in {own}.__dict__"]

    def _children(self, now: str, modules: dict[str, Module | None]) -> None:
        self._add(f"tuple({now}) == {self.snapshot(tuple(modules))}")
        for name, module in modules.items():
            self._add(f"{now}[{name!r}] is {self.name(module)}")
            if module is not None:
                self._class(module)

    def _class(self, module: Module) -> None:
        if self.classes:
            self._add(f"type({self.name(module)}) is {self.name(type(module))}")

    def _tensor(self, fact: Fact, now: str) -> None:
        # these alone are read anew by the graph
        held = fact.how == "attribute" and isinstance(fact.owner, Module)
        if not held or fact.name not in {**fact.owner._parameters, **fact.owner._buffers}:
            raise Unreadable("the forward reads a tensor that is neither parameter nor buffer")
        self._add(f"isinstance({now}, Tensor)")

    def is_plain(self, module: Module) -> None:
        """No hooks, and the forward of its class."""
        own, kind = self.name(module), self.name(type(module))
        self._add(f"type({own}) is {kind}")
        self._add(f"{kind}.forward is {self.name(type(module).forward)}")
        self._add(f"'forward' not in {own}.__dict__")
        for kind in ("forward", "forward_pre", "backward", "backward_pre"):
            self._add(f"not {own}._{kind}_hooks")

    def ends_as_read(self, norm: Module) -> None:
        """No activation of its own, and its output where it was: over its input, or apart."""
        options = f"{self.name(norm)}._truenorm_options"
        overwrites = options_of(norm).overwrite_input
        self._add(f"{options}.activation is None")
        self._add(f"{options}.overwrite_input is {overwrites}")

    def equals(self, module: Module, name: str, value: Any) -> None:
        self.is_as_read(Fact("attribute", module, name), value)

    def is_input(self, argument: str, exactly: bool) -> None:
        test = f"type({argument}) is Tensor" if exactly else f"isinstance({argument}, Tensor)"
        self._add(test)

    def is_left_out(self, argument: str, default: Any) -> None:
        if default is None:
            self._add(f"{argument} is None")
        else:
            kind = self.name(type(default))
            self._add(f"(type({argument}) is {kind} and {argument} == {default!r})")

    def is_empty(self, argument: str) -> None:
        self._add(f"not {argument}")

    def are_unknown(self, argument: str, names: frozenset[str]) -> None:
        """None of the arguments by name is one of these."""
        self._add(f"(not {argument} or {self.name(names)}.isdisjoint({argument}))")

    def pays(self, asked: Callable[..., bool], arguments: list[str]) -> None:
        """That all else is looked at only where `asked` of these says so, and never compiled."""
        call = f"{self.name(asked)}({', '.join(arguments)})"
        self._first = f"    if is_compiling() or not {call}:\n        return False\n"

    def is_for_eager(self) -> None:
        """That a compiler, which finds the same in its graph, reads the forward as written: each
        condition would be a guard.
        """
        self._first = f"    if is_compiling() and {self.name(joins)}():\n        return False\n"

    def source(self, arguments: str) -> str:
        plain, quick = (
            "\n        and ".join(dict.fromkeys(parts)) for parts in (self._plain, self._quick)
        )
        return (
            f"def forward(self, {arguments}):\n{self._first}"
            f"    if is_compiling() or type(self) is not {self._fused}:\n        return ({plain})\n"
            f"    return ({quick})\n"
        )


def compiled(source: str, held: dict[str, Any], name: str) -> Callable[..., bool]:
    """The function of such a source; errors about its arguments are the forward's own."""
    scope = dict(held)
    exec(compile(source, "<truenorm.fuse>", "exec"), scope)
    made = scope["forward"]
    made.__qualname__ = name
    return made  # type: ignore[no-any-return]


def of_copy(held: dict[str, Any], memo: dict[int, Any]) -> dict[str, Any]:
    """What the conditions of a model's deep copy hold: its own modules, all else as it is."""
    return {
        name: _of_copy(value, memo)
        if isinstance(value, Module) or name.startswith(_SNAPSHOT)
        # an object of the model's has been copied with it
        else memo.get(id(value), value)
        if is_object(value)
        else value
        for name, value in held.items()
    }


def _of_copy(value: Any, memo: dict[int, Any]) -> Any:
    if isinstance(value, Module):
        return copy.deepcopy(value, memo)
    if type(value) in _SEQUENCES:
        return type(value)(_of_copy(v, memo) for v in value)
    if type(value) in _DICTS:
        return type(value)((_of_copy(k, memo), _of_copy(v, memo)) for k, v in value.items())
    return frozenset(_of_copy(v, memo) for v in value) if type(value) is frozenset else value
