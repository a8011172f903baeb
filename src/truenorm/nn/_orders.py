"""A rule's norm by truenorm's kernels, in the order of casts that the rule names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import functional
from .._core import added, eager
from .._core import gated as beside
from .._core.call import (
    AS_GIVEN,
    BEFORE,
    ONE_PLUS,
    ROUNDS,
    ROUNDS_PRODUCT,
    ROUNDS_X_HAT,
    SWISH,
    Call,
    Form,
)
from .._core.geometry import Axes
from .._core.normalize import normalize
from .._core.rule import Rule

ACTS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": torch.nn.functional.silu,
    "sigmoid": torch.sigmoid,
}


def _bits(kind: str, feature_dims: int = 1) -> int:
    return eager.layer(feature_dims) if kind == "layer" else eager.rms(feature_dims)


def _kernel(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, kind: str, flags: int = 0
) -> Tensor:
    """x̂ · weight + bias over the last dimension, in float32 and rounded once.

    flags: ROUNDS for each step in x's dtype, ONE_PLUS for 1 + weight, AS_GIVEN to keep a memory in
        which the last dimension lies outside of the others.
    """
    form = flags | _bits(kind)
    direct = eager.call(eager.OWN, x, weight, bias, form, eps, (), None)
    if direct is not None:
        return direct
    shape = (x.shape[-1],)
    if kind == "layer":
        call = functional.layer_call(x, shape, weight, bias, eps)
    else:
        call = functional.rms_call(x, shape, weight, eps)
    axes = call.form.axes._replace(as_given=bool(flags & AS_GIVEN))
    steps = bool(flags & ROUNDS), bool(flags & ONE_PLUS)
    same = call.form._replace(axes=axes, rounds=steps[0], one_plus=steps[1])
    return normalize(call._replace(form=same, bias=bias))


def _affine(y: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    y = y if weight is None else weight * y
    return y if bias is None else y + bias


def fit_heads(x: Tensor, *parameters: Tensor | None) -> bool:
    """Whether these have a row for each head of x, (*, H, D), or one that all of them share."""
    shapes = [t.shape for t in parameters if t is not None]
    if not shapes or any(shape != shapes[0] for shape in shapes):
        return False
    first = shapes[0]
    return len(first) == 2 and first[1] == x.shape[-1] and first[0] in (1, x.shape[-2])


def _of_heads(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, kind: str, flags: int = 0
) -> Tensor:
    """The same with weight and bias (H, D), of x (*, H, D): a group norm, each head a group."""
    shared = bias if weight is None else weight
    if shared is None:
        return _kernel(x, None, None, eps, kind, flags)
    heads, size = shared.shape
    if heads > 1:
        by_head = flags | eager.group(heads) | _bits(kind, 2)
        direct = eager.call(eager.OWN, x, weight, bias, by_head, eps, (), None)
        if direct is not None:
            return direct
    weight, bias = (None if t is None else t.reshape(-1) for t in (weight, bias))
    if heads == 1:
        return _kernel(x, weight, bias, eps, kind, flags)
    rows = x.reshape(-1, heads * size)
    form = Form(Axes(heads, 0, kind == "layer"), eps, one_plus=bool(flags & ONE_PLUS))
    return normalize(Call(rows, weight, bias, form)).view(x.shape)


def scaled_by(weight: Tensor | None, rule: Rule) -> Tensor | None:
    """What x̂ is multiplied by."""
    if weight is None or not rule.offset:
        return weight
    return rule.offset + (weight.float() if rule.wide_offset else weight)


def output_dtype(x: Tensor, weight: Tensor | None, rule: Rule) -> torch.dtype:
    """The dtype that the module's own output has."""
    if weight is None or (rule.rounding == "once" and not rule.wide_output):
        return x.dtype
    if rule.rounding == "to_weight" and weight.dtype in (torch.float16, torch.bfloat16):
        return weight.dtype
    if rule.rounding == "to_weight":
        return torch.promote_types(weight.dtype, torch.float32)
    return torch.promote_types(x.dtype, weight.dtype)


def _one_call(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, rule: Rule
) -> tuple[Tensor | None, int] | None:
    """The weight and the flags by which a kernel does all of it; None where it does not."""
    out = output_dtype(x, weight, rule)
    if out != x.dtype:
        return None
    plus = ONE_PLUS if rule.offset == 1.0 and rule.wide_offset else 0
    if rule.rounding == "once" and (plus or not rule.offset):
        if bias is None or rule.kind == "layer":
            return weight, plus
    elif (
        out.itemsize == 2
        and not rule.offset
        and not rule.heads  # a kernel rounds within over the last dimension alone
        and all(t is None or t.dtype == out for t in (weight, bias))
    ):
        return weight, ROUNDS
    if rule.rounding == "once" or out == torch.float32:
        return scaled_by(weight, rule), 0
    return None


def has_one_call(rule: Rule) -> bool:
    """Whether there are dtypes for which a kernel's call is all of it."""
    return rule.axis == -1 and not rule.after and rule.kind in ("rms", "layer", "l2")


def form_at_once(x: Tensor, weight: Tensor | None, bias: Tensor | None, rule: Rule) -> int | None:
    """The form of that call; None where it takes more steps.

    By the dtypes alone: the same for all that have these. Beside a gate it is 0, and of heads it
    lacks how many these are.
    """
    if rule.gate is not None:
        return 0 if _has_gated_call(x, weight, rule) else None
    one = _one_call(x, weight, bias, rule)
    if one is None or one[0] is not weight:
        return None
    return one[1] | _bits(rule.kind, 2 if rule.heads else 1)


