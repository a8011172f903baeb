"""Digits as sequences of patches, (N, L, C): a mixer whose norms find the channels where they are.

Torch's BatchNorm1d wants (N, C, L), so a network of Linear layers transposes before and after each
norm; truenorm's is told `channel_axis=-1`. Both are trained from the same weights on the same
batches: the same losses, the same answers, no transposes.

    python examples/tokens_digits.py
"""

from __future__ import annotations

import copy
import statistics
import time
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import truenorm

WIDTH, STEPS = 64, 150


class Transposed(nn.Module):
    """Torch's BatchNorm1d for (N, L, C)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(x.transpose(1, 2)).transpose(1, 2)
        return y


class Mixer(nn.Module):
    """Mixes channels within a patch, then patches within a channel, twice."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.embed = nn.Linear(4, WIDTH)
        self.norms = nn.ModuleList(norm(WIDTH) for _ in range(2))
        self.channels = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.patches = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))
        self.answer = nn.Linear(WIDTH, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for norm, channels, patches in zip(self.norms, self.channels, self.patches, strict=True):
            x = x + torch.relu(channels(norm(x)))
            x = x + torch.relu(patches(x.transpose(1, 2))).transpose(1, 2)
        answer: Tensor = self.answer(x.mean(1))
        return answer


def patches() -> tuple[Tensor, Tensor]:
    """Each 8×8 digit as 16 patches of 2×2 pixels: (N, 16, 4)."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32) / 16
    cut = images.unfold(1, 2, 2).unfold(2, 2, 2)
    return cut.reshape(len(images), 16, 4), torch.tensor(digits.target)


def train(model: Mixer, x: Tensor, target: Tensor) -> tuple[float, float]:
    """The last loss, and the median seconds of a step."""
    torch.manual_seed(1)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    seconds = []
    for _ in range(STEPS):
        chosen = torch.randint(len(x), (256,))
        start = time.perf_counter()
        loss = nn.functional.cross_entropy(model(x[chosen]), target[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seconds.append(time.perf_counter() - start)
    return loss.item(), statistics.median(seconds)


def main() -> None:
    torch.manual_seed(0)
    x, target = patches()
    seen, unseen = slice(0, 1400), slice(1400, None)
    theirs = Mixer(Transposed)
    ours = Mixer(lambda width: truenorm.BatchNorm1d(width, channel_axis=-1))
    state = {k.replace(".norm.", "."): v for k, v in copy.deepcopy(theirs.state_dict()).items()}
    ours.load_state_dict(state)
    times = []
    for name, model in (("transposed", theirs), ("channel_axis=-1", ours)):
        loss, median = train(model, x[seen], target[seen])
        times.append(median)
        with torch.no_grad():
            right = (model.eval()(x[unseen]).argmax(1) == target[unseen]).double().mean().item()
        print(
            f"{name + ':':17} last loss {loss:.4f}, {100 * right:.1f}% of unseen digits right, "
            f"{times[0] / median:.2f} times the speed of the first"
        )


if __name__ == "__main__":
    main()
