"""Running statistics on real digits: micro-batches accumulated, then fine-tuning with them frozen.

    python examples/statistics_digits.py

Needs scikit-learn for its data, which it ships.
"""

from __future__ import annotations

import copy

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import truenorm

MICRO, STEPS = 4, 8


def data() -> tuple[Tensor, Tensor]:
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16.0
    return images, torch.tensor(digits.target)


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3), truenorm.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3),
        truenorm.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 16, 10),
    )  # fmt: skip


def right(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        found = model.eval()(images).argmax(1)
    return 100.0 * float((found == labels).float().mean())


def main() -> None:
    torch.manual_seed(0)
    images, labels = data()
    test = slice(1400, None)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    moves = 0
    for order in (torch.randperm(1400) for _ in range(3)):
        for step in order.split(MICRO * STEPS):
            optimizer.zero_grad()
            with truenorm.accumulate(model.train()):
                for micro in step.split(MICRO):
                    loss = nn.functional.cross_entropy(model(images[micro]), labels[micro])
                    (loss * len(micro) / len(step)).backward()
            optimizer.step()
            moves += 1
    counted = int(model[1].num_batches_tracked)
    print(f"micro-batches of {MICRO}: {moves} steps, statistics moved {counted} times")
    print(f"trained: {right(model, images[test], labels[test]):.1f}% right")

    # another camera: darker and offset; 40 labelled images of it, two at a time
    other = images * 0.5 + 0.3
    print(f"on darker images: {right(model, other[test], labels[test]):.1f}% right")
    for frozen in (False, True):
        tuned = copy.deepcopy(model)
        if frozen:
            truenorm.freeze(tuned)
        optimizer = torch.optim.SGD(tuned.parameters(), lr=0.002)
        for _ in range(20):
            for pair in torch.arange(40).split(2):
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(tuned.train()(other[pair]), labels[pair])
                loss.backward()
                optimizer.step()
        how = "frozen" if frozen else "moving"
        print(f"fine-tuned, {how}: {right(tuned, other[test], labels[test]):.1f}% right")


if __name__ == "__main__":
    main()
