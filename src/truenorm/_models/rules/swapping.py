"""The class that a recognised norm gets: truenorm's forward first, and all else its own."""

from __future__ import annotations

import hashlib
import types
from collections.abc import Callable, Iterable
from typing import Any, cast
from weakref import WeakValueDictionary

import torch
from torch.nn import Module

from ... import nn
from ..._core.rule import Rule
from ...nn._leaving import small_of
from ...nn._orders import has_one_call
from ...nn._ruled import UNLIKE, FromModule, Hidden, Ruled, forward_of, gated_forward_of
from .. import swap
from ..swap import Kind
from .proof import Proof, is_told, told

_made: WeakValueDictionary[Any, Kind] = WeakValueDictionary()

_TORCHS: dict[Kind, Kind] = {
    torch.nn.BatchNorm1d: nn.BatchNorm1d,
    torch.nn.BatchNorm2d: nn.BatchNorm2d,
    torch.nn.BatchNorm3d: nn.BatchNorm3d,
    torch.nn.GroupNorm: nn.GroupNorm,
    torch.nn.LayerNorm: nn.LayerNorm,
    torch.nn.RMSNorm: nn.RMSNorm,
}
_BY_KIND: dict[str, Kind] = {"rms": torch.nn.RMSNorm, "layer": torch.nn.LayerNorm}
# what a class of its own may have, for its own forward
_FREE = frozenset({"forward"})


def torchs(theirs: Kind, rule: Rule) -> Kind | None:
    """The class of torch's that the swapped layer is an instance of.

    Its own base, else the one whose weight means the same: 1 + weight, a row of weights for each
    head, or weights along the channels of an image, would be read wrongly by whoever knows torch's.
    """
    base = next((k for k in theirs.__mro__ if k in _TORCHS), None)
    if base is not None:
        return base
    if rule.offset or rule.axis != -1 or rule.gate or rule.heads:
        return None
    if rule.bias and rule.kind == "rms":
        return None
    return _BY_KIND.get(rule.kind)


def obstacle(theirs: Kind, rule: Rule) -> str | None:
    """Why no class can be derived from this one."""
    base = torchs(theirs, rule)
    ours = Ruled if base is None else _TORCHS[base]
    within = base if base is not None and issubclass(theirs, base) else Module
    if rule.kind == "weight" and issubclass(theirs, torch.nn.Conv2d):
        within = torch.nn.Conv2d
    own = swap.overridden(theirs, within, ours, _FREE)
    return None if own is None else f"its class has {own!r} of its own"


def computed(rule: Rule, rounding: str) -> Rule:
    """What is computed for a module: its own rule, or the same formula rounded once."""
    if rounding == "module":
        return rule
    if rule.gate == "after":
        return rule._replace(rounding="once", gate="within")
    if rule.rounding in ("once", "steps"):
        return rule
    # the output keeps the dtype that the module's has
    return rule._replace(rounding="once", wide_output=True)


def derived(theirs: Kind, rule: Rule, proof: Proof, rounding: str = "module") -> Kind:
    """One class for each of these: `theirs`, but for what truenorm serves."""
    key = theirs, rule, proof, rounding
    if (made := _made.get(key)) is not None:
        return made
    base = torchs(theirs, rule)
    is_torchs = proof.is_torchs or (rule.kind == "layer" and issubclass(theirs, torch.nn.LayerNorm))
    ours = None if base is None else _TORCHS[base]
    members: dict[str, Any] = {
        "__init__": theirs.__init__,
        "__reduce_ex__": _reduce,
        "__setattr__": _set,
        "__module__": theirs.__module__,
        "__qualname__": theirs.__qualname__,
        "__doc__": theirs.__doc__,
        "forward": gated_forward_of(theirs.forward)
        if rule.gate
        else forward_of(
            theirs.forward,
            small_of(rule, is_torchs),
            "weight" if rule.kind == "weight" else None,
        ),
        "_read": rule,
        "_rule": computed(rule, rounding),
        "_rounding": rounding,
        "_pairs": proof.pairs,
        "_ranks": proof.ranks,
        "_keeps": proof.keeps,
        "_is_torchs": is_torchs,
        "_may_be_left": is_torchs or rule.kind in UNLIKE,
        "_proof": proof,
        "_asked": dict(proof.asked),
        "_ours": ours if base and issubclass(theirs, base) and _is_torchs(rule) else None,
        "_theirs": theirs,
        "_has_one_call": has_one_call(rule) and not is_torchs,
        "_forms": {},
        swap._PARTS: (ours or Ruled, theirs),
    }
    if base is not None and not issubclass(theirs, base):
        members |= _as_theirs(theirs, base, rule)
    bases = (Ruled, theirs) if ours is None else (Ruled, ours, theirs)
    made = types.new_class(theirs.__name__, bases, {}, lambda ns: ns.update(members))
    _made[key] = made
    return made


