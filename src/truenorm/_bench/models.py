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
# Both round differently, and a network doubles a rounding many times: truenorm's error may be so
# many times torch's own, and then some roundings of float32.
_TIMES, _ROUNDING = 4.0, 1e-5


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


def _error(found: list[Tensor], exact: list[Tensor]) -> float:
    """By norm, relative, over all tensors together."""
    pairs = list(zip(found, exact, strict=True))
    square = sum((a.double() - b).square().sum().item() for a, b in pairs)
    size: float = sum(b.square().sum().item() for _, b in pairs)
    return float((square / size) ** 0.5)


def _wrong(found: list[Tensor], theirs: list[Tensor], exact: list[Tensor]) -> str:
    """Where truenorm is farther from float64 than torch, by more than chance."""
    if not len(found) == len(theirs) == len(exact):
        return "another number of gradients"
    for what, part in (("output", slice(1)), ("gradients", slice(1, None))):
        ours, other = (_error(t[part], exact[part]) for t in (found, theirs))
        if not ours <= _TIMES * other + _ROUNDING:
            return f"{what} off by {ours:.1e} of float64, torch's by {other:.1e}"
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
    wide = _step(copy.deepcopy(theirs).double(), x.double(), grad.double())
    wrong = _wrong(runs[OURS](), runs[TORCH](), wide())
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
