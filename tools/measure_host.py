"""Processor time of small CUDA calls, without a GPU: microseconds, all launches stubbed.

    python tools/measure_host.py [--profile]

Layers run on a CPU's tensors, taken for a GPU's, down to the launch of each kernel, which is left
out with what Triton does for one (some 27 us each where it looks up what it has compiled). What is
allocated is a CPU's: a GPU's allocator takes about as long. Each figure is the best of many bursts.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from triton.runtime.jit import JITFunction

import truenorm
from truenorm import _triton
from truenorm._core import eager, operators

LAYERS: dict[str, tuple[Callable[[], Any], tuple[int, ...]]] = {
    "LayerNorm (4, 8)": (lambda: truenorm.LayerNorm(8), (4, 8)),
    "RMSNorm (4, 8)": (lambda: truenorm.RMSNorm(8), (4, 8)),
    "BatchNorm1d (8, 16)": (lambda: truenorm.BatchNorm1d(16), (8, 16)),
    "GroupNorm (2, 8, 4, 4)": (lambda: truenorm.GroupNorm(2, 8), (2, 8, 4, 4)),
}


def take_for_a_gpu() -> torch.library.Library:
    """A CPU's tensors are served as CUDA's are, and nothing is launched."""
    library = torch.library.Library("truenorm", "IMPL")
    _triton.why_plain = lambda index: ""
    for name, plain in operators.PLAIN.items():
        with warnings.catch_warnings():  # that a kernel is put in another's place
            warnings.simplefilter("ignore")
            library.impl(name, _triton.serving(name, plain), "CPU", allow_override=True)
    JITFunction.run = lambda self, *args, **kwargs: None  # type: ignore[method-assign]
    # the short way asks for a CPU first, and goes no further on a GPU
    eager.call.__code__ = (lambda *args: None).__code__
    return library


def best(run: Callable[[], object]) -> float:
    """Microseconds."""
    for _ in range(50):
        run()
    bursts = []
    for _ in range(40):
        start = time.perf_counter()
        for _ in range(50):
            run()
        bursts.append((time.perf_counter() - start) / 50)
    return min(bursts) * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--profile", action="store_true", help="where the time goes")
    args = parser.parse_args()
    torch.set_num_threads(1)
    library = take_for_a_gpu()
    for name, (make, shape) in LAYERS.items():
        layer, x, grad = make(), torch.randn(shape, requires_grad=True), torch.randn(shape)

        def inference(layer: Any = layer, x: torch.Tensor = x) -> None:
            with torch.no_grad():
                layer(x)

        def training(layer: Any = layer, x: torch.Tensor = x, grad: torch.Tensor = grad) -> None:
            torch.autograd.backward(layer(x), grad)

        print(f"{name:<24}{best(inference):>8.1f}{best(training):>8.1f}")
        if args.profile:
            profile = cProfile.Profile()
            profile.runcall(lambda run=training: [run() for _ in range(2000)])
            pstats.Stats(profile).sort_stats("tottime").print_stats(18)
    library._destroy()


if __name__ == "__main__":
    main()
