"""What a fused module's look at itself costs per call.

    python tools/measure_fuse_check.py [--calls 1000] [--rounds 15]

Processor time of one thread, the least of the rounds: of the comparison alone, and of whole calls
with and without it on an input so small that calls are all there is.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

import truenorm


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y)) + x
        return self.act(y)  # type: ignore[no-any-return]


def sequence() -> nn.Module:
    layers = ((nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU()) for _ in range(3))
    return nn.Sequential(*(layer for three in layers for layer in three))


def microseconds(run: Callable[[], object], calls: int, rounds: int) -> float:
    best = float("inf")
    for _ in range(rounds):
        start = time.process_time()
        for _ in range(calls):
            run()
        best = min(best, time.process_time() - start)
    return best / calls * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--calls", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(1)
    x = torch.randn(1, 8, 2, 2)
    for name, model in (("sequence", sequence()), ("residual block", Block())):
        model = truenorm.fuse(truenorm.convert(model)).eval()
        plan = model._truenorm_plan
        assert plan.holds(model, x)
        with torch.no_grad():
            check, whole, graph = (
                microseconds(functools.partial(*run), args.calls, args.rounds)
                for run in ((plan.holds, model, x), (model, x), (plan.graph, plan.calls, model, x))
            )
        print(f"{name}: comparison {check:.1f} µs, call {whole:.1f} µs, graph alone {graph:.1f} µs")


if __name__ == "__main__":
    main()
