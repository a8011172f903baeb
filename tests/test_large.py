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
    """bfloat16, a small random block repeated, with last values of its own."""
    x = torch.empty(shape, dtype=torch.bfloat16)
    flat = x.view(-1)
    block = torch.randn(2**24 + 7).bfloat16()
    for start in range(0, flat.numel(), block.numel()):
        part = flat[start : start + block.numel()]
        part.copy_(block[: part.numel()])
    flat[-1000:] = torch.randn(1000).add(3.0).bfloat16()
    assert flat.numel() > 2**31
    return x


def test_instance_norm() -> None:
    x = filled((1, ROWS, POSITIONS))
    y = functional.instance_norm(x)
    for row in (0, ROWS - 2, ROWS - 1):
        part = x[:, row : row + 1]
        assert_output(y[:, row : row + 1], reference.instance_norm(part))


def test_batch_norm() -> None:
    x = filled((ROWS, 3, POSITIONS // 3 + 1))
    mean, var = torch.zeros(3), torch.ones(3)
    y = functional.batch_norm(x, mean, var, training=True, momentum=1.0)
    for channel in range(3):
        total = squares = 0.0
        for sample in x[:, channel]:
            wide = sample.double()
            total += wide.sum().item()
            squares += wide.square().sum().item()
        n = x.shape[0] * x.shape[2]
        exact_mean = total / n
        exact_var = squares / n - exact_mean**2
        assert mean[channel].item() == pytest.approx(exact_mean, abs=1e-6)
        assert var[channel].item() == pytest.approx(exact_var * n / (n - 1), rel=1e-6)
        last = x[-1:, channel : channel + 1, -4096:]
        statistics = (torch.tensor([v], dtype=torch.float64) for v in (exact_mean, exact_var))
        exact = reference.batch_norm(last, *statistics, training=False)
        assert_output(y[-1:, channel : channel + 1, -4096:], exact)


def test_layer_norm_over_many_rows() -> None:
    x = filled((2**31 // 33 + 2, 33))
    y = functional.layer_norm(x, (33,))
    assert_output(y[-100:], reference.layer_norm(x[-100:], (33,)))
    assert_output(y[:100], reference.layer_norm(x[:100], (33,)))
