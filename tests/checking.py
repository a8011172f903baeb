"""A layer held against the float64 reference, forward and backward."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from cases import Result, exact, run
from tolerances import assert_gradient, assert_output
from torch import Tensor, nn

# LayerNorm has one in every torch, the others from 2.12 on
takes_bias = pytest.mark.skipif(
    "bias" not in inspect.signature(nn.GroupNorm).parameters, reason="torch's layer takes no bias="
)


def check_layer(
    layer: Any, x: Tensor, grad: Tensor | None = None, wanted: Result | None = None
) -> Result:
    """Output and every gradient are the reference's, in the dtypes of what they belong to.

    wanted: the reference's, where the caller has it already.
    """
    if grad is None:
        grad = torch.randn(x.shape, dtype=torch.float64).to(x)
    wanted = exact(layer, x, grad) if wanted is None else wanted
    got = run(layer, x, grad)
    assert got.output.dtype == x.dtype
    assert_output(got.output, wanted.output)
    for name in ("input", "weight", "bias"):
        actual, gradient = getattr(got, name), getattr(wanted, name)
        assert (actual is None) == (gradient is None), name
        if actual is not None:
            assert actual.dtype == (x if name == "input" else getattr(layer, name)).dtype
            assert_gradient(actual, gradient)
    return got


def same_layout(y: Tensor, x: Tensor) -> bool:
    """Equal strides, but for those that mean nothing: of one element, and of empty tensors."""
    pairs = zip(y.shape, y.stride(), x.stride(), strict=True)
    return y.shape == x.shape and all(min(x.shape) == 0 or n == 1 or a == b for n, a, b in pairs)