def compute(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, rule: Rule, flags: int = 0
) -> Tensor:
    """A norm over the last dimension, in the rule's order of casts; flags: AS_GIVEN, or none.

    In float32 every order of casts is the same. Where half precision meets weights of another
    dtype, x̂ is a kernel's result, and the affine step torch's own.
    """
    kernel = _of_heads if rule.heads else _kernel
    if (one := _one_call(x, weight, bias, rule)) is not None:
        return kernel(x, one[0], bias, eps, rule.kind, flags | one[1])
    out, by = output_dtype(x, weight, rule), scaled_by(weight, rule)
    if rule.rounding == "once":
        y = kernel(x.float(), by, bias, eps, rule.kind, flags)
        return y if y.dtype == out else y.to(out)
    if rule.rounding == "to_weight" and out == torch.float32:
        return kernel(x.float(), by, bias, eps, rule.kind, flags)
    if rule.rounding == "to_weight" and out != x.dtype:
        y = _kernel(x.float(), None, None, eps, rule.kind, flags).to(out)
    else:
        y = _kernel(x, None, None, eps, rule.kind, flags)
    return _affine(y, by, bias)


def has_pass(rule: Rule) -> bool:
    """Whether a norm of that rule has a pass for a sum and its norm."""
    plain = rule.axis == -1 and not rule.after and rule.gate is None and not rule.heads
    return rule.kind in ("rms", "layer") and plain


def of_sum(
    x: Tensor, other: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, rule: Rule
) -> tuple[Tensor, Tensor] | None:
    """(norm(h), h) of h = x + other by one pass; None where there is none."""
    if (one := _one_call(x, weight, bias, rule)) is None:
        return None
    return added.by_bits(x, other, one[0], bias, one[1] | _bits(rule.kind), eps)


def groups_of(module: Any, rule: Rule, features: int) -> int:
    """How many groups the features are normalized in."""
    if rule.group_size is not None:
        size = rule.group_size
        return features // (getattr(module, size) if isinstance(size, str) else size)
    groups = rule.groups
    return int(getattr(module, groups) if isinstance(groups, str) else groups or 1)


def _in_groups(x: Tensor, weight: Tensor | None, eps: float, rule: Rule, groups: int) -> Tensor:
    if groups == 1:
        return compute(x, weight, None, eps, rule)
    rows = x.unflatten(-1, (groups, -1))
    y = compute(rows, None, None, eps, rule).flatten(-2)
    return y if weight is None else weight * y


def _has_gated_call(x: Tensor, weight: Tensor | None, rule: Rule) -> bool:
    return output_dtype(x, weight, rule) == x.dtype and not rule.offset


def gated_at_once(
    x: Tensor, gate: Any, weight: Tensor | None, eps: float, rule: Rule, groups: int
) -> Tensor | None:
    """`gated` in one call, for an x of the dtype that its result has; None where it is not."""

    def composed(x: Tensor, gate: Tensor, weight: Tensor | None) -> Tensor:
        return _gated_by_steps(x, gate, weight, eps, rule, groups)

    return beside.at_once(x, gate, weight, eps, groups, _gate_order(rule, groups), composed)


def gated(
    x: Tensor, gate: Tensor, weight: Tensor | None, eps: float, rule: Rule, groups: int
) -> Tensor:
    """An RMSNorm of x · act(gate), or one of x, times act(gate): act in float32."""
    made = None
    if _has_gated_call(x, weight, rule):
        made = gated_at_once(x, gate, weight, eps, rule, groups)
    return _gated_by_steps(x, gate, weight, eps, rule, groups) if made is None else made


def _gate_order(rule: Rule, groups: int) -> int:
    """Where the gate comes in, and what of the steps is rounded, as one number."""
    order = SWISH * (rule.gate_act == "silu")
    once = rule.rounding == "once"
    if rule.gate == "before":
        order |= BEFORE | ROUNDS_X_HAT * (not once)
    elif rule.gate == "after":
        # of several groups the weight is torch's product
        order |= ROUNDS_PRODUCT | ROUNDS_X_HAT * (not once or groups > 1)
    return order


def _gated_by_steps(
    x: Tensor, gate: Tensor, weight: Tensor | None, eps: float, rule: Rule, groups: int
) -> Tensor:
    by = ACTS[rule.gate_act](gate.float())
    if rule.gate == "within":
        weight = None if weight is None else weight.float()
        return (_in_groups(x.float(), weight, eps, rule, groups) * by).to(x.dtype)
    if rule.gate == "after":
        return (_in_groups(x, weight, eps, rule, groups) * by).to(x.dtype)
    wide = x * by
    if rule.rounding == "once" or x.dtype == output_dtype(x, weight, rule) == torch.float32:
        weight = None if weight is None else weight.float()
        return _in_groups(wide, weight, eps, rule, groups).to(output_dtype(x, weight, rule))
    y = _in_groups(wide, None, eps, rule, groups).to(x.dtype)
    return y if weight is None else weight * y


def in_order(x: Tensor) -> tuple[list[int], list[int]] | None:
    """The dimensions by falling stride, and the way back; None where the last is not innermost.

    Elementwise operators, which the classes are made of, leave their output so.
    """
    if 0 in x.stride():
        return None
    order = sorted(range(x.dim()), key=x.stride, reverse=True)
    if order[-1] != x.dim() - 1:
        return None
    back = [0] * len(order)
    for place, d in enumerate(order):
        back[d] = place
    return order, back
