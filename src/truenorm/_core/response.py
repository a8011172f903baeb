"""LocalResponseNorm: who serves a call, and its gradients, as gradients.py has the others'."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import Function

from . import fallback, operators, plain, route
from .gradients import Grads, by_operations, differentiate, register
from .operators import run


def local_response_norm(x: Tensor, size: int, alpha: float, beta: float, k: float) -> Tensor:
    """Divide each value of x (N, C, *) by a power of its neighbouring channels' energy."""
    window = size, alpha, beta, k
    way = route.way_of(x)
    if way in (route.KERNEL, route.GRAPH) and route.lacks_kernel(x):
        return fallback.local_response_norm(x, *window)
    if way == route.STANDARD:
        return torch.nn.functional.local_response_norm(x, *window)
    if way == route.PLAIN:
        return plain.response(x, *window)
    if way == route.GRAPH:
        return cast(Tensor, operators.response(x, *window))
    return cast(Tensor, Response.apply(window, x))  # type: ignore[no-untyped-call]


class ResponseBackward(Function):
    """The gradient of `Response`, differentiable."""

    @staticmethod
    def forward(ctx: Any, window: Any, grad: Tensor, x: Tensor) -> Any:
        ctx.save_for_backward(grad, x)
        ctx.window = window
        return run(operators.response_backward, grad, x, *window)

    @staticmethod
    def backward(ctx: Any, incoming: Any) -> Any:
        return None, *_backward_again(ctx, incoming)


def _backward_again(ctx: Any, incoming: Tensor) -> Grads:
    def gradients(grad: Tensor, x: Tensor) -> Sequence[Tensor]:
        return (plain.response_backward(grad, x, *ctx.window),)

    return differentiate(gradients, ctx.saved_tensors, (incoming,))


def _pull_back(ctx: Any, grad: Tensor) -> Any:
    (x,) = ctx.saved_tensors
    if torch.compiler.is_compiling():
        return operators.response_backward(grad, x, *ctx.window)
    if by_operations(grad, x):
        return plain.response_backward(grad, x, *ctx.window)
    if torch.is_grad_enabled():
        return ResponseBackward.apply(ctx.window, grad, x)  # type: ignore[no-untyped-call]
    return run(operators.response_backward, grad, x, *ctx.window)


class Response(Function):
    """x by the energy of its neighbouring channels; window is (size, alpha, beta, k)."""

    @staticmethod
    def forward(ctx: Any, window: Any, x: Tensor) -> Any:
        ctx.save_for_backward(x)
        ctx.window = window
        return run(operators.response, x, *window)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        return None, _pull_back(ctx, grad)


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    x, *ctx.window = inputs
    ctx.save_for_backward(x)


def _backward(ctx: Any, grad: Any) -> Any:
    return _pull_back(ctx, grad), *[None] * 4


def _setup_backward(ctx: Any, inputs: Any, output: Any) -> None:
    grad, x, *ctx.window = inputs
    ctx.save_for_backward(grad, x)


def _backward_backward(ctx: Any, incoming: Any) -> Any:
    return *_backward_again(ctx, incoming), *[None] * 4


register("response", _setup, _backward)
register("response_backward", _setup_backward, _backward_backward)
