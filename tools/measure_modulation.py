"""Scale and shift in a layer's call against the same written out with torch's layer, in turn.

`python tools/measure_modulation.py`: how many times as fast, forward without a gradient and forward
with backward, the median of rounds on one thread; a row for each kind of norm, shape and dtype.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import truenorm

ROUNDS = 15
CASES: list[tuple[str, dict[str, Any], tuple[int, ...], str]] = [
    ("LayerNorm", {"elementwise_affine": False}, (8, 256, 1152), "sample"),
    ("LayerNorm", {"elementwise_affine": False}, (2, 1024, 384), "sample"),
    ("LayerNorm", {"elementwise_affine": False}, (4, 16, 64), "sample"),
    ("LayerNorm", {"elementwise_affine": False}, (2, 256, 1152), "token"),
    ("LayerNorm", {"elementwise_affine": False}, (2, 512, 96), "token"),
    ("RMSNorm", {}, (4, 512, 768), "sample"),
    ("GroupNorm", {}, (4, 128, 32, 32), "sample"),
    ("GroupNorm", {}, (4, 128, 32, 32), "sample, channels_last"),
    ("GroupNorm", {}, (1, 32, 4, 4), "sample"),
    ("InstanceNorm2d", {}, (4, 64, 64, 64), "sample"),
    ("InstanceNorm2d", {}, (4, 64, 64, 64), "position"),
    ("BatchNorm2d", {}, (16, 64, 32, 32), "sample"),
    ("BatchNorm2d", {}, (16, 64, 32, 32), "position"),
]


def layers(kind: str, options: dict[str, Any], channels: int) -> tuple[Any, Any]:
    args = (8, channels) if kind == "GroupNorm" else (channels,)
    both = (getattr(library, kind)(*args, **options) for library in (truenorm, torch.nn))
    return tuple(both)  # type: ignore[return-value]


def seconds(run: Callable[[], Any], seconds_each: float = 0.02) -> float:
    calls, start = 0, time.thread_time()
    while True:
        run()
        calls += 1
        if (past := time.thread_time() - start) > seconds_each:
            return past / calls


def measure(
    kind: str, options: dict[str, Any], shape: tuple[int, ...], of: str, dtype: torch.dtype
) -> list[float]:
    rows = kind in ("LayerNorm", "RMSNorm")
    channels = shape[-1] if rows else shape[1]
    ours, theirs = layers(kind, options, channels)
    ours, theirs = ours.to(dtype), theirs.to(dtype)
    x, grad = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    if "channels_last" in of:
        x = x.contiguous(memory_format=torch.channels_last)
        grad = grad.contiguous(memory_format=torch.channels_last)
    by_sample = (shape[0], 1, channels) if rows else (shape[0], channels, 1, 1)
    size = by_sample if of.startswith("sample") else shape
    scale, shift = (torch.randn(size).to(dtype) for _ in range(2))

    def with_ours() -> Tensor:
        return ours(x, scale=scale, shift=shift)  # type: ignore[no-any-return]

    def with_torchs() -> Tensor:
        return theirs(x) * (1 + scale) + shift  # type: ignore[no-any-return]

    def trained(run: Callable[[], Tensor]) -> Callable[[], None]:
        def step() -> None:
            run().backward(grad)
            for t in (x, scale, shift):
                t.grad = None

        return step

    found = []
    with torch.no_grad():
        found.append(ratio(with_ours, with_torchs))
    for t in (x, scale, shift):
        t.requires_grad_()
    found.append(ratio(trained(with_ours), trained(with_torchs)))
    return found


def ratio(ours: Callable[[], Any], theirs: Callable[[], Any]) -> float:
    ours(), theirs()
    return statistics.median(seconds(theirs) / seconds(ours) for _ in range(ROUNDS))


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    only = sys.argv[1:]
    print("| layer | shape | scale and shift of each | dtype | forward | with backward |")
    print("| --- | --- | --- | --- | --: | --: |")
    for kind, options, shape, of in CASES:
        if only and kind not in only:
            continue
        for dtype in (torch.float32, torch.bfloat16):
            found = " | ".join(f"{r:.2f}" for r in measure(kind, options, shape, of, dtype))
            print(f"| {kind} | {shape} | {of} | {str(dtype)[6:]} | {found} |", flush=True)


if __name__ == "__main__":
    main()
