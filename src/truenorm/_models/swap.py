"""Giving a layer another class in place, with what torch and its users have put around it kept.

A layer's own class may stand within one that torch has made at run time (parametrized, sharded):
`core` is what is within, and `become` changes that alone. A class that a user has derived from
torch's layer, and that leaves what the layer computes to torch, is swapped for one derived from
both truenorm's layer and theirs: `derived`.
"""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast
from weakref import WeakValueDictionary

from torch.nn import Module

from ..nn._options import Attribute

Kind = type[Module]

_PARTS = "_truenorm_parts"  # of a class made by `derived`: truenorm's, and the user's
_BEFORE = "_truenorm_before"  # of a class made by `_rewrapped`: what was within, and the class then
_made: WeakValueDictionary[tuple[Kind, Kind], Kind] = WeakValueDictionary()

# what a subclass may have of its own without a say in what the layer computes
# fmt: off
_HARMLESS = frozenset({
    "__init__", "__module__", "__qualname__", "__doc__", "__annotations__", "__annotate__",
    "__annotate_func__", "__annotations_cache__", "__dict__", "__weakref__", "__constants__",
    "__firstlineno__", "__slotnames__", "__static_attributes__", "__parameters__",
    "__orig_bases__", "__repr__", "extra_repr", "_version", "reset_parameters",
    "reset_running_stats", "__setattr__", "__delattr__", "_apply", "_save_to_state_dict",
    "_load_from_state_dict",
})
_CALLING = frozenset({
    "__call__", "_call_impl", "_wrapped_call_impl", "__getattr__", "__getattribute__",
    "__getstate__", "__setstate__", "__class__", "weight", "bias", "running_mean", "running_var",
    "num_batches_tracked", "training", "_parameters", "_buffers", "_modules",
})
# fmt: on


class Left(NamedTuple):
    """A layer that was not swapped.

    unexpected: whether its user would have expected that it is.
    """

    name: str
    kind: Kind
    reason: str
    unexpected: bool


# --- classes


def _within(kind: Kind) -> Kind | None:
    """What torch has derived this class from at run time; None for a class from a file."""
    if not kind.__module__.startswith("torch.") or _PARTS in vars(kind):
        return None
    if getattr(sys.modules.get(kind.__module__), kind.__name__, None) is kind:
        return None
    return next((base for base in kind.__bases__ if issubclass(base, Module)), None)


def core(module: Module) -> Kind:
    """A layer's class, without those that torch has derived from it for this layer."""
    kind = type(module)
    while (inner := _within(kind)) is not None:
        kind = inner
    return kind


def _rewrapped(kind: Kind, old: Kind, new: Kind) -> Kind:
    """What `kind` would be, had torch derived it from `new`."""
    if kind is old:
        return new
    before = vars(kind).get(_BEFORE)
    if before is not None and before[0] is new:
        return cast(Kind, before[1])
    if (made := _made.get((kind, new))) is None:
        inner = _within(kind)
        assert inner is not None
        put = _rewrapped(inner, old, new)
        bases = tuple(put if base is inner else base for base in kind.__bases__)
        held = {k: v for k, v in vars(kind).items() if k not in ("__dict__", "__weakref__")}
        held[_BEFORE] = old, kind
        name = kind.__name__.replace(old.__name__, new.__name__)
        made = _made[kind, new] = types.new_class(name, bases, {}, lambda ns: ns.update(held))
    return made


def parts(kind: Kind) -> tuple[Kind, Kind] | None:
    """(truenorm's class, the user's) of a class made by `derived`."""
    return cast("tuple[Kind, Kind] | None", vars(kind).get(_PARTS))


def derived(ours: Kind, theirs: Kind) -> Kind:
    """One class for each of these pairs: `theirs`, but for what truenorm's layer computes."""
    if (made := _made.get((ours, theirs))) is None:
        members = {
            "__init__": theirs.__init__,
            "__reduce_ex__": _reduce,
            "__module__": theirs.__module__,
            "__qualname__": theirs.__qualname__,
            "__doc__": theirs.__doc__,
            _PARTS: (ours, theirs),
        }
        made = types.new_class(theirs.__name__, (ours, theirs), {}, lambda ns: ns.update(members))
        _made[ours, theirs] = made
    return made


def _reduce(self: Module, protocol: Any) -> Any:
    # the class cannot be imported: the user's can, and is swapped again where this is read
    kind = next(k for k in type(self).__mro__ if parts(k))
    ours, theirs = cast(tuple[Kind, Kind], parts(kind))
    reduced = cast(Any, super(kind, self)).__reduce_ex__(max(protocol, 2))
    args = tuple(theirs if a is type(self) else a for a in reduced[1])
    return _restored, (ours, theirs, reduced[0], args), *reduced[2:]


def _restored(ours: Kind, theirs: Kind, make: Callable[..., Module], args: Any) -> Module:
    module = make(*args)
    module.__class__ = derived(ours, theirs)
    return module


def overridden(
    theirs: Kind, base: Kind, ours: Kind, free: frozenset[str] = frozenset()
) -> str | None:
    """What a class derived from torch's `base` has of its own that the layer's result needs.

    free: names that it may have.
    """
    needed = set(_CALLING)
    for kind in (*base.__mro__, *ours.__mro__):
        if kind is not object and kind is not Module:
            needed.update(vars(kind), vars(kind).get("__annotations__", ()))
    needed -= _HARMLESS | free
    for kind in theirs.__mro__[: theirs.__mro__.index(base)]:
        for name in vars(kind):
            if name in needed:
                return name
    return None


