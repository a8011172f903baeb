"""Timing in turn: one process, rounds in which every contender runs, ratios within a round.

A machine's speed drifts by tens of percent (clock, neighbours, page cache), slower than a round
lasts. So the ratio of two contenders is taken in each round, and the median of these is reported.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from typing import Any, NamedTuple

import torch

from .subject import Subject

FORWARD, BACKWARD, BOTH = "forward", "backward", "forward+backward"
# a backward alone is timed on a GPU only (cuda.py)
DIRECTIONS = (FORWARD, BOTH)
OURS, TORCH, COMPILE, CLONE = "truenorm", "torch", "compile", "clone"

# The floor is what moving the bytes costs that must be moved, each tensor once, at the rate of a
# clone() of the same tensor in the same round, which reads it and writes it. The forward reads x
# and writes y, as clone() does. Forward and backward together also read x and grad_output and write
# x's gradient: five tensors for clone()'s two. Parameters and statistics are left out.
FLOOR_IN_CLONES = {FORWARD: 1.0, BACKWARD: 1.5, BOTH: 2.5}
TENSORS_MOVED = {direction: int(2 * clones) for direction, clones in FLOOR_IN_CLONES.items()}
FLOOR_NOTE = (
    "forward: clone() of the input; forward+backward: 5 tensors moved (read x, write y, read x, "
    "read grad, write x.grad) at the rate of clone(), which moves 2"
)


@dataclass(frozen=True)
class Plan:
    """How long to measure.

    minimum, maximum: rounds; between them, `seconds` have to pass.
    round_seconds: least time that a contender runs in a round, by repetition.
    """

    minimum: int = 7
    maximum: int = 31
    seconds: float = 3.0
    round_seconds: float = 1e-3


FULL, QUICK = Plan(), Plan(minimum=5, maximum=21, seconds=0.8)
# whole training steps take their time
MODELS = Plan(minimum=9, maximum=31, seconds=12.0)


class Quartiles(NamedTuple):
    """A median, and the quartiles around it."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> Quartiles:
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        return cls(*statistics.quantiles(values, n=4, method="inclusive"))


@dataclass(frozen=True)
class Timing:
    """Seconds per call of each contender, round by round; those that refused are missing."""

    direction: str
    seconds: Mapping[str, list[float]]

    def ratio(self, contender: str, scale: float = 1.0) -> Quartiles | None:
        """The contender's time over truenorm's: above 1 truenorm is faster."""
        if contender not in self.seconds:
            return None
        pairs = zip(self.seconds[contender], self.seconds[OURS], strict=True)
        return Quartiles.of([scale * other / ours for other, ours in pairs])

    def of_floor(self) -> Quartiles:
        """The floor's time over truenorm's: 1 is the speed of moving the bytes."""
        found = self.ratio(CLONE, FLOOR_IN_CLONES[self.direction])
        assert found is not None
        return found

    def copy_rate(self, size: int) -> float:
        """Bytes read and written a second by copying a tensor of that many bytes."""
        return 2 * size / self.median(CLONE)

    def median(self, contender: str) -> float:
        return statistics.median(self.seconds[contender])

    def as_dict(self) -> dict[str, Any]:
        others = [name for name in self.seconds if name not in (OURS, CLONE)]
        ratios = {f"{name}_over_truenorm": self.ratio(name) for name in others}
        return {
            "rounds": len(self.seconds[OURS]),
            "median_seconds": {k: statistics.median(v) for k, v in self.seconds.items()},
            **{name: list(q) for name, q in ratios.items() if q is not None},
            "floor_over_truenorm": list(self.of_floor()),
        }


def floored(direction: str, seconds: Mapping[str, list[float]], floor: float) -> Timing:
    """A timing whose floor is known in seconds instead of timed as a clone()."""
    clone = floor / FLOOR_IN_CLONES[direction]
    return Timing(direction, {**seconds, CLONE: [clone] * len(seconds[OURS])})


def _total(run: Callable[[], object], iterations: int) -> float:
    start = time.perf_counter()
    for _ in repeat(None, iterations):
        run()
    return time.perf_counter() - start


def _iterations(run: Callable[[], object], seconds: float) -> int:
    """How many calls take that long; warms up on the way."""
    run()
    iterations = 1
    while (taken := _total(run, iterations)) < seconds:
        iterations = min(10 * iterations, math.ceil(1.2 * iterations * seconds / taken))
    return iterations


def in_turn(contenders: Mapping[str, Callable[[], object]], plan: Plan) -> dict[str, list[float]]:
    """Seconds per call of each contender in each round; a contender that raises is left out."""
    counts: dict[str, int] = {}
    for name, run in contenders.items():
        try:
            counts[name] = _iterations(run, plan.round_seconds)
        except Exception:  # torch's kernel or compiler may refuse in any way; truenorm's own is
            if name == OURS:  # validated by now
                raise
    names = list(counts)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    # a collection would be charged to whoever runs just then
    collecting = gc.isenabled()
    gc.disable()
    try:
        start = time.perf_counter()
        for turn in range(plan.maximum):
            if turn >= plan.minimum and time.perf_counter() - start > plan.seconds:
                break
            # another one begins each time, in the other direction: nobody always runs on the caches
            # that the same neighbour left
            shift = turn % len(names)
            order = names[shift:] + names[:shift]
            for name in order if turn % 2 == 0 else reversed(order):
                taken = _total(contenders[name], counts[name])
                seconds[name].append(taken / counts[name])
    finally:
        if collecting:
            gc.enable()
    return seconds


def _step(layer: Any, subject: Subject) -> Callable[[], object]:
    """A forward and a backward that returns its gradients instead of accumulating them."""
    leaf = subject.x.detach().requires_grad_()
    wanted = [leaf, *layer.parameters()]
    grad = subject.grad
    return lambda: torch.autograd.grad(layer(leaf), wanted, grad)


def time_case(subject: Subject, direction: str, plan: Plan, *, compiled: bool = False) -> Timing:
    """Every contender on one case in one direction, at the current number of threads."""
    layers = {OURS: subject.ours, TORCH: subject.theirs}
    if compiled:
        torch._dynamo.reset()
        # named, or a program cached for another number of threads would do
        options: dict[str, Any] = {"cpp.threads": torch.get_num_threads()}
        layers[COMPILE] = torch.compile(subject.theirs, dynamic=False, options=options)
    x = subject.x
    runs: dict[str, Callable[[], object]] = {}
    for name, layer in layers.items():
        runs[name] = partial(layer, x) if direction == FORWARD else _step(layer, subject)
    runs[CLONE] = x.clone
    with warnings.catch_warnings(), torch.set_grad_enabled(direction == BOTH):
        # torch and its compiler warn where they take a slow path, which is what is measured
        warnings.simplefilter("ignore")
        return Timing(direction, in_turn(runs, plan))
