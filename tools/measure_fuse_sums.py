"""A transformer's blocks as they are and fused, in turn: `python tools/measure_fuse_sums.py`.

The blocks have no attention, so that sums and norms are as much of their time as they can be: the
median, over rounds, of the time as written over the time fused, by the thread's own clock. With
--copies nothing is fused: what comes out is the machine's noise.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import truenorm

ROUNDS = 15
SHAPES = (
    (1, 8, 64), (2, 64, 512), (4, 128, 512), (4, 256, 512), (4, 384, 512), (4, 512, 512),
    (8, 512, 768),
)  # fmt: skip


class Block(nn.Module):
    """With nothing between norms and sums but a product, whose time is that of its bytes."""

    def __init__(self, features: int, kind: type[nn.Module], last: bool) -> None:
        super().__init__()
        self.norm1, self.norm2, self.last = kind(features), kind(features), last

    def forward(self, x: Tensor) -> Tensor:
        if self.last:
            return self.norm2(self.norm1(x + x * 0.5) + x)
        x = x + self.norm1(x) * 0.5
        return x + self.norm2(x) * 0.5


def seconds(run: Callable[[], Any]) -> float:
    calls, start = 0, time.thread_time()
    while True:
        run()
        calls += 1
        if (past := time.thread_time() - start) > 0.03:
            return past / calls


def measure(
    shape: tuple[int, ...], kind: type[nn.Module], last: bool, training: bool, fuse: bool
) -> float:
    blocks = nn.Sequential(*(Block(shape[-1], kind, last) for _ in range(2)))
    as_written = truenorm.convert(blocks)
    fused = copy.deepcopy(as_written)
    fused = truenorm.fuse(fused) if fuse else fused
    x, grad = torch.randn(shape, requires_grad=training), torch.randn(shape)

    def step(model: nn.Module) -> Callable[[], Any]:
        def run() -> None:
            y = model(x)
            if training:
                y.backward(grad)
                model.zero_grad()
                x.grad = None

        return run

    with torch.set_grad_enabled(training):
        runs = step(as_written), step(fused)
        for run in runs:
            run()
        pairs = [[seconds(run) for run in runs] for _ in range(ROUNDS)]
    return statistics.median(one / other for one, other in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--copies", action="store_true", help="fuse nothing")
    fuse = not parser.parse_args().copies
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print("| layer | shape | norm first: forward | step | norm last: forward | step |")
    print("| --- | --- | --: | --: | --: | --: |")
    for kind in (nn.LayerNorm, nn.RMSNorm):
        for shape in SHAPES:
            found = [
                measure(shape, kind, last, training, fuse)
                for last in (False, True)
                for training in (False, True)
            ]
            cells = " | ".join(f"{ratio:.2f}" for ratio in found)
            print(f"| {kind.__name__} | {shape} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
