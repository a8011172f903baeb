"""A small EfficientNet of timm's learns to read digits, with its library's norms and truenorm's.

timm's BatchNormAct2d is a BatchNorm with an activation behind it, of a class of its own; with
`--model test_nfnet` there are convolutions whose weights are normalized, and any other name of
timm's will do. One network is trained as timm made it, one after `truenorm.convert`, a step of each
in turn, from the same weights on the same batches; a third as the first but with one weight moved
by its last bit.

    python examples/timm_digits.py [--model test_efficientnet] [--steps 30]
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate

import truenorm

SIDE, BATCH = 64, 32


class Run:
    """A network, its losses, and its steps' times in milliseconds."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model.train()
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
        self.losses: list[float] = []
        self.times: list[float] = []

    def step(self, x: Tensor, y: Tensor) -> None:
        begin = time.perf_counter()
        loss = cross_entropy(self.model(x), y)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses.append(loss.item())
        self.times.append(1e3 * (time.perf_counter() - begin))

    def right(self, x: Tensor, y: Tensor) -> float:
        self.model.eval()
        with torch.no_grad():
            return float((self.model(x).argmax(1) == y).double().mean())


def apart(one: Run, other: Run) -> float:
    return max(abs(a - b) for a, b in zip(one.losses, other.losses, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="test_efficientnet")
    parser.add_argument("--steps", type=int, default=30)
    options = parser.parse_args()
    try:
        import timm
    except ImportError:
        print("timm is not installed: pip install timm")
        sys.exit()
    digits = load_digits()
    images = torch.as_tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    images, labels = interpolate(images, (SIDE, SIDE)), torch.as_tensor(digits.target)
    torch.manual_seed(0)
    theirs = timm.create_model(options.model, num_classes=10, in_chans=1)
    ours = truenorm.convert(copy.deepcopy(theirs), report=True)
    nudged = copy.deepcopy(theirs)
    with torch.no_grad():
        weight = next(nudged.parameters())
        weight.copy_(torch.nextafter(weight, torch.ones(())))
    before, after, moved = Run(theirs), Run(ours), Run(nudged)
    test, train = slice(0, 256), len(images) - 256
    runs: tuple[Run, ...] = before, after, moved
    for _ in range(options.steps):
        at = 256 + torch.randint(train, (BATCH,))
        for run in runs:
            run.step(images[at], labels[at])
        # the first to see a batch waits for it: each in turn
        runs = *runs[1:], runs[0]
    for name, run in (("timm", before), ("converted", after)):
        print(
            f"{name}: loss {run.losses[0]:.3f} to {run.losses[-1]:.3f}, "
            f"{100 * run.right(images[test], labels[test]):.1f}% of unseen digits right, "
            f"{statistics.median(run.times):.1f} ms a step"
        )
    print(
        f"losses at most {apart(before, after):.1e} apart; by a last bit {apart(before, moved):.1e}"
    )


if __name__ == "__main__":
    main()