def _is_torchs(rule: Rule) -> bool:
    """Whether truenorm's layer of the same name computes the rule."""
    image = rule.kind in ("batch", "group")
    plain = rule.rounding == "once" and not rule.offset and not rule.heads
    return plain and (rule.axis == -1 or image)


def _as_theirs(theirs: Kind, base: Kind, rule: Rule) -> dict[str, Any]:
    """What torch's class has, and the module's own has otherwise or not at all."""
    found: dict[str, Any] = {}
    own = {n: v for k in reversed(theirs.__mro__[: theirs.__mro__.index(Module)])
           for n, v in vars(k).items()}  # fmt: skip
    for kind in base.__mro__[: base.__mro__.index(Module)]:
        for name in vars(kind):
            if name in own and not name.startswith("__"):
                found[name] = own[name]
            elif not name.startswith("__") and not hasattr(Module, name):
                found[name] = Hidden(name)
    for name in ("extra_repr", "__repr__"):
        found[name] = own.get(name, getattr(Module, name))
    found.pop("forward", None)
    found["normalized_shape"] = FromModule("normalized_shape", lambda layer: _shape_of(layer, rule))
    if rule.eps != "eps":
        found["eps"] = FromModule("eps", lambda layer: _eps_of(layer, rule))
    return found


def _shape_of(layer: Any, rule: Rule) -> tuple[int, ...]:
    if rule.weight is None:
        raise AttributeError("normalized_shape")
    return tuple(getattr(layer, rule.weight).shape)


def _eps_of(layer: Any, rule: Rule) -> Any:
    return getattr(layer, rule.eps) if isinstance(rule.eps, str) else rule.eps


def still_proven(module: Module, kind: Any, names: Iterable[str] | None = None) -> bool:
    """Whether the module's attributes, or these of them, are what its class was tried with."""
    held, asked = vars(module), kind._asked
    for name in asked if names is None else names:
        value = held.get(name)
        if not is_told(name, value) or told(value) != asked[name]:
            return False
    return True


def _set(self: Module, name: str, value: Any) -> None:
    """An attribute by another value than the class was tried with: its own forward serves now."""
    kind = cast(Any, next(k for k in type(self).__mro__ if swap.parts(k)))
    super(kind, self).__setattr__(name, value)
    if name in kind._asked and not still_proven(self, kind, (name,)):
        swap.become(self, kind._theirs)


# --- pickles: the class cannot be imported; the module's own can, and is swapped where this is read


def fingerprint(kind: Kind) -> str:
    """Of a class's forward: another version of a library has another."""
    code = getattr(kind.forward, "__code__", None)
    if code is None:
        return ""
    said = repr(
        (code.co_code, code.co_names, [c for c in code.co_consts if not hasattr(c, "co_code")])
    )
    return hashlib.sha256(said.encode()).hexdigest()[:16]


def _reduce(self: Module, protocol: Any) -> Any:
    kind = cast(Any, next(k for k in type(self).__mro__ if swap.parts(k)))
    theirs = kind._theirs
    reduced = cast(Any, super(kind, self)).__reduce_ex__(max(protocol, 2))
    args = tuple(theirs if a is type(self) else a for a in reduced[1])
    what = tuple(kind._read), tuple(kind._proof), kind._rounding
    put = theirs, what, fingerprint(theirs), reduced[0], args
    return _restored, put, *reduced[2:]


def _restored(
    theirs: Kind, what: tuple[Any, Any, str], was: str, make: Callable[..., Module], args: Any
) -> Module:
    module = make(*args)
    # what was proven of one forward says nothing of another
    if fingerprint(theirs) == was:
        rule, proof, rounding = what
        module.__class__ = derived(theirs, Rule(*rule), Proof(*proof), rounding)
    return module
