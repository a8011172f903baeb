"""`truenorm bench --models`: whole training steps, torch's layers, truenorm's, fused, and none."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Module

from ..._models.converting import convert
from ..._models.fusing import fuse
from ..extras import has
from .networks import NETWORKS, Network, first_tensor, without_norms
from .timing import OURS, TORCH, Plan, Quartiles, in_turn

FUSED, CEILING = "fused", "ceiling"
# Both round differently, and a network doubles a rounding many times: truenorm's error may be so
# many times torch's own, and then some roundings of float32.
_TIMES, _ROUNDING = 4.0, 1e-5


class Step(NamedTuple):
    """The time of a network's training step.

    seconds: median of each contender.
    gain: torch's time over truenorm's; fused: over truenorm's after `fuse`; most: over the
        ceiling's; each by quartiles.
    wrong: what is wrong with truenorm's outputs or gradients, and then nothing is timed; or "".
    """

    network: Network
    seconds: dict[str, float]
    gain: Quartiles | None
    fused: Quartiles | None
    most: Quartiles | None
    wrong: str

    def share(self, contender: str = OURS) -> float | None:
        """Of the way from torch to the ceiling; None where there is no way to go."""
        if self.wrong or self.seconds[TORCH] <= self.seconds[CEILING]:
            return None
        way = self.seconds[TORCH] - self.seconds[CEILING]
        return (self.seconds[TORCH] - self.seconds[contender]) / way

    def as_dict(self) -> dict[str, Any]:
        return {
            "network": self.network.name,
            "shape": self.network.shape,
            "wrong": self.wrong,
            "median_seconds": self.seconds,
            "torch_over_truenorm": self.gain,
            "torch_over_fused": self.fused,
            "torch_over_ceiling": self.most,
            "share_of_the_way": self.share(),
            "share_of_the_way_fused": self.share(FUSED),
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
    fused = fuse(copy.deepcopy(ours))
    with torch.no_grad():
        grad = torch.randn_like(first_tensor(copy.deepcopy(theirs)(x)))
    runs = {
        OURS: _step(ours, x, grad),
        FUSED: _step(fused, x, grad),
        TORCH: _step(theirs, x, grad),
        CEILING: _step(bare, x, grad),
    }
    wide = _step(copy.deepcopy(theirs).double(), x.double(), grad.double())
    torchs, exact = runs[TORCH](), wide()
    wrong = _wrong(runs[OURS](), torchs, exact) or _wrong(runs[FUSED](), torchs, exact)
    if wrong:
        return Step(network, {}, None, None, None, wrong)
    seconds = in_turn(runs, plan)
    gain, after_fuse, most = (
        Quartiles.of([t / c for t, c in zip(seconds[TORCH], seconds[name], strict=True)])
        for name in (OURS, FUSED, CEILING)
    )
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return Step(network, medians, gain, after_fuse, most, "")


_CONTENDERS = {TORCH: "torch", OURS: "truenorm", FUSED: "fused", CEILING: "no norms"}
HEAD = " ".join(
    [
        f"{'network':<12}",
        *(f"{name:>9}" for name in _CONTENDERS.values()),
        *(f"{f'torch / {_CONTENDERS[name]}':>19}" for name in (OURS, FUSED, CEILING)),
        f"{'way':>5} {'fused':>5}",
    ]
)


def line(step: Step) -> str:
    if step.wrong:
        return f"{step.network.name:<12} WRONG, not timed: {step.wrong}"
    parts = [f"{step.network.name:<12}"]
    parts += [f"{f'{1e3 * step.seconds[name]:.0f} ms':>9}" for name in _CONTENDERS]
    for ratio in (step.gain, step.fused, step.most):
        assert ratio is not None
        parts.append(f"{f'{ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f})':>19}")
    shares = [step.share(name) for name in (OURS, FUSED)]
    return " ".join([*parts, *(f"{'' if s is None else f'{s:.2f}':>5}" for s in shares)])


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
