"""What one forward was seen to depend on while torch.fx traced it.

A graph stands for a forward as long as all that its Python read is as it was: attributes of
modules, names of its file, cells of closures. Those are recorded here, and a forward that asked
for something else (a random number, the time, whether gradients are on) is given up.
"""

from __future__ import annotations

import inspect
import logging
import operator
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import CodeType, FrameType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

import torch
from torch.nn import Module

from ..leftovers import copied, put_back
from .codes import Unreadable, compares_identity, hands_on, matches, names, step_at

_GETATTR = Module.__getattr__.__code__
_MODELS = ("fusing.tracing", "layers", "leftovers", "moments", "running", "swap", "undo")
_TRACER = ("torch.fx", *(f"truenorm._models.{name}" for name in _MODELS))
# torch's Python that reads modules and nothing else, so that the reads alone need be known
_CONTAINERS = ("torch.nn.modules.container", "torch.nn.modules.module")
# what they say is known where a graph is run at all
_ANSWERED = {getattr(torch.jit, name).__code__ for name in ("is_scripting", "is_tracing")}
# results that depend on the arguments alone
_PURE_MODULES = {"_operator", "math", "cmath", "itertools", "_functools"}
_PURE = {
    abs, all, any, bin, chr, divmod, format, getattr, hasattr, hex, isinstance,
    issubclass, iter, len, max, min, next, oct, ord, pow, repr, round, sorted, sum,
}  # fmt: skip
# the same tensors at every call: who reads a graph and runs the forward may let them be
CONSTANTS = {
    torch.arange, torch.as_tensor, torch.empty, torch.eye, torch.full, torch.linspace, torch.ones,
    torch.tensor, torch.zeros,
}  # fmt: skip
_PURE_STANDARD = {"functools", "operator", "itertools", "collections", "typing", "abc", "enum"}
_OWN = globals()
_PLAIN = (list, tuple, dict, set, frozenset, str, bytes, int, float, complex, bool)


class Fact(NamedTuple):
    """One thing that was read: an attribute, a name of a file, or what a closure holds."""

    how: str  # "attribute", "item" or "cell"
    owner: Any
    name: str


def _kind(scope: dict[str, Any]) -> str:
    name = str(scope.get("__name__", ""))
    top = name.partition(".")[0]
    if name.startswith(_TRACER):
        return "tracer"
    if top in ("torch", "truenorm"):
        return "torch"
    return "standard" if top in sys.stdlib_module_names and name != "__main__" else "user"


def is_object(value: Any) -> bool:
    """Whether all that it may say stands in attributes: an object of a class written in Python."""
    if isinstance(value, (Module, torch.Tensor, type, *_PLAIN)):
        return False
    for kind in type(value).__mro__[:-1]:
        top = kind.__module__.partition(".")[0]
        if top in ("torch", "builtins") or "__slots__" in vars(kind):
            return False
        if top in sys.stdlib_module_names and top not in ("__main__", "abc", "typing"):
            return False
    return type(value) is not object and hasattr(value, "__dict__")


def value_of(fact: Fact, missing: Any = None) -> Any:
    if fact.how == "item":
        return fact.owner.get(fact.name, missing)
    if fact.how == "cell":
        return fact.owner.cell_contents
    return getattr(fact.owner, fact.name, missing)


