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
from . import by_plan, eager, library, operators
from .call import KEEP, NEEDS_INPUT, NEEDS_WEIGHT, UNCENTRED

Composed = Callable[[Tensor, Tensor, Any], Tensor]


def _on_gpu(x: Tensor, groups: int) -> bool:
    """Whether the GPU's kernel takes it."""
    return x.is_cuda and _triton.serves_gate(x, groups)


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
    needs = 0
    if torch.is_grad_enabled():
        needs = NEEDS_INPUT * (x.requires_grad or gate.requires_grad)
        needs |= NEEDS_WEIGHT * (weight is not None and weight.requires_grad)
    serve = _by_launch if _on_gpu(x, groups) else _by_native
    try:
        found = serve(x, gate, weight, eager.group(groups) | needs, eps, order)
    except RuntimeError:  # what is merely unusual
        return None
    if found is None or not needs:
        return None if found is None else found[0]
    made = *found, composed
    return GatedNorm.apply(x, gate, weight, made)  # type: ignore[no-any-return,no-untyped-call]


_OF_ROWS = eager.rms(1)


def _by_native(
    x: Tensor, gate: Tensor, weight: Tensor | None, form: int, *numbers: Any
) -> tuple[Tensor, Any] | None:
    """(y, what the backward is given)"""
    if library.NATIVE is None or not x.is_cpu:
        return None
    y, record = operators.eager_gated_norm._op(x, gate, weight, _OF_ROWS | form, *numbers)
    return y, (record,)


def _by_launch(
    x: Tensor, gate: Tensor, weight: Tensor | None, form: int, *numbers: Any
) -> tuple[Tensor, Any]:
    """The same, of rows."""
    tensors = *(_rows(t.detach()) for t in (x, gate)), weight
    form |= UNCENTRED | KEEP * bool(form & (NEEDS_INPUT | NEEDS_WEIGHT))
    made = by_plan.operator("gated_norm", tensors, (form, *numbers), 1)
    y, record = operators.gated_norm._op(*tensors, form, *numbers) if made is None else made
    return y if x.dim() == 2 else y.view(x.shape), (record, form, *numbers)


def _rows(t: Tensor) -> Tensor:
    return t if t.dim() == 2 else t.reshape(-1, t.shape[-1])


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
        record, *numbers = ctx.kept
        if not numbers:
            made = operators.eager_gated_norm_backward._op(grad, x, gate, record, weight)
            return *made, None
        tensors = *(_rows(t) for t in (grad, x, gate)), record, weight
        found = by_plan.operator("gated_norm_backward", tensors, tuple(numbers), 3)
        if found is None:
            made = operators.gated_norm_backward._op(*tensors, *numbers)
            found = [g if g.numel() else None for g in made]
        of_x, of_gate, of_weight = found
        if of_x is not None and of_gate is not None and x.dim() != 2:
            of_x, of_gate = of_x.view(x.shape), of_gate.view(x.shape)
        return of_x, of_gate, of_weight, None


def _pull_back(ctx: Any, grad: Tensor, *inputs: Any) -> list[Tensor | None]:
    """The gradients, in a way that can itself be differentiated."""
    wanted = [t for t, needed in zip(inputs, ctx.needs_input_grad[:3], strict=True) if needed]
    with torch.enable_grad():
        y = ctx.composed(*inputs)
        found = iter(torch.autograd.grad(y, wanted, grad, create_graph=True))
    return [next(found) if needed else None for needed in ctx.needs_input_grad[:3]]
