"""Batch statistics of small maps: runs of few values, of few samples and of many."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from tolerances import assert_gradient, assert_output
from torch import Tensor

import truenorm
from truenorm import reference

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# on both sides of each size at which another way begins, and channels that fill no vector
SHAPES = [
    (2, 37, 2), (7, 20, 3, 3), (8, 20, 3, 3), (3, 70, 2, 2), (3, 5, 4, 3), (23, 9, 4, 4),
    (24, 9, 4, 4), (2, 130, 5, 5), (4, 1, 5, 5), (5, 33, 31), (5, 33, 32), (1, 64, 2, 3, 2),
    (2, 8, 1, 2),
]  # fmt: skip


def made(
    shape: tuple[int, ...], dtype: torch.dtype, offset: float = 3.0
) -> tuple[Any, Tensor, Tensor]:
    torch.manual_seed(sum(shape))
    layer = getattr(truenorm, f"BatchNorm{len(shape) - 2}d")(shape[1])
    for p in layer.parameters():
        torch.nn.init.normal_(p)
    x, grad = torch.randn(shape) * 2 + offset, torch.randn(shape)
    return layer.to(dtype), x.to(dtype).requires_grad_(), grad.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_by_formula(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    layer, x, grad = made(shape, dtype)
    y = layer(x)
    assert_output(y, reference.batch_norm(x, weight=layer.weight, bias=layer.bias))
    exact = reference.batch_norm_backward(grad, x, weight=layer.weight, bias=layer.bias)
    found = torch.autograd.grad(y, [x, *layer.parameters()], grad)
    for actual, right in zip(found, exact, strict=True):
        assert right is not None
        assert_gradient(actual, right)
    wide = x.detach().double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(
        layer.running_mean.double(), 0.1 * wide.mean(1), rtol=1e-6, atol=1e-6
    )
    of_var = 0.9 + 0.1 * wide.var(1)
    torch.testing.assert_close(layer.running_var.double(), of_var, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(4, 70, 5, 5), (6, 33, 2, 3)])
def test_far_from_zero(shape: tuple[int, ...]) -> None:
    layer, x, _ = made(shape, torch.float32, 1e4)
    exact = reference.batch_norm(x, weight=layer.weight, bias=layer.bias)
    assert (layer(x).double() - exact).abs().max() < 2e-6 * exact.abs().max()


@pytest.mark.parametrize("shape", [(4, 70, 5, 5), (2, 9, 3), (30, 40, 4, 4)])
@pytest.mark.parametrize("act", ["relu", "silu"])
def test_with_activation_and_residual(act: str, shape: tuple[int, ...]) -> None:
    layer, x, grad = made(shape, torch.float64)
    with_act = type(layer)(shape[1], activation=act).double()
    with_act.load_state_dict(layer.state_dict())
    residual = torch.randn(shape, dtype=torch.float64).requires_grad_()
    y = with_act(x, residual=residual)
    right = getattr(torch.nn.functional, act)(layer(x) + residual)
    leaves = [x, residual]
    assert_output(y, right)
    found = torch.autograd.grad(y, [*leaves, *with_act.parameters()], grad)
    exact_ones = torch.autograd.grad(right, [*leaves, *layer.parameters()], grad)
    for actual, exact in zip(found, exact_ones, strict=True):
        assert_gradient(actual, exact)


@pytest.mark.parametrize("shape", [(4, 200, 5, 5), (6, 900, 2, 2)])
def test_threads_and_what_is_wanted_change_no_bit(shape: tuple[int, ...]) -> None:
    layer, x, grad = made(shape, torch.float32)
    threads = torch.get_num_threads()
    results = []
    for count, frozen in itertools.product((1, 2, 5), (False, True)):
        torch.set_num_threads(count)
        try:
            for p in layer.parameters():
                p.requires_grad_(not frozen)
            y = layer(x)
            results.append((y, torch.autograd.grad(y, x, grad)[0]))
        finally:
            torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


def test_frozen_statistics() -> None:
    layer, x, grad = made((4, 70, 5, 5), torch.float64)
    layer(x)
    layer.eval()
    plain = torch.nn.BatchNorm2d(70).double()
    plain.load_state_dict(layer.state_dict())
    plain.eval()
    leaves = [x, *layer.parameters()]
    found = torch.autograd.grad(layer(x), leaves, grad)
    right = torch.autograd.grad(plain(x), [x, *plain.parameters()], grad)
    for actual, exact in zip(found, right, strict=True):
        assert_gradient(actual, exact)
