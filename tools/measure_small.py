"""Times of small inputs, whose cost is all calls: microseconds, forward, then forward and backward.

Compare two checkouts by running this in turn with `PYTHONPATH` set to the `src` of each, and
`TRUENORM_LIBRARY` to its library. Each figure is the best of many short bursts, the layers in turn,
so that a machine that is slow for a while is slow for all of them.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch

import truenorm

CASES: dict[str, tuple[Callable[[], torch.nn.Module], tuple[int, ...]]] = {
    "BatchNorm1d": (lambda: truenorm.BatchNorm1d(8), (4, 8)),
    "BatchNorm1d, evaluation": (lambda: truenorm.BatchNorm1d(8).eval(), (4, 8)),
    "LayerNorm": (lambda: truenorm.LayerNorm(8), (4, 8)),
    "RMSNorm": (lambda: truenorm.RMSNorm(8), (4, 8)),
    "InstanceNorm1d": (lambda: truenorm.InstanceNorm1d(8), (2, 8, 6)),
    "GroupNorm": (lambda: truenorm.GroupNorm(2, 8), (4, 8)),
}


class Timed:
    """One layer's call, and its best time so far."""

    def __init__(self, layer: torch.nn.Module, shape: tuple[int, ...], backward: bool) -> None:
        self.layer, self.grad = layer, torch.randn(shape)
        self.x = torch.randn(shape, requires_grad=backward)
        self.backward, self.best = backward, float("inf")

    def call(self) -> None:
        y = self.layer(self.x)
        if self.backward:
            y.backward(self.grad)

    def burst(self) -> None:
        calls = 12 if self.backward else 40
        with torch.set_grad_enabled(self.backward):
            start = time.perf_counter()
            for _ in range(calls):
                self.call()
        self.best = min(self.best, (time.perf_counter() - start) / calls * 1e6)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bursts", type=int, default=150)
    args = parser.parse_args()
    torch.set_num_threads(1)
    timed = [Timed(make(), shape, b) for make, shape in CASES.values() for b in (False, True)]
    for _ in range(args.bursts):
        for each in timed:
            each.burst()
    for name, forward, both in zip(CASES, timed[::2], timed[1::2], strict=True):
        print(f"{name}: {forward.best:.2f}, {both.best:.2f}")


if __name__ == "__main__":
    main()
