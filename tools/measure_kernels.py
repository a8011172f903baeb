"""Layers whose kernels are hardest to make as fast as torch's, in turn with torch's and a copy.

`python tools/measure_kernels.py maps rows cached memory --rounds 15`: on one thread, the median
over rounds of torch's time over truenorm's, forward without a gradient and backward alone, and how
much of the floor's speed is reached: a `clone()` of the input, one and a half of them backward.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

import truenorm

Case = tuple[str, tuple[int, ...], tuple[int, ...], bool]

# a layer, its first arguments, the input's shape, whether in channels_last
CASES: dict[str, list[Case]] = {
    "few": [
        *(
            ("BatchNorm2d", (512,), (samples, 512, size, size), False)
            for samples in (2, 4, 7, 16)
            for size in (2, 3, 4, 5)
        ),
        ("BatchNorm2d", (2048,), (4, 2048, 5, 5), False),
        ("GroupNorm", (32, 128), (4, 128, 8, 8), False),
        ("GroupNorm", (32, 128), (4, 128, 16, 16), False),
        ("InstanceNorm2d", (512,), (2, 512, 8, 8), False),
        ("InstanceNorm2d", (512,), (2, 512, 16, 16), False),
    ],
    "maps": [
        ("InstanceNorm1d", (256,), (32, 256, 16), False),
        ("InstanceNorm2d", (256,), (32, 256, 4, 4), False),
        ("InstanceNorm2d", (512,), (16, 512, 5, 5), False),
        ("InstanceNorm2d", (128,), (64, 128, 2, 2), False),
        ("InstanceNorm2d", (64,), (4, 64, 3, 3), False),
        ("InstanceNorm2d", (512,), (32, 512, 7, 7), False),
        ("GroupNorm", (32, 512), (32, 512, 7, 7), False),
        ("GroupNorm", (32, 512), (32, 512, 4, 4), False),
        ("GroupNorm", (8, 64), (16, 64, 3, 3), False),
        ("GroupNorm", (32, 1024), (16, 1024, 2, 2), False),
        ("GroupNorm", (1, 256), (32, 256, 5, 5), False),
    ],
    "rows": [
        (kind, (features,), (2**20 // features, features), False)
        for kind in ("LayerNorm", "RMSNorm")
        for features in (8, 16, 24, 32, 64, 96, 128, 192, 256)
    ],
    # half a MB in float32
    "cached": [
        (kind, (features,), (2**17 // features, features), False)
        for kind in ("LayerNorm", "RMSNorm")
        for features in (64, 256, 1024, 4096)
    ],
    "memory": [
        ("InstanceNorm2d", (48,), (6, 48, 96, 96), True),
        ("InstanceNorm2d", (64,), (8, 64, 64, 64), True),
        ("InstanceNorm2d", (96,), (16, 96, 28, 28), True),
        ("GroupNorm", (8, 96), (6, 96, 64, 64), True),
        ("BatchNorm2d", (96,), (24, 96, 56, 56), True),
        ("BatchNorm2d", (512,), (32, 512, 7, 7), True),
        ("BatchNorm2d", (256,), (32, 256, 14, 14), True),
    ],
}


def seconds(run: Callable[[], Any], least: float = 0.02) -> float:
    """Of a call, from as many as take `least` seconds of this thread."""
    calls, start = 0, time.thread_time()
    while (past := time.thread_time() - start) < least or not calls:
        run()
        calls += 1
    return past / calls


def steps(layer: Any, x: torch.Tensor, grad: torch.Tensor) -> list[Callable[[], Any]]:
    wanted = [x, *layer.parameters()]
    y = layer(x)

    def forward() -> None:
        with torch.no_grad():
            layer(x)

    return [forward, lambda: torch.autograd.grad(y, wanted, grad, retain_graph=True)]


def measure(case: Case, dtype: torch.dtype, rounds: int) -> list[float]:
    kind, args, shape, channels_last = case
    memory = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.randn(shape).to(dtype).contiguous(memory_format=memory)
    grad = torch.randn(shape).to(dtype).contiguous(memory_format=memory)
    options = {"affine": True} if kind.startswith("Instance") else {}
    ours, theirs = (getattr(lib, kind)(*args, **options).to(dtype) for lib in (truenorm, torch.nn))
    copied = x.clone()
    x.requires_grad_()
    runs = [*steps(ours, x, grad), *steps(theirs, x, grad), copied.clone]
    rows = []
    for _ in range(rounds + 1):
        forward, backward, their_forward, their_backward, clone = map(seconds, runs)
        rows.append(
            (
                their_forward / forward,
                their_backward / backward,
                clone / forward,
                1.5 * clone / backward,
            )
        )
    return [statistics.median(column) for column in zip(*rows[1:], strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sets", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--dtype", nargs="+", default=["float32"])
    parser.add_argument("--rounds", type=int, default=15)
    given = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{'':>48} torch / ours: forward, backward; of the floor: forward, backward")
    for name in given.dtype:
        for case in (case for one in given.sets for case in CASES[one]):
            kind, args, shape, channels_last = case
            says = f"{kind}{args} {shape}{' channels_last' * channels_last} {name}"
            figures = measure(case, getattr(torch, name), given.rounds)
            print(f"{says:>60}", *(f"{figure:6.2f}" for figure in figures), flush=True)


if __name__ == "__main__":
    main()
