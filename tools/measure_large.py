"""Time per byte on tensors of 64 MiB and of 1 GiB: the cost of a layer grows with its input.

    python tools/measure_large.py

Forward, and forward with gradients, of the larger over the smaller, per byte; medians over rounds
in which both run. Needs some 8 GiB of memory.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

import truenorm

LARGER = 16  # times the samples
ROUNDS = 7
LAYERS: tuple[tuple[str, Any, tuple[int, ...], bool], ...] = (
    ("InstanceNorm2d", 64, (16, 64, 128, 128), False),
    ("InstanceNorm2d", 64, (16, 64, 128, 128), True),
    ("BatchNorm2d", 64, (16, 64, 128, 128), False),
    ("BatchNorm2d", 64, (16, 64, 128, 128), True),
    ("LayerNorm", 1024, (16384, 1024), False),
    ("RMSNorm", 1024, (16384, 1024), False),
)


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def step(layer: Any, x: torch.Tensor) -> Callable[[], object]:
    leaf, grad = x.requires_grad_(), torch.empty_like(x).copy_(x.detach())
    wanted = [leaf, *layer.parameters()]
    return lambda: torch.autograd.grad(layer(leaf), wanted, grad)


def forward(layer: Any, x: torch.Tensor) -> Callable[[], object]:
    def run() -> None:
        with torch.no_grad():
            layer(x)

    return run


def per_byte(runs: list[Callable[[], object]]) -> float:
    pairs = [[seconds(run) for run in runs] for _ in range(ROUNDS + 1)][1:]
    return statistics.median(large / small / LARGER for small, large in pairs)


def main() -> None:
    copies = [torch.randn(n, 2**20) for n in (16, LARGER * 16)]
    print(f"{'clone()':42}{per_byte([x.clone for x in copies]):10.2f}", flush=True)
    del copies
    print(f"{'':42}{'forward':>10}{'+ backward':>12}")
    for name, features, shape, channels_last in LAYERS:
        layer = getattr(truenorm, name)(features)
        ratios = []
        for make in (forward, step):
            runs = []
            for n in (shape[0], LARGER * shape[0]):
                x = torch.randn(n, *shape[1:])
                if channels_last:
                    x = x.contiguous(memory_format=torch.channels_last)
                runs.append(make(layer, x))
            ratios.append(per_byte(runs))
        case = f"{name} {shape}{' channels_last' if channels_last else ''}"
        print(f"{case:42}{ratios[0]:10.2f}{ratios[1]:12.2f}", flush=True)


if __name__ == "__main__":
    main()
