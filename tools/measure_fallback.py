"""How fast truenorm is without kernels: torch's time over truenorm's.

    python tools/measure_fallback.py [threads]

Pairs in turn in one process, medians of their ratios. Every second block of rows is channels_last.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

os.environ["TRUENORM_BACKEND"] = "torch"

import torch
from torch import Tensor, nn

import truenorm

PAIRS = 25
# seconds that one measurement of a pair takes at least
ENOUGH = 2e-3


class Case(NamedTuple):
    layer: str
    args: tuple[Any, ...]
    shape: tuple[int, ...]


CASES = [
    Case("BatchNorm2d", (64,), (32, 64, 56, 56)),
    Case("BatchNorm2d", (48,), (6, 48, 96, 96)),
    Case("InstanceNorm2d", (64,), (8, 64, 64, 64)),
    Case("GroupNorm", (8, 64), (4, 64, 48, 48)),
    Case("LayerNorm", (768,), (2048, 768)),
    Case("RMSNorm", (768,), (2048, 768)),
    Case("LocalResponseNorm", (5,), (8, 32, 28, 28)),
    Case("BatchNorm2d", (16,), (4, 16, 16, 16)),
    Case("BatchNorm1d", (64,), (32, 64)),
    Case("InstanceNorm2d", (16,), (2, 16, 16, 16)),
    Case("InstanceNorm1d", (8,), (4, 8, 50)),
    Case("GroupNorm", (4, 16), (2, 16, 8, 8)),
    Case("LayerNorm", (64,), (8, 64)),
    Case("RMSNorm", (64,), (8, 64)),
]


def seconds(run: Callable[[], object], times: int) -> float:
    start = time.perf_counter()
    for _ in range(times):
        run()
    return time.perf_counter() - start


def ratio(theirs: Callable[[], object], ours: Callable[[], object]) -> float:
    """The median of theirs over ours."""
    for run in (theirs, ours):
        seconds(run, 3)
    times = max(1, int(ENOUGH / seconds(theirs, 1)))
    return statistics.median(seconds(theirs, times) / seconds(ours, times) for _ in range(PAIRS))


def measured(case: Case, dtype: torch.dtype, x: Tensor) -> Iterator[tuple[str, float]]:
    kwargs = {"affine": True} if "Instance" in case.layer else {}
    pair = [getattr(m, case.layer)(*case.args, **kwargs).to(dtype) for m in (nn, truenorm)]
    leaf, grad = x.clone().requires_grad_(), torch.randn_like(x)

    def forward(layer: Any) -> Callable[[], object]:
        def run() -> object:
            with torch.no_grad():
                return layer(x)

        return run

    def step(layer: Any) -> Callable[[], object]:
        wanted = [leaf, *layer.parameters()]
        return lambda: torch.autograd.grad(layer(leaf), wanted, grad)

    yield "forward", ratio(*map(forward, pair))
    yield "with backward", ratio(*map(step, pair))
    yield "evaluation", ratio(*map(forward, [layer.eval() for layer in pair]))


def main(threads: int) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    print(truenorm.info().cpu, f"torch {torch.__version__}, {threads} thread(s)")
    found: dict[str, list[float]] = {}
    for case in CASES:
        for dtype in (torch.float32, torch.bfloat16):
            for memory_format in (torch.contiguous_format, torch.channels_last):
                inside = memory_format is torch.channels_last
                # torch's LocalResponseNorm has no half precision of images
                if (inside and len(case.shape) != 4) or (
                    "Response" in case.layer and dtype != torch.float32
                ):
                    continue
                x = torch.randn(case.shape).to(dtype).contiguous(memory_format=memory_format)
                row = dict(measured(case, dtype, x))
                for name, value in row.items():
                    found.setdefault(name, []).append(value)
                kind = f"{str(dtype)[6:]}{' channels_last' if inside else ''}"
                values = "  ".join(f"{name} {value:.2f}" for name, value in row.items())
                print(f"{case.layer:18}{case.shape!s:18} {kind:24}{values}", flush=True)
    for name, values in found.items():
        mean = statistics.geometric_mean(values)
        print(f"{name}: geometric mean {mean:.2f}, least {min(values):.2f}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1)
