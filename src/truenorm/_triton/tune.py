"""truenorm.tune: other tiles tried on one layer and shape, and the fastest kept."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import _triton
from .._core import checks
from . import config
from .config import Key, Launch

Clock = Callable[[Callable[[], object]], float]
_ROUNDS = 9
# less than this is noise, and no reason to leave the choices that others run with
_WORTH = 0.98


@dataclass(frozen=True)
class Tuned:
    """One choice: what it is for, before and after, and the seconds of a step with each."""

    key: Key
    before: Launch
    after: Launch
    seconds_before: float
    seconds_after: float


def _candidates(key: Key, now: Launch) -> Iterator[Launch]:
    """Tiles of another size or shape, and other numbers of warps. A whole statistic stays whole."""
    shapes = [(now.units, now.values)]
    if not key.grouped:
        shapes += [(now.units * 2, now.values), (now.units // 2, now.values)]
    if not key.whole:
        shapes += [(now.units, now.values * 2), (now.units, now.values // 2)]
    for units, values in shapes:
        for warps in (now.warps // 2, now.warps, now.warps * 2):
            found = Launch(units, values, warps)
            if units and values and 1 <= warps <= config.MAX_WARPS and found != now:
                yield found


def tune_step(step: Callable[[], object], clock: Clock) -> list[Tuned]:
    """Choose for everything that `step` launches, one choice after the other; clock: seconds."""

    def measure() -> float:
        step()
        return statistics.median(clock(step) for _ in range(_ROUNDS))

    with config.asked() as keys:
        step()
    results = []
    for key, now in keys.items():
        before = best_seconds = measure()
        best = now
        for candidate in _candidates(key, now):
            config.choose(key, candidate)
            try:
                seconds = measure()
            except Exception:  # a tile that does not compile, or takes too many registers
                continue
            if seconds < _WORTH * best_seconds:
                best, best_seconds = candidate, seconds
        config.choose(key, None if best == now else best)
        results.append(Tuned(key, now, best, before, best_seconds))
    return results


def tune(layer: torch.nn.Module, input: Tensor) -> list[Tuned]:
    """Try other tiles for a layer on inputs like this one, and keep the fastest.

    Times forward and backward of `layer(input)` on the GPU with each of some ten launch choices per
    kernel, which takes seconds to a minute, most of it compiling. What is kept serves every layer
    that meets the same sizes, in this process alone. Choices set the order of sums, so results may
    change in their last bits, within the promises; with the same choices they stay the same bits.
    Parameters, their gradients and running statistics stay as they are.

    Shapes: input of any shape that the layer takes, on a CUDA device.

    Returns: one `Tuned` per choice, with the seconds before and after.

    Errors: TypeError for a non-tensor; RuntimeError for an input that is not on a CUDA device, or
    where the Triton kernels do not serve that device (`truenorm.info()` says why).
    """
    checks.check_tensor("input", input)
    checks.check_tunable(input, _triton.why_plain(input.device.index or 0) if input.is_cuda else "")
    from .._tools.clock import DeviceClock

    timer = DeviceClock()
    return tune_layer(layer, input, lambda run: timer(run, small=False))


def tune_layer(layer: torch.nn.Module, input: Tensor, clock: Clock) -> list[Tuned]:
    """tune() by another clock."""
    state = {name: value.detach().clone() for name, value in layer.state_dict().items()}
    leaf = input.detach().requires_grad_()
    wanted = [leaf, *(p for p in layer.parameters() if p.requires_grad)]
    grad = torch.randn_like(input)

    def step() -> Any:
        return torch.autograd.grad(layer(leaf), wanted, grad)

    try:
        with torch.enable_grad():
            return tune_step(step, clock)
    finally:
        layer.load_state_dict(state)