class Recorder:
    """Takes down what the forward of `root` reads, while `running`."""

    def __init__(
        self, root: Module, forward: Any, free: frozenset[str] = frozenset(), *,
        constants: bool = False,
    ) -> None:  # fmt: skip
        self.root, self.forward = root, forward
        self.constants = constants  # whether the forward may make some
        self.free = free  # arguments that may be anything
        self.more = any(name.startswith("**") for name in free)
        self.facts: dict[tuple[str, int, str], Fact] = {}
        self.asked_for_type = False  # of an input
        self.asked_for_class = False  # of modules
        self.why = ""
        self._quiet = 1
        self._inside: FrameType | None = None
        self._nodes: Callable[[], int] = int
        self._codes: dict[tuple[CodeType, int], None] = {}
        self._inner: set[CodeType] = set()
        self._open: list[tuple[Any, int]] = []
        self._containers: dict[int, tuple[Any, list[Any]]] = {}

    def refuse(self, why: str) -> None:
        self.why = self.why or why

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Within, the tracer's own doings are not the forward's."""
        self._quiet += 1
        try:
            yield
        finally:
            self._quiet -= 1

    @contextmanager
    def aloud(self) -> Iterator[None]:
        """Within, which is in the tracer's doings, a module's own forward is followed."""
        before = self._quiet, self._inside
        self._quiet, self._inside = 0, None
        try:
            yield
        finally:
            self._quiet, self._inside = before

    @contextmanager
    def running(self, nodes: Callable[[], int]) -> Iterator[None]:
        """Within, the forward runs; `nodes` counts what has become part of the graph."""
        self._nodes = nodes
        before = sys.getprofile()
        self._quiet -= 1
        _here.recorder = self
        sys.setprofile(self._profile)
        try:
            yield
        finally:
            sys.setprofile(before)
            _here.recorder = None
            self._quiet += 1

    def read(self, owner: Module, name: str, frame: FrameType) -> None:
        if self._quiet or frame.f_code is _GETATTR or _kind(frame.f_globals) == "tracer":
            return
        if name == "__class__":
            self.asked_for_class = True
            return
        if owner is self.root and name in ("training", "_truenorm_plan"):
            return
        self._add("attribute", owner, name)

    def asks_for_type(self, frame: FrameType, of: str | bool) -> None:
        """of: the input's name, or False."""
        if _kind(frame.f_globals) != "user":
            return
        if of and of not in self.free:
            self.asked_for_type = True
        else:
            self.refuse("the forward asks for the type of a value")

    def asks_by_name(self, frame: FrameType, name: str) -> None:
        """That code which is at `frame` asks a value for an attribute: as `x.name`, or else."""
        dunder = name.startswith("__")
        # with LOAD_METHOD, of Pythons before 3.12
        written = step_at(frame)[0].startswith(("LOAD_ATTR", "LOAD_METHOD"))
        if not (dunder or written) and _kind(frame.f_globals) == "user":
            self.refuse(f"the forward asks a value for {name!r} by getattr or hasattr")

    def is_shown(self, frame: FrameType) -> None:
        """That a value is to be written out as text."""
        if _kind(frame.f_globals) != "tracer":
            self.refuse("the forward writes out a value")

    def _add(self, how: str, owner: Any, name: str) -> None:
        key = how, id(owner), name
        if key not in self.facts:
            self.facts[key] = Fact(how, owner, name)

    def _profile(self, frame: FrameType, event: str, arg: Any) -> None:
        if event == "return" and frame is self._inside:
            self._inside = None
            self._quiet -= 1
        if self._quiet or frame.f_globals is _OWN:
            return
        try:
            if event == "call":
                self._called(frame)
            elif event == "return" and self._open and self._open[-1][0] is frame:
                self._closed(frame.f_code.co_name)
            elif event == "c_call":
                self._called_c(frame, arg)
            elif self._open and self._open[-1][0] is arg:  # c_return or c_exception
                self._closed(getattr(arg, "__name__", repr(arg)))
        except Unreadable as error:
            self.refuse(str(error))

    def _called_c(self, frame: FrameType, function: Any) -> None:
        if _kind(frame.f_globals) != "user":
            return
        if function is isinstance or function is issubclass:
            self.asked_for_class = True
        elif not (_is_pure(function) or (self.constants and function in CONSTANTS)):
            self._open.append((function, self._nodes()))

    def _closed(self, name: str) -> None:
        # what has become a node is computed again at each call; what has not is not
        if self._nodes() == self._open.pop()[1]:
            self.refuse(f"the forward asks {name}()")

    def _called(self, frame: FrameType) -> None:
        kind, caller = _kind(frame.f_globals), frame.f_back
        if caller is not None and caller.f_globals is _OWN:
            return
        if kind == "user":
            self._code(frame)
            return
        if kind == "tracer":
            self._inside = frame
            self._quiet += 1
            return
        if caller is None or _kind(caller.f_globals) != "user":
            return
        name = frame.f_globals.get("__name__", "")
        pure = name.partition(".")[0] in _PURE_STANDARD if kind == "standard" else False
        if not pure and name not in _CONTAINERS and frame.f_code not in _ANSWERED:
            self._open.append((frame, self._nodes()))

    def _code(self, frame: FrameType) -> None:
        code, scope = frame.f_code, frame.f_globals
        if (code, id(scope)) in self._codes:
            return
        self._codes[code, id(scope)] = None
        self.asked_for_class |= matches(code)
        self._inner.update(c for c in code.co_consts if isinstance(c, CodeType))
        loaded, mentioned = names(code)
        if self.more and code.co_flags & inspect.CO_VARKEYWORDS and not hands_on(code):
            raise Unreadable("the forward looks through its **kwargs")
        if self.free and compares_identity(code):
            raise Unreadable("the forward asks whether an argument is one object")
        if "type" in loaded:
            raise Unreadable("the forward asks for the type of a value")
        for name in loaded:
            if name in scope:
                self._add("item", scope, name)
                self._look_into(scope[name], mentioned)
        if "super" in loaded or "__class__" in code.co_freevars + code.co_names:
            first = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
            for base in type(first).__mro__ if isinstance(first, Module) else ():
                for name in mentioned & vars(base).keys():
                    self._add("attribute", base, name)

    def _look_into(self, value: Any, mentioned: frozenset[str], depth: int = 0) -> None:
        """The parts of a file or class that are mentioned may be read, from where it is."""
        items = copied(value)
        if items is not None and id(value) not in self._containers:
            self._containers[id(value)] = value, items
        if depth > 3 or not isinstance(value, (ModuleType, type)):
            return
        held: set[str] = set()
        for scope in value.__mro__ if isinstance(value, type) else (value,):
            held.update(mentioned & vars(scope).keys())
        for name in sorted(held):
            self._add("attribute", value, name)
            if isinstance(value, ModuleType):
                self._look_into(getattr(value, name), mentioned, depth + 1)

    def finish(self) -> list[Fact]:
        """All that was read; raises where that is not all that the graph depends on."""
        for container, items in self._containers.values():
            if put_back(container, items):
                self.refuse("the forward writes to what lies outside of the model")
        if self.why:
            raise Unreadable(self.why)
        self._closures()
        self._objects()
        return list(self.facts.values())

    def strings(self) -> frozenset[str]:
        """All those that the code had, to ask for a name by."""
        written = (c for code, _ in self._codes for c in code.co_consts)
        read = map(value_of, self.facts.values())
        return frozenset(c for c in (*written, *read) if isinstance(c, str))

    def _objects(self) -> None:
        """Of objects, what the code that ran mentions of them."""
        mentioned: set[str] = set()
        for code, _ in self._codes:
            mentioned |= names(code)[1]
        seen = 0
        while seen < len(self.facts):
            facts = list(self.facts.values())
            for value in map(value_of, facts[seen:]):
                # a call of a logger is seen as one into the standard library
                if isinstance(value, logging.Logger) and mentioned & vars(value).keys():
                    raise Unreadable("the forward reads a logger")
                if not is_object(value):
                    continue
                if mentioned & {"getattr", "vars", "__dict__", "attrgetter"} or len(facts) > 500:
                    raise Unreadable(
                        "the forward reads an object by names that are made as it runs"
                    )
                held = set(vars(value)).union(*map(vars, type(value).__mro__))
                for name in sorted(mentioned & held):
                    self._add("attribute", value, name)
            seen = len(facts)

    def _closures(self) -> None:
        """What functions found outside hold of the scope that they were made in."""
        functions: dict[CodeType, FunctionType] = {}
        seen = 0
        bases: Any = type(self.root).__mro__
        kind = next(b for b in bases if "forward" in vars(b) and "_truenorm_unfused" not in vars(b))
        forward = self.forward
        self._add("attribute", kind, "forward")
        open_codes = {c for c, _ in self._codes if set(c.co_freevars) - {"__class__"}}
        open_codes -= self._inner
        functions[getattr(forward, "__code__", None)] = forward  # type: ignore[index]
        while open_codes:
            facts = list(self.facts.values())
            for fact in facts[seen:]:
                value = value_of(fact)
                value = value.__func__ if isinstance(value, MethodType) else value
                if isinstance(value, FunctionType):
                    functions[value.__code__] = value
            seen = len(facts)
            found = open_codes & functions.keys()
            if not found:
                raise Unreadable("the forward calls a closure that cannot be found again")
            for code in found:
                cells = functions[code].__closure__ or ()
                for name, cell in zip(code.co_freevars, cells, strict=True):
                    if name != "__class__":
                        self._add("cell", cell, name)
                        self._look_into(cell.cell_contents, names(code)[1])
            open_codes -= found


def _is_pure(function: Any) -> bool:
    module, owner = getattr(function, "__module__", None), getattr(function, "__self__", None)
    if isinstance(owner, ModuleType):
        return module in _PURE_MODULES or (module == "builtins" and function in _PURE)
    if isinstance(owner, type):
        return owner in _PLAIN
    return type(owner) in _PLAIN or isinstance(owner, (dict, torch.Size, operator.attrgetter))


class _Here(threading.local):
    recorder: Recorder | None = None


_here = _Here()


def _recorded(self: Module, name: str) -> Any:
    recorder = _here.recorder
    if recorder is not None:
        recorder.read(self, name, sys._getframe(1))
    return object.__getattribute__(self, name)


@contextmanager
def recording() -> Iterator[None]:
    """Within, modules tell the recorder what is read of them.

    Once for many traces, and for Module alone: Python gives a class a limited number of versions
    before it stops caching lookups in it.
    """
    Module.__getattribute__ = _recorded  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        del Module.__getattribute__


def is_recorded(module: Module) -> bool:
    """Whether its class leaves reading attributes to Module."""
    return type(module).__getattribute__ is _recorded
