"""The class of a fused module: the one it had, whose forward looks for a plan first."""

from __future__ import annotations

import copy
import copyreg
import functools
import types
import weakref
from typing import Any

from torch.nn import Module

PLAN = "_truenorm_plan"


class Fused:
    """Mixed in before the original class. A module without a plan is one of the original class."""

    # no annotations: torch.jit.script would look for what they name
    _truenorm_plan = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        # a class that keeps a list of its subclasses need not hear of this one
        if not is_fused_class(cls) or _is_checkpointing(original_of(cls).forward):
            super().__init_subclass__(**kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # a class made here cannot be imported where the file is read: there, it is as before
        reduced: Any = super().__reduce_ex__(protocol)
        if not is_fused_class(type(self)) or not isinstance(reduced, tuple):
            return reduced
        make, given, *rest = reduced
        # pickle holds the class of what the usual function makes against the object's own
        make = _new if make is copyreg.__newobj__ else make  # type: ignore[attr-defined]
        original = original_of(type(self))
        given = tuple(original if g is type(self) else g for g in given)
        if rest and isinstance(rest[0], dict):
            rest[0] = {name: value for name, value in rest[0].items() if name != PLAN}
        return make, given, *rest

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        inherited = getattr(super(), "__deepcopy__", None)
        if inherited is not None:
            return inherited(memo)
        if not is_fused_class(type(self)):
            # parametrize's class refuses to give its state, and leaves the copy to this method
            twin = _new(type(self))
            memo[id(self)] = twin
            vars(twin).update(copy.deepcopy(vars(self), memo))
            return twin
        make, given, *rest = self.__reduce_ex__(4)
        twin = make(*given)
        memo[id(self)] = twin
        twin.__setstate__(copy.deepcopy(rest[0], memo))
        twin.__class__ = type(self)
        if self._truenorm_plan is not None:
            vars(twin)[PLAN] = copy.deepcopy(self._truenorm_plan, memo)
        return twin


def _new(kind: Any, *given: Any) -> Any:
    return kind.__new__(kind, *given)


def is_fused_class(kind: type) -> bool:
    """Whether `fuse` has made it; classes that others derive from such a one are theirs."""
    return "_truenorm_unfused" in vars(kind)


def original_of(fused: type) -> type[Module]:
    """The class that a fused one stands for."""
    return vars(fused)["_truenorm_unfused"]  # type: ignore[no-any-return]


def _is_checkpointing(forward: Any) -> bool:
    """Whether it is what transformers puts around each class's own, the outermost one alone."""
    code = getattr(forward, "__code__", None)
    return (
        getattr(code, "co_name", "") == "forward_with_checkpointing"
        and forward.__globals__.get("__name__") == "transformers.modeling_layers"
    )


def written(kind: type[Module]) -> Any:
    """A class's forward as its author wrote it, without what `fuse` and transformers put around."""
    forward: Any = kind.forward
    while _is_checkpointing(forward) or getattr(forward, "__code__", None) in _OWN_CODE:
        forward = forward.__wrapped__
    return forward


_OWN_CODE: set[Any] = set()
_made: weakref.WeakValueDictionary[type, type] = weakref.WeakValueDictionary()


def fused_class(kind: type[Module]) -> type[Module]:
    """One for each class, with its names: what goes by a class's name finds what it looks for."""
    known = _made.get(kind)
    if known is not None:
        return known

    @functools.wraps(kind.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        plan = self._truenorm_plan
        if plan is not None and plan.holds(self, *args, **kwargs):
            return plan.graph(plan.calls, self, *args, **kwargs)
        return kind.forward(self, *args, **kwargs)

    _OWN_CODE.add(forward.__code__)  # type: ignore[attr-defined]

    def fill(members: dict[str, Any]) -> None:
        members.update(
            forward=forward,
            _truenorm_unfused=kind,
            __doc__=kind.__doc__,
            __module__=kind.__module__,
            __qualname__=kind.__qualname__,
        )

    made = types.new_class(kind.__name__, (Fused, kind), {}, fill)
    _made[kind] = made
    return made
