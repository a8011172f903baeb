"""What a module is: by whoever registered its class, by its library's reader, by its formula."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Conv2d, LayerNorm, Module

from ..._core.rule import Rule
from ...nn._orders import groups_of
from ...nn._ruled import Ruled
from .. import swap
from ..swap import Kind
from . import register, swapping
from .candidates import by_formula
from .libraries import READERS
from .proof import Subject, agrees, features_of, is_told, is_vector, prove, takes, told
from .trial import shadows

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Found(NamedTuple):
    """What was found out about a module: its rule and the class it gets, or why it gets none."""

    rule: Rule | None
    kind: Kind | None
    reason: str


_found: dict[Any, Found] = {}


def looks_like_norm(module: Module) -> bool:
    """Whether a module of no known class is a norm by its name and by what it holds."""
    names = type(module).__name__ + _origin(type(module)).__name__
    if "norm" not in names.lower() or isinstance(module, Ruled):
        return False
    for child in module.children():
        if any(True for _ in child.parameters()) or looks_like_norm(child):
            return False
    own = [p for p in module._parameters.values() if p is not None]
    if own and all(p.dim() <= 2 or is_vector(p) or p.shape[-2] == 1 for p in own):
        return True
    if any(n == "normalized_shape" or "eps" in n for n in vars(module)):
        return True
    # F.normalize has an eps of its own
    return not own and not module._modules and _origin(type(module)).__name__.endswith("Norm")


def _attributes(module: Module) -> tuple[Any, ...]:
    """What a class's forward may choose by."""
    features = features_of(module)
    # a convolution's sizes, and timm's scale that goes with them
    sizes = ("in_channels", "out_channels", "scale") if isinstance(module, Conv2d) else ()
    held = (
        (n, told(v, features))
        for n, v in vars(module).items()
        if is_told(n, v) and n not in sizes and not shadows(module, n)
    )
    absent = (n for place in (module._parameters, module._buffers) for n in place)
    children = ((n, type(m)) for n, m in module._modules.items())
    return (*sorted(held, key=repr), *absent, *children)


def _tensors(module: Module, rule: Rule) -> dict[str, str] | str:
    """By role, the names of a rule's tensors that the module has; or what is not in order."""
    roles = {"weight": rule.weight, "bias": rule.bias}
    if rule.kind in ("frozen", "batch"):
        roles |= {"running_mean": "running_mean", "running_var": "running_var"}
    names = {}
    for role, name in roles.items():
        if name is None:
            continue
        value = getattr(module, name, None)
        if value is None:
            if name not in module._parameters and name not in module._buffers:
                return f"it has no {name!r}"
            continue
        if not isinstance(value, Tensor):
            return f"its {name!r} is a {type(value).__name__}"
        if type(value) not in (torch.nn.Parameter, Tensor):
            return f"its {name!r} is a {type(value).__name__}: convert the model before"
        if value.is_quantized or value.dtype not in DTYPES:
            return f"its {name!r} is {value.dtype}, which only its own class serves"
        if not _fits(value, rule):
            return f"its {name!r} has {value.dim()} dimensions, not 1"
        names[role] = name
    return names


def _fits(value: Tensor, rule: Rule) -> bool:
    """Whether a rule's tensor has a shape that one of that kind can have."""
    if value.dim() == 1:
        return True
    if rule.kind == "l2" and value.dim():
        return True  # whatever x̂ can be multiplied by
    if rule.kind in ("response", "weight") or rule.axis == 1:
        return is_vector(value)
    return value.dim() == 2 and _may_have_heads(rule)


def _may_have_heads(rule: Rule) -> bool:
    return rule.kind in ("rms", "layer") and rule.axis == -1 and rule.gate is None


def _by_heads(module: Module, rule: Rule, names: dict[str, str]) -> Rule | str:
    """The rule, with whether there is a row of weights for each head; or what is not in order."""
    if not _may_have_heads(rule):
        return rule._replace(heads=False)
    shapes = {name: tuple(getattr(module, name).shape) for name in names.values()}
    if len(set(shapes.values())) > 1:
        said = " and ".join(f"{name!r} {shape}" for name, shape in shapes.items())
        return f"it has {said}, which truenorm serves where both have one shape"
    heads = any(len(shape) == 2 for shape in shapes.values())
    if heads and isinstance(module, LayerNorm):
        return "a row of weights per head after torch's layer_norm: truenorm would not be faster"
    return rule._replace(heads=heads)


def _origin(kind: Kind) -> Kind:
    """The class that a class's forward is from."""
    return next(k for k in kind.__mro__ if "forward" in vars(k))


