"""norm(h) and h = x + other, as a residual stream takes them: by one pass where that takes less.

Row by row h is added, written, and normalized while it is in cache: 4 tensors moved where addition
and norm move 5, and backward, with the gradient that comes for h, 4 for 6. On a CPU that is for
large ones: an addition and a norm take fewer steps to call. On a GPU it is a launch less each way.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.compiler import is_compiling

from . import by_plan, eager, library, operators, route
from .call import KEEP, NEEDS_BIAS, NEEDS_INPUT, NEEDS_WEIGHT, Call

# bytes of a tensor on a CPU from which on passes over memory take longer than calls
LARGE = 1 << 20


def is_large(x: Any, other: Any) -> bool:
    """Whether both are tensors of one kind, for which a pass less is worth a step more."""
    return (
        isinstance(x, Tensor)
        and isinstance(other, Tensor)
        and (x.numel() * x.itemsize >= LARGE if x.is_cpu else _on_gpu(x))
        and x.dtype == other.dtype
        and x.shape == other.shape
        # other layouts come out as torch's addition leaves them
        and x.is_contiguous()
        and other.is_contiguous()
    )


def _on_gpu(x: Tensor) -> bool:
    """Whether the GPU's kernels serve it."""
    return x.is_cuda and x.numel() > 0 and route.has_kernel(x)


def at_once(x: Tensor, other: Tensor, call: Call) -> tuple[Tensor, Tensor] | None:
    """(norm(h), h) of a call over trailing dimensions whose x is yet to be added to."""
    bits, eps, _ = call.form.numbers(x)
    return by_bits(x, other, call.weight, call.bias, bits, eps)


def by_bits(
    x: Tensor, other: Tensor, weight: Tensor | None, bias: Tensor | None, bits: int, eps: float
) -> tuple[Tensor, Tensor] | None:
    """The same of a form by its number."""
    if is_compiling() or not eager.is_plain(x, other, weight, bias):
        return None
    on_gpu = _on_gpu(x)
    if not (on_gpu or (x.is_cpu and library.NATIVE is not None)):
        return None
    if torch.is_grad_enabled():
        bits |= NEEDS_INPUT * (x.requires_grad or other.requires_grad)
        bits |= NEEDS_WEIGHT * (weight is not None and weight.requires_grad)
        bits |= NEEDS_BIAS * (bias is not None and bias.requires_grad)
        if bits & (NEEDS_WEIGHT | NEEDS_BIAS) and not bits & NEEDS_INPUT:
            return None
    try:
        if on_gpu:
            bits |= KEEP * bool(bits & NEEDS_INPUT)
            tensors = x, other, weight, bias
            made = by_plan.operator("add_norm", tensors, (bits, eps), 2)
            if made is None:
                # what adds in place is not for autograd to see
                made = operators.run(operators.add_norm, *tensors, bits, eps)
        else:
            made = operators.eager_add_norm._op(x, other, weight, bias, bits, eps)
    except RuntimeError:  # what is merely unusual
        return None
    y, h, record = made
    if not bits & NEEDS_INPUT:
        return y, h
    return AddNorm.apply(x, other, weight, bias, (y, h, record, bits, eps))  # type: ignore[no-any-return,no-untyped-call]


class AddNorm(Function):
    """The graph's node for what an operator has made."""

    @staticmethod
    def forward(ctx: Any, x: Any, other: Any, weight: Any, bias: Any, made: Any) -> Any:
        y, h, record, bits, eps = made
        ctx.save_for_backward(h, weight)
        ctx.kept = record, bits, eps, 0.0
        ctx.set_materialize_grads(False)
        return y, h

    @staticmethod
    def backward(ctx: Any, grad: Any, grad_h: Any) -> Any:
        if grad is None:
            return grad_h, grad_h, None, None, None
        h, weight = ctx.saved_tensors
        plain = type(grad) is Tensor and not (is_compiling() or torch.is_grad_enabled())
        both = type(grad_h) is Tensor or (grad_h is None and ctx.kept[0].dim() == 2)
        if plain and both and eager.is_plain(grad, grad_h):
            of_x, of_weight, of_bias = _backward(grad, grad_h, h, weight, ctx.kept)
        else:
            of_x, of_weight, of_bias, _ = eager.pull_back(ctx.kept, grad, h, weight)
            of_x = of_x if grad_h is None else of_x + grad_h
        return of_x, of_x, of_weight, of_bias, None


def _backward(grad: Tensor, grad_h: Tensor | None, h: Tensor, weight: Any, kept: Any) -> Any:
    """The gradients of x, weight and bias; None, or of anything, where it is not wanted."""
    record, bits, eps, _ = kept
    if record.dim() == 1:  # of a CPU's operator
        return operators.eager_add_norm_backward._op(grad, grad_h, h, record, weight)
    tensors = grad, grad_h, h, record, weight
    made = by_plan.operator("add_norm_backward", tensors, (bits, eps), 3)
    if made is None:
        made = operators.add_norm_backward._op(*tensors, bits, eps)
    wanted = NEEDS_INPUT, NEEDS_WEIGHT, NEEDS_BIAS
    return [g if bits & flag else None for g, flag in zip(made, wanted, strict=True)]
