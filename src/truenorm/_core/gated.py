"""RMSNorm beside a gate, norm(x · act(gate)) · weight or norm(x) · weight · act(gate), in one call.

By torch's operators around a norm 7 tensors of x's size are moved forward and 12 backward, and in
half precision those of the casts besides. Here some rows at a time stay in cache: 3 are moved
forward and 5 backward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.compiler import is_compiling

from . import eager, library, operators
from .call import NEEDS_INPUT, NEEDS_WEIGHT

# as csrc/gated.cpp reads them: where the gate comes in, whether it is g · σ(g) or σ(g), and what is
# rounded to x's dtype before the last step
BEFORE, SWISH, ROUNDS_X_HAT, ROUNDS_PRODUCT = 1, 2, 4, 8

Composed = Callable[[Tensor, Tensor, Any], Tensor]
_forward = operators.eager_gated_norm._op
_backward = operators.eager_gated_norm_backward._op


def at_once(
    x: Tensor, gate: Tensor, weight: Tensor | None, eps: float, groups: int, order: int,
    composed: Composed,
) -> Tensor | None:  # fmt: skip
    """All of it, of the last dimension's groups; None where that is not for one call.

    composed: the same of (x, gate, weight) by operators that can be differentiated twice.
    """
    if (
        is_compiling()
        or not x.is_cpu
        or library.NATIVE is None
        or not eager.is_plain(x, gate, weight)
        or x.dtype != gate.dtype
        or x.shape != gate.shape
        or not x.dim()
    ):
        return None
    bits = eager.rms(1) | eager.group(groups)
    if torch.is_grad_enabled():
        bits |= NEEDS_INPUT * (x.requires_grad or gate.requires_grad)
        bits |= NEEDS_WEIGHT * (weight is not None and weight.requires_grad)
    try:
        y, record = _forward(x, gate, weight, bits, eps, order)
    except RuntimeError:  # what is merely unusual
        return None
    if not bits & (NEEDS_INPUT | NEEDS_WEIGHT):
        return y  # type: ignore[no-any-return]
    made = y, record, composed
    return GatedNorm.apply(x, gate, weight, made)  # type: ignore[no-any-return,no-untyped-call]


class GatedNorm(Function):
    """The graph's node for what the operator has made."""

    @staticmethod
    def forward(ctx: Any, x: Any, gate: Any, weight: Any, made: Any) -> Any:
        y, ctx.record, ctx.composed = made
        ctx.save_for_backward(x, gate, weight)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        x, gate, weight = ctx.saved_tensors
        plain = type(grad) is Tensor and not (is_compiling() or torch.is_grad_enabled())
        if not plain or not eager.is_plain(grad):
            return *_pull_back(ctx, grad, x, gate, weight), None
        return *_backward(grad, x, gate, ctx.record, weight), None


def _pull_back(ctx: Any, grad: Tensor, *inputs: Any) -> list[Tensor | None]:
    """The gradients, in a way that can itself be differentiated."""
    wanted = [t for t, needed in zip(inputs, ctx.needs_input_grad[:3], strict=True) if needed]
    with torch.enable_grad():
        y = ctx.composed(*inputs)
        found = iter(torch.autograd.grad(y, wanted, grad, create_graph=True))
    return [next(found) if needed else None for needed in ctx.needs_input_grad[:3]]
