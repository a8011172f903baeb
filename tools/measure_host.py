"""Processor time of small CUDA calls, without a GPU: microseconds, all launches stubbed.

    python tools/measure_host.py [--profile] [--long-way]

Layers run on a CPU's tensors, taken for a GPU's, down to the launcher in C of each kernel, which is
left out. What Triton does in Python before that is in, where a plan holds the compiled kernel; by
--long-way, without plans, it is left out too, and is some 27 us for each launch. What is allocated
is a CPU's: a GPU's allocator takes about as long. Each figure is the best of many bursts.
"""

from __future__ import annotations

import argparse
import cProfile
import functools
import pstats
import time
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

import truenorm
from truenorm import _triton
from truenorm._core import added, by_plan, eager, gated, operators, planned
from truenorm._core.call import BEFORE, SWISH


class Kind(NamedTuple):
    """A layer's call, what is differentiated besides its parameters, and the gradients."""

    call: Callable[..., Any]
    leaves: list[torch.Tensor]
    grads: list[torch.Tensor]


def kind(layer: Any, *shape: int, grad: torch.Tensor | None = None, **more: Any) -> Kind:
    """more: what the layer is called with besides its input."""
    x = torch.randn(shape)
    return Kind(lambda x: layer(x, **more), [x], [torch.randn(shape) if grad is None else grad])


def modulated(layer: Any, *of: int) -> Kind:
    """With a scale and a shift."""
    leaves = [torch.randn(shape) for shape in ((2, 4, 8), of, of)]
    call = lambda x, scale, shift: layer(x, scale=scale, shift=shift)  # noqa: E731
    return Kind(call, leaves, [torch.randn(2, 4, 8)])


def summed(layer: Any) -> Kind:
    """A sum and its norm."""
    leaves, grads = ([torch.randn(4, 8) for _ in range(2)] for _ in range(2))
    return Kind(lambda x, other: layer(x, add=other), leaves, grads)


def beside_a_gate() -> Kind:
    """An RMSNorm with a weight, of x · silu(gate)."""
    leaves = [torch.randn(4, 8), torch.randn(4, 8), torch.randn(8)]
    numbers = 1e-5, 1, BEFORE | SWISH
    call = lambda x, gate, weight: gated.at_once(x, gate, weight, *numbers, None)  # noqa: E731
    return Kind(call, leaves, [torch.randn(4, 8)])


def copied() -> Kind:
    """An input whose rows lie apart, as no kernel reads them."""
    return kind(truenorm.LayerNorm(8), 4, 8)._replace(leaves=[torch.randn(4, 12)[:, :8]])


KINDS: dict[str, Callable[[], Kind]] = {
    "LayerNorm (4, 8)": lambda: kind(truenorm.LayerNorm(8), 4, 8),
    "RMSNorm (4, 8)": lambda: kind(truenorm.RMSNorm(8), 4, 8),
    "BatchNorm1d (8, 16)": lambda: kind(truenorm.BatchNorm1d(16), 8, 16),
    "GroupNorm (2, 8, 4, 4)": lambda: kind(truenorm.GroupNorm(2, 8), 2, 8, 4, 4),
    "a sum's gradient": lambda: kind(truenorm.LayerNorm(8), 4, 8, grad=torch.ones(()).expand(4, 8)),
    "an input copied first": copied,
    "scale and shift of a sample": lambda: modulated(
        truenorm.LayerNorm(8, elementwise_affine=False), 2, 8
    ),
    "of a sample, beside a weight": lambda: modulated(truenorm.LayerNorm(8), 2, 8),
    "of a position": lambda: modulated(truenorm.LayerNorm(8), 1, 4, 8),
    "a sum and its norm": lambda: summed(truenorm.RMSNorm(8)),
    "RMSNorm beside a gate": beside_a_gate,
    "LayerNorm under a mask": lambda: kind(
        truenorm.LayerNorm(8), 4, 8, mask=torch.tensor([True, False, True, True])
    ),
    "BatchNorm1d under a mask": lambda: kind(
        truenorm.BatchNorm1d(16), 8, 16, 5, mask=torch.arange(5) < torch.arange(8)[:, None]
    ),
    "BatchNorm1d, an average": lambda: kind(truenorm.BatchNorm1d(16, momentum=None), 8, 16),
}


class Compiled(CompiledKernel):
    """A kernel that is launched as Triton's are, but for the launcher."""

    run = staticmethod(lambda *args: None)
    name, function, packed_metadata = "", 0, ()

    def __init__(self, kernel: Any) -> None:
        self.src = SimpleNamespace(signature=dict.fromkeys(kernel.arg_names))

    def _init_handles(self) -> None:
        pass

    def __del__(self) -> None:
        pass


def take_for_a_gpu(long_way: bool) -> torch.library.Library:
    """A CPU's tensors are served as CUDA's are, and nothing is launched."""
    library = torch.library.Library("truenorm", "IMPL")
    _triton.why_plain = lambda index: ""
    for name, plain in operators.PLAIN.items():
        with warnings.catch_warnings():  # that a kernel is put in another's place
            warnings.simplefilter("ignore")
            library.impl(name, _triton.serving(name, plain), "CPU", allow_override=True)
    compiled = functools.cache(Compiled)
    JITFunction.run = lambda self, *args, **kwargs: compiled(self)  # type: ignore[method-assign]
    here = SimpleNamespace(get_current_device=lambda: 0, get_current_stream=lambda device: 0)
    driver.set_active(here)
    # which leaves a CPU's tensors to another
    eager.NATIVE = None
    way = (lambda *args: None) if long_way else planned.call
    eager.fallback = SimpleNamespace(shortly=way)
    added._on_gpu, gated._on_gpu, added.LARGE = lambda x: True, _triton.serves_gate, 0
    by_plan.serves = lambda x: not long_way
    if long_way:
        by_plan.operator = way
    return library


def best(run: Callable[[], object]) -> float:
    """Microseconds."""
    for _ in range(50):
        run()
    bursts = []
    # shorter than what a busy machine leaves a process at a time
    for _ in range(200):
        start = time.perf_counter()
        for _ in range(10):
            run()
        bursts.append((time.perf_counter() - start) / 10)
    return min(bursts) * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--profile", action="store_true", help="where the time goes")
    parser.add_argument("--long-way", action="store_true", help="as where a call has no plan")
    args = parser.parse_args()
    torch.set_num_threads(1)
    library = take_for_a_gpu(args.long_way)
    for name, make in KINDS.items():
        call, leaves, grads = make()
        trained = [t.requires_grad_() for t in leaves]

        def inference(call: Any = call, leaves: Any = leaves) -> None:
            with torch.no_grad():
                call(*leaves)

        def training(call: Any = call, leaves: Any = trained, grads: Any = grads) -> None:
            torch.autograd.backward(call(*leaves), grads)

        print(f"{name:<30}{best(inference):>8.1f}{best(training):>8.1f}")
        if args.profile:
            profile = cProfile.Profile()
            profile.runcall(lambda run=training: [run() for _ in range(2000)])
            pstats.Stats(profile).sort_stats("tottime").print_stats(18)
    library._destroy()


if __name__ == "__main__":
    main()
