"""RMSNorm beside a gate, norm(x · act(gate)) · weight or norm(x) · weight · act(gate), in one call.

By torch's operators around a norm 7 tensors of x's size are moved forward and 12 backward, and in
half precision those of the casts besides. Here some rows at a time stay in cache, or on a GPU's
chip: 3 are moved forward and 5 backward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.compiler import is_compiling

from .. import _triton
from . import eager, library, operators
from .call import BEFORE, KEEP, NEEDS_INPUT, NEEDS_WEIGHT, UNCENTRED

Composed = Callable[[Tensor, Tensor, Any], Tensor]
# values of wider types, below which torch's nodes of a gate after the norm take less time on a CPU
_FEW = 1 << 15


def _on_gpu(x: Tensor, groups: int) -> bool:
    """Whether the GPU's kernel takes it."""
    return x.is_cuda and _triton.serves_gate(x, groups)


def _on_cpu(x: Tensor, groups: int, order: int) -> bool:
    few = not order & BEFORE and groups == 1 and x.itemsize > 2 and x.numel() < _FEW
    return x.is_cpu and library.NATIVE is not None and not few


def at_once(
    x: Tensor, gate: Tensor, weight: Tensor | None, eps: float, groups: int, order: int,
    composed: Composed,
) -> Tensor | None:  # fmt: skip
    """All of it, of the last dimension's groups; None where that is not for one call.

    composed: the same of (x, gate, weight) by operators that can be differentiated twice.
    """
    if (
        is_compiling()
        or not eager.is_plain(x, gate, weight)
        or x.dtype != gate.dtype
        or x.shape != gate.shape
        or not x.dim()
    ):
        return None
    on_gpu = _on_gpu(x, groups)
    if not (on_gpu or _on_cpu(x, groups, order)):
        return None
    bits = UNCENTRED | eager.group(groups)
    if torch.is_grad_enabled():
        bits |= NEEDS_INPUT * (x.requires_grad or gate.requires_grad)
        bits |= NEEDS_WEIGHT * (weight is not None and weight.requires_grad)
    wanted = bits & (NEEDS_INPUT | NEEDS_WEIGHT)
    bits |= KEEP * bool(wanted and on_gpu)
    size = x.shape[-1]
    op = operators.gated_norm if on_gpu else operators.eager_gated_norm
    try:
        rows = x.detach().reshape(-1, size), gate.detach().reshape(-1, size)
        y, record = op._op(*rows, weight, bits, eps, order)
    except RuntimeError:  # what is merely unusual
        return None
    y = y.view(x.shape)
    if not wanted:
        return y  # type: ignore[no-any-return]
    made = y, (record, bits, eps, order), composed
    return GatedNorm.apply(x, gate, weight, made)  # type: ignore[no-any-return,no-untyped-call]


class GatedNorm(Function):
    """The graph's node for what the operator has made."""

    @staticmethod
    def forward(ctx: Any, x: Any, gate: Any, weight: Any, made: Any) -> Any:
        y, ctx.kept, ctx.composed = made
        ctx.save_for_backward(x, gate, weight)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        x, gate, weight = ctx.saved_tensors
        plain = type(grad) is Tensor and not (is_compiling() or torch.is_grad_enabled())
        if not plain or not eager.is_plain(grad):
            return *_pull_back(ctx, grad, x, gate, weight), None
        size = x.shape[-1]
        rows = [t.reshape(-1, size) for t in (grad, x, gate)]
        of_x, of_gate, of_weight = _backward(rows, weight, ctx.kept)
        if of_x is not None:
            of_x, of_gate = of_x.view(x.shape), of_gate.view(x.shape)
        return of_x, of_gate, of_weight, None


def _backward(rows: list[Tensor], weight: Tensor | None, kept: Any) -> Any:
    """The gradients of x, gate and weight, None where they are not wanted; rows: grad, x, gate."""
    record, *numbers = kept
    if record.dim() == 1:  # of a CPU's operator
        return operators.eager_gated_norm_backward._op(*rows, record, weight)
    made = operators.gated_norm_backward._op(*rows, record, weight, *numbers)
    return [g if g.numel() else None for g in made]


def _pull_back(ctx: Any, grad: Tensor, *inputs: Any) -> list[Tensor | None]:
    """The gradients, in a way that can itself be differentiated."""
    wanted = [t for t, needed in zip(inputs, ctx.needs_input_grad[:3], strict=True) if needed]
    with torch.enable_grad():
        y = ctx.composed(*inputs)
        found = iter(torch.autograd.grad(y, wanted, grad, create_graph=True))
    return [next(found) if needed else None for needed in ctx.needs_input_grad[:3]]
