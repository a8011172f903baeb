"""Training on real scans of digits: one network with torch's layers, the same with truenorm's."""

from __future__ import annotations

import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from statistics import median, quantiles

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from ..._models.converting import convert

BATCH_SIZE = 64
LEARNING_RATE = 0.05
# the first steps of a process also allocate memory and choose algorithms
WARM_UP = 5

Norm = Callable[[int], nn.Module]

# InstanceNorm has no parameters unless asked; with them both networks have the same ones
NORMS: dict[str, Norm] = {
    "BatchNorm2d": nn.BatchNorm2d,
    "InstanceNorm2d": partial(nn.InstanceNorm2d, affine=True),
}


@dataclass(frozen=True)
class Digits:
    """scikit-learn's 1,797 scans of 8×8 pixels, split once and for all."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


@dataclass(frozen=True)
class Training:
    """Runs of one network, step by step side by side: torch's layers and truenorm's.

    losses_nudged: torch's layers again, from weights that are one rounding away. Training amplifies
        any rounding; this is how far torch drifts from itself.
    seconds are those of each step, warm-up left out; the two of one index ran back to back.
    """

    layer: str
    losses_torch: list[float]
    losses_truenorm: list[float]
    losses_nudged: list[float]
    accuracy_torch: float
    accuracy_truenorm: float
    seconds_torch: list[float]
    seconds_truenorm: list[float]

    @property
    def largest_loss_difference(self) -> float:
        return _largest(self.losses_torch, self.losses_truenorm)

    @property
    def largest_nudged_difference(self) -> float:
        return _largest(self.losses_torch, self.losses_nudged)

    @property
    def ratios(self) -> list[float]:
        """truenorm's time over torch's, for each pair of steps."""
        pairs = zip(self.seconds_truenorm, self.seconds_torch, strict=True)
        return [ours / theirs for ours, theirs in pairs]

    @property
    def ratio(self) -> float:
        return median(self.ratios)

    @property
    def ratio_quartiles(self) -> tuple[float, float]:
        low, _, high = quantiles(self.ratios, n=4)
        return low, high


def _largest(a: list[float], b: list[float]) -> float:
    return max(abs(one - other) for one, other in zip(a, b, strict=True))


def load(seed: int) -> Digits:
    """The scans as (N, 1, 8, 8) in [0, 1]; a fifth is kept for the test."""
    data = load_digits()
    x = torch.as_tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16.0
    y = torch.as_tensor(data.target)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    test, train = order[: len(y) // 5], order[len(y) // 5 :]
    return Digits(x[train], y[train], x[test], y[test])


def network(norm: Norm, seed: int) -> nn.Module:
    """Three convolutions, each normalized, and one linear layer."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1, bias=False), norm(16), nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1, bias=False), norm(32), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 32, 3, padding=1, bias=False), norm(32), nn.ReLU(),
            nn.Flatten(), nn.Linear(32 * 4 * 4, 10),
        )  # fmt: skip


class _Runner:
    """One network and its optimizer."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model.train()
        self.optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=0.9)
        self.losses: list[float] = []
        self.seconds: list[float] = []

    def step(self, x: Tensor, y: Tensor) -> None:
        start = time.perf_counter()
        self.optimizer.zero_grad()
        loss = nn.functional.cross_entropy(self.model(x), y)
        loss.backward()
        self.optimizer.step()
        self.seconds.append(time.perf_counter() - start)
        self.losses.append(loss.item())

    def accuracy(self, x: Tensor, y: Tensor) -> float:
        self.model.eval()
        with torch.no_grad():
            right = self.model(x).argmax(1) == y
        return float(right.double().mean())


def _nudged(model: nn.Module) -> nn.Module:
    """A copy whose weights are the next larger floating point numbers."""
    copy = deepcopy(model)
    with torch.no_grad():
        for p in copy.parameters():
            p.copy_(torch.nextafter(p, torch.full_like(p, torch.inf)))
    return copy


def steps_per_epoch(digits: Digits) -> int:
    return len(digits.train_y) // BATCH_SIZE


def train(
    layer: str, digits: Digits, epochs: int, seed: int, on_step: Callable[[], None]
) -> Training:
    """Train the networks on the same batches in the same order, a step of each in turn."""
    theirs = network(NORMS[layer], seed)
    truenorm_run, nudged_run = _Runner(convert(deepcopy(theirs))), _Runner(_nudged(theirs))
    torch_run = _Runner(theirs)
    generator = torch.Generator().manual_seed(seed + 1)
    for _ in range(epochs):
        order = torch.randperm(len(digits.train_y), generator=generator)
        for i in range(steps_per_epoch(digits)):
            batch = order[i * BATCH_SIZE : (i + 1) * BATCH_SIZE]
            x, y = digits.train_x[batch], digits.train_y[batch]
            # who goes first alternates: the second finds the batch in the cache
            pair = (torch_run, truenorm_run) if i % 2 else (truenorm_run, torch_run)
            for run in pair:
                run.step(x, y)
            nudged_run.step(x, y)
            on_step()
    return Training(
        layer=layer,
        losses_torch=torch_run.losses,
        losses_truenorm=truenorm_run.losses,
        losses_nudged=nudged_run.losses,
        accuracy_torch=torch_run.accuracy(digits.test_x, digits.test_y),
        accuracy_truenorm=truenorm_run.accuracy(digits.test_x, digits.test_y),
        seconds_torch=torch_run.seconds[WARM_UP:],
        seconds_truenorm=truenorm_run.seconds[WARM_UP:],
    )
