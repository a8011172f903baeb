"""Tensors of more than 2^31 elements: every index is of 64 bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tolerances import assert_output

import truenorm
from truenorm import functional, reference

GIB = 2**30


def free_memory() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0


pytestmark = [
    pytest.mark.large,
    pytest.mark.skipif(
        truenorm.info().cpu != "native",
        reason="plain PyTorch ops compute in float64, and would need more than 50 GiB",
    ),
    pytest.mark.skipif(
        not Path("/proc/meminfo").exists() or free_memory() < 14 * GIB,
        reason="needs 14 GiB of free memory",
    ),
]

# A few elements past 2^31, in two bytes each: 4 GiB in, 4 GiB out.
POSITIONS = 2**22 + 3
ROWS = 2**31 // POSITIONS + 2


def filled(shape: tuple[int, ...]) -> torch.Tensor:
    """bfloat16, the same random values along the first dimension but for its end."""
    x = torch.empty(shape, dtype=torch.bfloat16)
    x.copy_((torch.randn(shape[1:]) + 2.0).expand(shape))
    x[-1] = (torch.randn(shape[1:]) * 3.0 - 1.0).bfloat16()
    assert x.numel() > 2**31
    return x


def test_instance_norm() -> None:
    x = filled((ROWS, POSITIONS))[None]
    y = functional.instance_norm(x)
    for row in (0, ROWS - 2, ROWS - 1):
        assert_output(y[:, row : row + 1], reference.instance_norm(x[:, row : row + 1]))


def test_batch_norm() -> None:
    x = filled((ROWS, 3, POSITIONS // 3 + 1))
    mean, var = torch.zeros(3), torch.ones(3)
    y = functional.batch_norm(x, mean, var, training=True, momentum=1.0)
    # all samples but the last are alike: two of them, weighted, have the moments of the whole
    wide, n = x[-2:].double(), x.shape[0] * x.shape[2]
    weights = torch.tensor([[ROWS - 1.0], [1.0]], dtype=torch.float64) / ROWS
    exact_mean = (wide.mean(2) * weights).sum(0)
    exact_var = ((wide - exact_mean[:, None]).square().mean(2) * weights).sum(0)
    assert_output(mean, exact_mean)
    assert_output(var, exact_var * n / (n - 1))
    last = x[-2:, :, -4096:]
    exact = reference.batch_norm(last, exact_mean, exact_var, training=False)
    assert_output(y[-2:, :, -4096:], exact)


def test_layer_norm_over_many_rows() -> None:
    x = filled((2**31 // 33 + 2, 33))
    y = functional.layer_norm(x, (33,))
    for rows in (slice(100), slice(-100, None)):
        assert_output(y[rows], reference.layer_norm(x[rows], (33,)))