def _candidates(module: Module, kind: Kind) -> list[Rule] | Iterator[Rule]:
    given = register.read(module, swap.core(module))
    if given is not None:
        return [given]
    reader = READERS.get(kind.__module__.partition(".")[0])
    if reader is not None and (named := reader(module, kind)) is not None:
        return [named] if isinstance(named, Rule) else list(named)
    return by_formula(module) if looks_like_norm(module) else []


def _try(module: Module, kind: Kind, rule: Rule) -> tuple[Found, bool]:
    """What comes of one rule, and whether no other rule has to be tried."""
    names = _tensors(module, rule)
    if isinstance(names, str):
        return Found(rule, None, names), True
    by_heads = _by_heads(module, rule, names)
    if isinstance(by_heads, str):
        return Found(rule, None, by_heads), True
    rule = by_heads
    if (why := swapping.obstacle(kind, rule)) is not None:
        return Found(rule, None, why), True
    held = (*names.values(), "weight", "bias") if rule.kind == "weight" else names.values()
    tensors = {name: getattr(module, name) for name in held if getattr(module, name) is not None}
    eps = getattr(module, rule.eps, None) if isinstance(rule.eps, str) else rule.eps
    groups = groups_of(module, rule, features_of(module))
    if eps is not None and not isinstance(eps, float):
        eps = float(eps)
    subject = Subject(module, rule, eps, groups, names)
    proof = prove(subject, kind, tensors)
    if proof.reason or not proof.pairs:
        return Found(rule, None, proof.reason or "it cannot be run in any dtype"), False
    made = swapping.derived(kind, rule, proof)
    if why := agrees(subject, kind, made, proof, tensors):
        return Found(rule, None, why), False
    return Found(rule, made, ""), True


def _is_of_rows_alone(found: Found) -> bool:
    return found.kind is not None and max(found.kind._ranks) == 2  # type: ignore[attr-defined]


def _serves(found: Found, module: Module) -> Found:
    """Whether what is proven serves this instance and its own weights."""
    if found.rule is None or found.kind is None:
        return found
    for name in sorted(vars(module)):
        # a forward is looked at where the class is changed: some only go on to the class's
        if name != "forward" and hasattr(type(module), name) and shadows(module, name):
            reason = f"it holds a {name!r} of its own, in the place of its class's"
            return found._replace(kind=None, reason=reason)
    if found.rule.weight is None:
        return found
    weight = getattr(module, found.rule.weight)
    pairs = found.kind._pairs  # type: ignore[attr-defined]
    if weight is not None and all(pair[1] != weight.dtype for pair in pairs):
        reason = f"in {weight.dtype} it computes as only its own class does"
        return found._replace(kind=None, reason=reason)
    return found


def recognise(module: Module) -> Found | None:
    """The class that a module would get, or why none; None for what is no norm.

    Each class is tried once for the attributes and dtypes that its instances have.
    """
    kind = swap.core(module)
    origin = _origin(kind)
    if swap.parts(kind) or origin.__module__.startswith(("torch.nn.", "truenorm.")):
        return None
    try:
        candidates = _candidates(module, origin)
        if candidates == [] and not looks_like_norm(module):
            return None
        first, served, last = None, None, False
        tried = kind, _attributes(module), register.version(), _described(module)
        if (found := _found.get(tried)) is None:
            for rule in candidates:
                if not takes(kind.forward, rule.gate is not None):
                    first = Found(None, None, "its forward takes more than an input, as a gate")
                    last = True
                    break
                found, last = _try(module, kind, rule)
                first = first or found
                if found.kind is None and not last:
                    continue
                # over the last dimension or over channels: of (N, C) these are the same
                if not _is_of_rows_alone(found):
                    served = served if found.kind is None else found
                    break
                served = served or found
            found = served or first
            if found is None:
                if not looks_like_norm(module):
                    return None
                reason = "no formula is known for its class: see truenorm.register_norm"
                found = Found(None, None, reason)
            elif found.kind is None and not last and not isinstance(candidates, list):
                found = Found(None, None, "it matches no known formula: see truenorm.register_norm")
            _found[tried] = found
    except Exception as error:  # whatever somebody's reader or attribute raises
        return Found(None, None, f"{type(error).__name__}: {error}")
    return _serves(found, module)


def _described(module: Module) -> tuple[Any, ...]:
    """Of what kinds, dtypes and shapes a module's tensors are, but for how long they are."""
    held = (*module._parameters.values(), *module._buffers.values())
    return tuple(
        None if t is None else (type(t), t.dtype, *(each > 1 for each in t.shape)) for t in held
    )
