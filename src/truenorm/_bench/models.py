"""`truenorm bench --models`: whole training steps, torch's layers, truenorm's, and none at all."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Module

from .. import convert
from .._extras import has
from .networks import NETWORKS, Network, first_tensor, without_norms
from .timing import OURS, TORCH, Plan, Quartiles, in_turn

CEILING = "ceiling"
# two float32 networks of some ten to hundred layers, by norm
_WITHIN = 1e-4


class Step(NamedTuple):
    """The time of a network's training step.

    seconds: median of each contender.
    gain: torch's time over truenorm's; most: torch's over the ceiling's; each by quartiles.
    wrong: what is wrong with truenorm's outputs or gradients, and then nothing is timed; or "".
    """

    network: Network
    seconds: dict[str, float]
    gain: Quartiles | None
    most: Quartiles | None
    wrong: str

    @property
    def share(self) -> float | None:
        """Of the way from torch to the ceiling; None where there is no way to go."""
        if self.wrong or self.seconds[TORCH] <= self.seconds[CEILING]:
            return None
        way = self.seconds[TORCH] - self.seconds[CEILING]
        return (self.seconds[TORCH] - self.seconds[OURS]) / way

    def as_dict(self) -> dict[str, Any]:
        return {
            "network": self.network.name,
            "shape": self.network.shape,
            "wrong": self.wrong,
            "median_seconds": self.seconds,
            "torch_over_truenorm": self.gain,
            "torch_over_ceiling": self.most,
            "share_of_the_way": self.share,
        }


def _step(model: Module, x: Tensor, grad: Tensor) -> Callable[[], list[Tensor]]:
    wanted = [p for p in model.parameters() if p.requires_grad]

    def run() -> list[Tensor]:
        output = first_tensor(model(x))
        found = torch.autograd.grad(output, wanted, grad, allow_unused=True)
        return [output.detach(), *(g for g in found if g is not None)]

    return run


def _apart(found: list[Tensor], wanted: list[Tensor]) -> str:
    if len(found) != len(wanted):
        return "another number of gradients"
    whole = torch.cat([t.flatten().double() for t in wanted[1:]]).norm().item()
    for what, a, b in [("output", found[0], wanted[0])] + [
        ("a gradient", f, w) for f, w in zip(found[1:], wanted[1:], strict=True)
    ]:
        # a gradient that is zero but for roundings has no size of its own
        size = max(b.double().norm().item(), 0.0 if what == "output" else 1e-3 * whole)
        error = (a.double() - b.double()).norm().item() / size
        if not error <= _WITHIN:
            return f"{what} differs from torch's by {error:.1e}"
    return ""


def measure(network: Network, plan: Plan) -> Step:
    """Validate and time one network."""
    torch.manual_seed(20)
    theirs = network.build(False).train()
    for module in theirs.modules():
        # what is dropped differs from run to run
        if isinstance(module, torch.nn.modules.dropout._DropoutNd):
            module.p = 0.0
    x = torch.randn(network.shape)
    ours, bare = convert(copy.deepcopy(theirs)), without_norms(copy.deepcopy(theirs))
    with torch.no_grad():
        grad = torch.randn_like(first_tensor(copy.deepcopy(theirs)(x)))
    runs = {
        OURS: _step(ours, x, grad),
        TORCH: _step(theirs, x, grad),
        CEILING: _step(bare, x, grad),
    }
    wrong = _apart(runs[OURS](), runs[TORCH]())
    if wrong:
        return Step(network, {}, None, None, wrong)
    seconds = in_turn(runs, plan)
    pairs = list(zip(seconds[TORCH], seconds[OURS], seconds[CEILING], strict=True))
    gain = Quartiles.of([t / o for t, o, _ in pairs])
    most = Quartiles.of([t / c for t, _, c in pairs])
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return Step(network, medians, gain, most, "")


_RATIOS = f"{'torch / truenorm':<20} {'torch / no norms':<20} way"
HEAD = f"{'network':<12} {'torch':>8} {'truenorm':>9} {'no norms':>9}   {_RATIOS}"


def line(step: Step) -> str:
    if step.wrong:
        return f"{step.network.name:<12} WRONG, not timed: {step.wrong}"
    assert step.gain is not None and step.most is not None
    ms = [f"{1e3 * step.seconds[name]:.0f} ms" for name in (TORCH, OURS, CEILING)]
    ratios = [f"{q.median:.2f} ({q.low:.2f} to {q.high:.2f})" for q in (step.gain, step.most)]
    share = "" if step.share is None else f"{step.share:.2f}"
    return (
        f"{step.network.name:<12} {ms[0]:>8} {ms[1]:>9} {ms[2]:>9}   {ratios[0]:<20} "
        f"{ratios[1]:<20} {share}"
    )


def run(plan: Plan, write: Callable[[str], None]) -> list[Step]:
    """Every network whose package is installed."""
    write(HEAD)
    steps = []
    for network in NETWORKS:
        if not has(network.package):
            write(f"{network.name:<12} left out: pip install {network.package}")
            continue
        steps.append(measure(network, plan))
        write(line(steps[-1]))
    return steps
