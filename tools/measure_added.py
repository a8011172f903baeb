"""norm(h) and h = x + r by one call against addition and norm, in turn.

`python tools/measure_added.py [--threads N]`: how many times as fast as torch's addition and layer,
and as torch's addition and truenorm's layer; forward without a gradient, and with the backward of
both outputs. The median of rounds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import truenorm

ROUNDS = 15
SHAPES = (2, 64, 512), (4, 256, 512), (4, 512, 1024), (8, 1024, 1024), (2, 512, 4096)


def seconds(run: Callable[[], Any]) -> float:
    calls, start = 0, time.perf_counter()
    while True:
        run()
        calls += 1
        if (past := time.perf_counter() - start) > 0.03:
            return past / calls


def measure(kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> list[float]:
    ours = getattr(truenorm, kind)(shape[-1]).to(dtype)
    theirs = getattr(torch.nn, kind)(shape[-1]).to(dtype)
    x, r, grad, grad_h = (torch.randn(shape).to(dtype) for _ in range(4))

    def at_once() -> tuple[Tensor, Tensor]:
        return ours(x, add=r)  # type: ignore[no-any-return]

    def apart(layer: Any) -> Callable[[], tuple[Tensor, Tensor]]:
        def run() -> tuple[Tensor, Tensor]:
            h = x + r
            return layer(h), h

        return run

    def trained(run: Callable[[], tuple[Tensor, Tensor]]) -> Callable[[], None]:
        def step() -> None:
            torch.autograd.backward(run(), (grad, grad_h))
            for t in (x, r, *ours.parameters(), *theirs.parameters()):
                t.grad = None

        return step

    runs: list[Callable[[], Any]] = [at_once, apart(theirs), apart(ours)]
    found = []
    for training in (False, True):
        for t in (x, r):
            t.requires_grad_(training)
        with torch.set_grad_enabled(training):
            each = [trained(run) for run in runs] if training else runs
            for run in each:
                run()
            rounds = [[seconds(run) for run in each] for _ in range(ROUNDS)]
        found += [statistics.median(t[k] / t[0] for t in rounds) for k in (1, 2)]
    return [found[0], found[2], found[1], found[3]]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    torch.set_num_threads(parser.parse_args().threads)
    torch.manual_seed(0)
    print("| layer | shape | dtype | over torch's two | | over truenorm's two | |")
    print("| --- | --- | --- | --: | --: | --: | --: |")
    for kind in ("LayerNorm", "RMSNorm"):
        for shape in SHAPES:
            for dtype in (torch.float32, torch.bfloat16):
                found = " | ".join(f"{r:.2f}" for r in measure(kind, shape, dtype))
                print(f"| {kind} | {shape} | {str(dtype)[6:]} | {found} |", flush=True)


if __name__ == "__main__":
    main()
