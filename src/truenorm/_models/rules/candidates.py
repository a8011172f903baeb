"""The known formulas that a norm could have, by the names and the shapes of what it holds."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor
from torch.nn import Module

from ..._core.rule import Rule
from ...nn._orders import ACTS
from .proof import axis_of, is_vector, takes

_WEIGHTS = ("weight", "gamma", "scale", "g", "w")
_BIASES = ("bias", "beta", "b")
# of a class that has its eps in its code
_EPS = (1e-5, 1e-6, 1e-8, 1e-12)


def by_formula(module: Module) -> Iterator[Rule]:
    """The known formulas that a module could have, by the names of what it holds."""
    if "frozen" in type(module).__name__.lower() and "running_var" in module._buffers:
        # detectron2's and its kin: buffers, or parameters that do not train
        eps = next((n for n, v in vars(module).items() if n == "eps" and type(v) is float), 1e-5)
        yield Rule("frozen", "steps", bias="bias", eps=eps, axis=1)
        return
    held = {
        n: t for n, t in (*module._parameters.items(), *module._buffers.items()) if t is not None
    }
    weight = next((n for n in _WEIGHTS if n in held), None)
    bias = next((n for n in _BIASES if n in held), None)
    if not held.keys() <= {weight, bias}:
        return
    gated = not takes(type(module).forward, False)
    names = [n for n, v in vars(module).items() if "eps" in n.lower() and type(v) is float]
    base = Rule("rms", weight=weight, bias=bias)
    axes = _axes([held[n] for n in (weight, bias) if n is not None])
    if not names and not gated and (bias is None or is_vector(held[bias])):
        # by F.normalize, which has an eps of its own
        for axis in axes or (-1,):
            for offset in _offsets(weight):
                yield base._replace(
                    kind="l2", rounding="steps", eps=1e-12, axis=axis, offset=offset
                )
    if weight is None and "eps" not in repr(vars(module)):
        return
    for eps in names or _EPS:
        if gated:
            yield from _gated(base._replace(eps=eps))
        for axis in () if gated else axes:
            yield from _of_axis(base._replace(eps=eps, axis=axis))


def _axes(held: list[Tensor]) -> tuple[int, ...]:
    """What the statistics may be over; of what is broadcast against an image the channels alone."""
    if any(t.dim() > 2 and not is_vector(t) for t in held):
        return ()
    shaped = {axis_of(t) for t in held if t.dim() > 2}
    return tuple(shaped) if shaped else (-1, 1)


def _offsets(weight: str | None) -> tuple[float, ...]:
    return (0.0,) if weight is None else (0.0, 1.0)


def _gated(base: Rule) -> Iterator[Rule]:
    for act in ACTS:
        rule = base._replace(gate_act=act)
        for rounding in ("once", "cast_first"):
            yield rule._replace(rounding=rounding, gate="before")
            yield rule._replace(rounding=rounding, gate="after")
        yield rule._replace(gate="within")


def _of_axis(base: Rule) -> Iterator[Rule]:
    for kind in ("rms", "layer"):
        for offset in _offsets(base.weight):
            rule = base._replace(kind=kind, offset=offset)
            yield rule
            if base.weight is not None:
                yield rule._replace(rounding="cast_first")
                yield rule._replace(rounding="to_weight")
                yield rule._replace(wide_output=True)
            if offset:
                yield rule._replace(wide_offset=False)
            yield rule._replace(rounding="steps")