def _patched(kind: Kind) -> str | None:
    """Whose forward somebody has put into torch's class, for all of its layers; None for its own.

    By what the function's globals are: functools.wraps would have it bear torch's name.
    """
    forward = kind.forward
    home = getattr(forward, "__globals__", {}).get("__name__", type(forward).__module__)
    if home.startswith("torch.nn."):
        return None
    return f"torch's class has been given the forward of {home}, which would no longer run"


# --- instances


def _methods(module: Module) -> dict[str, str]:
    """By its attributes' names: methods of the class that the instance itself holds, bound."""
    return {
        name: value.__func__.__name__
        for name, value in vars(module).items()
        if isinstance(value, types.MethodType)
        and value.__self__ is module
        and getattr(type(module), value.__func__.__name__, None) is value.__func__
    }


def _holds(call: Any, method: Any) -> bool:
    """Whether a callable keeps this bound method itself, where nobody could rebind it."""
    if isinstance(call, functools.partial):
        given = (*call.args, *call.keywords.values())
        return any(each == method for each in given) or _holds(call.func, method)
    function = getattr(call, "__func__", call)
    cells = getattr(function, "__closure__", None) or ()
    kept = [cell.cell_contents for cell in cells if cell != types.CellType()]
    defaults = (getattr(function, "__defaults__", None) or ()) + tuple(
        (getattr(function, "__kwdefaults__", None) or {}).values()
    )
    return any(each == method for each in (*kept, *defaults))


def _wraps_a_method(module: Module, forward: Any, methods: Mapping[str, str]) -> bool:
    """Whether this forward goes on to the class's, as the instance holds it: accelerate's hooks."""
    inner = getattr(forward, "__wrapped__", None)
    held = (vars(module)[name] for name, method in methods.items() if method == "forward")
    return any(inner == method for method in held) and not _holds(forward, inner)


def _added(old: Kind, new: Kind) -> frozenset[str]:
    """Names that mean something to `new` and nothing to `old`; options yield to the instance's."""
    names = {
        name
        for kind in new.__mro__
        for name, value in vars(kind).items()
        if not isinstance(value, Attribute)
    }
    return frozenset(names.difference(*(vars(kind) for kind in old.__mro__)))


def obstacle(module: Module, new: Kind) -> str | None:
    """Why a layer cannot be made one of class `new`; None where it can."""
    held = vars(module)
    places: list[dict[str, Any]] = [held, held["_parameters"], held["_buffers"], held["_modules"]]
    for place in places:
        for name in sorted(place.keys() & _added(core(module), new)):
            return (
                f"it holds an attribute {name!r} of its user's, which has a meaning in the class "
                "that it would get: give it another name first"
            )
    forward = vars(module).get("forward")
    methods = _methods(module)
    kept = forward is None or "forward" in methods or _wraps_a_method(module, forward, methods)
    if not kept:
        made_by = getattr(forward, "__module__", None) or type(forward).__module__
        name = getattr(forward, "__qualname__", type(forward).__name__)
        return (
            f"it has a forward of its own ({made_by}.{name}), which would go on running: take it "
            "away (del layer.forward) first"
        )
    kind = type(module)
    try:
        module.__class__ = _rewrapped(kind, core(module), new)
    except TypeError as error:
        return f"its class cannot be changed in place ({error})"
    module.__class__ = kind
    return None


def become(module: Module, new: Kind) -> None:
    """Make the layer one of class `new`, after `obstacle` has found nothing in the way."""
    put(module, _rewrapped(type(module), core(module), new))


def put(module: Module, kind: Kind) -> None:
    """Set the layer's class, and bind anew the methods of the class that it holds itself."""
    methods = _methods(module)
    forward = vars(module).get("forward")
    wraps = "forward" not in methods and _wraps_a_method(module, forward, methods)
    module.__class__ = kind
    # torch 2.11 goes on with a compiled graph as long as no dictionary has changed
    vars(module)["_truenorm_put"] = kind
    del vars(module)["_truenorm_put"]
    for name, method in methods.items():
        vars(module)[name] = types.MethodType(getattr(type(module), method), module)
    if wraps:
        inner = next(n for n, method in methods.items() if method == "forward")
        cast(Any, forward).__wrapped__ = vars(module)[inner]


# --- models


def targets(model: Module, classes: Mapping[Kind, Kind]) -> tuple[dict[Module, Kind], list[Left]]:
    """The class that each layer of torch's below `model` would have, and the layers left alone."""
    found: dict[Module, Kind] = {}
    left: list[Left] = []
    for name, module in model.named_modules():
        kind = core(module)
        new = classes.get(kind)
        base = next((k for k in kind.__mro__ if k in classes), None)
        if base is None or issubclass(kind, classes[base]):
            continue
        if new is None:
            if (own := overridden(kind, base, classes[base])) is not None:
                left.append(Left(name, kind, f"its class has {own!r} of its own", False))
                continue
            try:
                new = derived(classes[base], kind)
            except Exception as error:  # whatever its metaclass or __init_subclass__ raises
                reason = f"no class can be derived from its own ({type(error).__name__}: {error})"
                left.append(Left(name, kind, reason, True))
                continue
        if (why := _patched(base) or obstacle(module, new)) is not None:
            left.append(Left(name, kind, why, True))
        else:
            found[module] = new
    return found, left
