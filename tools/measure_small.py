"""Times of small inputs, whose cost is all calls: microseconds, forward, then forward and backward.

    tools/measure_small.py
    tools/measure_small.py --against ../other/src [--library-against ../other/libtruenorm.so]

With `--against` this checkout and another take turns, each in a process of its own, and what is
printed is the median over the pairs of this one's time over the other's. `TRUENORM_LIBRARY` is the
native library of both, unless the other's is named. Each figure is the best of many short bursts,
the layers in turn, so that a machine that is slow for a while is slow for all of them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import truenorm

Made = tuple[Callable[[], Callable[..., torch.Tensor]], tuple[int, ...], dict[str, torch.Tensor]]


def of_functional(name: str, *rest: Any) -> Callable[..., torch.Tensor]:
    """A function of truenorm.functional, with a weight and a bias for 8 features."""
    function = getattr(truenorm.functional, name)
    weight, bias = (torch.ones(8, requires_grad=True) for _ in range(2))
    return lambda x: function(x, *rest, weight, bias)  # type: ignore[no-any-return]


def of_batch_norm() -> Callable[..., torch.Tensor]:
    running, function = (torch.zeros(8), torch.ones(8)), truenorm.functional.batch_norm
    weight, bias = (torch.ones(8, requires_grad=True) for _ in range(2))
    return lambda x: function(x, *running, weight, bias, training=True)


CASES: dict[str, Made] = {
    "BatchNorm1d": (lambda: truenorm.BatchNorm1d(8), (4, 8), {}),
    "BatchNorm1d, evaluation": (lambda: truenorm.BatchNorm1d(8).eval(), (4, 8), {}),
    "BatchNorm1d, mask": (
        lambda: truenorm.BatchNorm1d(8),
        (4, 8, 6),
        {"mask": torch.arange(24).view(4, 6) % 5 > 0},
    ),
    "BatchNorm1d, ReLU, residual": (
        lambda: truenorm.BatchNorm1d(8, activation="relu"),
        (4, 8),
        {"residual": torch.ones(4, 8)},
    ),
    "BatchNorm1d, renorm": (lambda: truenorm.BatchNorm1d(8, renorm=True), (4, 8), {}),
    "LayerNorm": (lambda: truenorm.LayerNorm(8), (4, 8), {}),
    "RMSNorm": (lambda: truenorm.RMSNorm(8), (4, 8), {}),
    "InstanceNorm1d": (lambda: truenorm.InstanceNorm1d(8), (2, 8, 6), {}),
    "GroupNorm": (lambda: truenorm.GroupNorm(2, 8), (4, 8), {}),
    "GroupNorm, SiLU": (lambda: truenorm.GroupNorm(2, 8, activation="silu"), (4, 8), {}),
    "functional.batch_norm": (of_batch_norm, (4, 8), {}),
    "functional.layer_norm": (lambda: of_functional("layer_norm", (8,)), (4, 8), {}),
}
OWN = Path(__file__).resolve().parents[1] / "src"


class Timed:
    """One layer's call, and its best time so far."""

    def __init__(self, made: Made, backward: bool) -> None:
        make, shape, self.given = made
        self.layer, self.grad = make(), torch.randn(shape)
        self.x = torch.randn(shape, requires_grad=backward)
        self.backward, self.best = backward, float("inf")

    def call(self) -> None:
        y = self.layer(self.x, **self.given)
        if self.backward:
            y.backward(self.grad)

    def burst(self) -> None:
        calls = 12 if self.backward else 40
        with torch.set_grad_enabled(self.backward):
            start = time.perf_counter()
            for _ in range(calls):
                self.call()
        self.best = min(self.best, (time.perf_counter() - start) / calls * 1e6)


def times(bursts: int) -> dict[str, tuple[float, float]]:
    """Of each case the best time forward, and forward and backward."""
    torch.set_num_threads(1)
    timed = [Timed(made, backward) for made in CASES.values() for backward in (False, True)]
    for _ in range(bursts):
        for each in timed:
            each.burst()
    pairs = zip(timed[::2], timed[1::2], strict=True)
    return {name: (f.best, b.best) for name, (f, b) in zip(CASES, pairs, strict=True)}


def times_of(source: Path, library: str | None, bursts: int) -> dict[str, tuple[float, float]]:
    """`times` in a process that imports truenorm from there."""
    env = {**os.environ, "PYTHONPATH": str(source)}
    if library is not None:
        env["TRUENORM_LIBRARY"] = library
    command = [sys.executable, __file__, "--json", "--bursts", str(bursts)]
    said = subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, text=True).stdout
    found: dict[str, Any] = json.loads(said)
    imported = Path(found["truenorm"])
    if source.resolve() not in imported.resolve().parents:
        raise SystemExit(f"{source} has no truenorm: {imported} was imported")
    return {name: tuple(values) for name, values in found["times"].items()}


def against(source: Path, library: str | None, pairs: int, bursts: int) -> None:
    ratios: dict[str, list[list[float]]] = {name: [[], []] for name in CASES}
    for pair in range(pairs):
        # each is first in every second pair
        found = {}
        for other in (False, True) if pair % 2 else (True, False):
            where, native = (source, library) if other else (OWN, None)
            found[other] = times_of(where, native, bursts)
        for name, both in ratios.items():
            for kept, mine, theirs in zip(both, found[False][name], found[True][name], strict=True):
                kept.append(mine / theirs)
    for name, both in ratios.items():
        medians = (f"{statistics.median(kept):.3f}" for kept in both)
        print(f"{name}: {', '.join(medians)} of the other's time")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bursts", type=int, default=150)
    parser.add_argument("--against", type=Path, metavar="SRC", help="another checkout's src")
    parser.add_argument("--library-against", metavar="PATH", help="its native library")
    parser.add_argument("--pairs", type=int, default=5, help="processes of each checkout")
    parser.add_argument("--json", action="store_true", help="the times, for another program")
    args = parser.parse_args()
    if args.against is not None:
        against(args.against, args.library_against, args.pairs, args.bursts)
        return
    found = times(args.bursts)
    if args.json:
        print(json.dumps({"truenorm": truenorm.__file__, "times": found}))
        return
    for name, (forward, both) in found.items():
        print(f"{name}: {forward:.2f}, {both:.2f}")


if __name__ == "__main__":
    main()
