"""A U-Net that takes the noise out of photographs, as it is written and fused.

The network knows nothing of truenorm: convolutions, InstanceNorm, leaky ReLU, with a residual sum
in each block. `convert` and `fuse` make each norm, its sum and its activation one pass;
`recompute_outputs` keeps half of what a training step keeps for its backward pass. The losses are
the same, the picture is as clean.

    python examples/fused_unet.py
    python examples/fused_unet.py --size 48
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time

import torch
import torch.nn.functional as F
from sklearn.datasets import load_sample_images
from torch import Tensor, nn

import truenorm

NOISE = 0.15


class Block(nn.Module):
    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(channels, width, 3, padding=1), norm(width)
        self.conv2, self.norm2 = nn.Conv2d(width, width, 3, padding=1), norm(width)
        self.shortcut = nn.Conv2d(channels, width, 1)
        self.act = nn.LeakyReLU(0.01, inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.act(self.norm1(self.conv1(x)))
        out = self.norm2(self.conv2(out))
        out += self.shortcut(x)
        result: Tensor = self.act(out)
        return result


def norm(width: int) -> nn.Module:
    return nn.InstanceNorm2d(width, affine=True)


class UNet(nn.Module):
    """Noise that is to be taken off."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.down1, self.down2 = Block(3, width), Block(width, 2 * width)
        self.bottom = Block(2 * width, 4 * width)
        self.up2, self.up1 = Block(6 * width, 2 * width), Block(3 * width, width)
        self.last = nn.Conv2d(width, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        one = self.down1(x)
        two = self.down2(F.max_pool2d(one, 2))
        three = self.bottom(F.max_pool2d(two, 2))
        two = self.up2(torch.cat([two, F.interpolate(three, scale_factor=2)], 1))
        one = self.up1(torch.cat([one, F.interpolate(two, scale_factor=2)], 1))
        noise: Tensor = self.last(one)
        return x - noise


def photographs(size: int) -> Tensor:
    """Square pieces of scikit-learn's two photographs, in [0, 1]."""
    pieces = []
    for photo in load_sample_images().images:
        image = torch.tensor(photo).permute(2, 0, 1) / 255
        tiles = image.unfold(1, size, size).unfold(2, size, size)
        pieces.append(tiles.permute(1, 2, 0, 3, 4).flatten(0, 1))
    return torch.cat(pieces)


def train(
    model: nn.Module, clean: Tensor, steps: int, recompute: bool
) -> tuple[list[float], float]:
    """Losses, and the median seconds of a step."""
    torch.manual_seed(1)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    losses, seconds = [], []
    for _ in range(steps):
        chosen = clean[torch.randint(len(clean), (8,))]
        noisy = chosen + NOISE * torch.randn_like(chosen)
        start = time.perf_counter()
        if recompute:
            with truenorm.recompute_outputs():
                loss = F.mse_loss(model(noisy), chosen)
        else:
            loss = F.mse_loss(model(noisy), chosen)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seconds.append(time.perf_counter() - start)
        losses.append(loss.item())
    return losses, statistics.median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description="A U-Net as it is written, fused, recomputed.")
    parser.add_argument("--steps", type=int, default=24, help="steps of training (24)")
    parser.add_argument("--size", type=int, default=96, help="height and width of a piece (96)")
    given = parser.parse_args()
    torch.manual_seed(0)
    pieces = photographs(given.size)
    unseen, clean = pieces[::5], torch.cat([pieces[k::5] for k in range(1, 5)])
    written = UNet()
    fused = truenorm.fuse(truenorm.convert(copy.deepcopy(written)))
    lean = copy.deepcopy(fused)
    noisy = unseen + NOISE * torch.randn_like(unseen)
    before = F.mse_loss(noisy, unseen).item()
    print(f"{len(clean)} pieces of photographs, {len(unseen)} unseen; noise {before:.4f}")
    times = {}
    for name, model in (("as written", written), ("fused", fused), ("recomputed", lean)):
        losses, times[name] = train(model, clean, given.steps, name == "recomputed")
        with torch.no_grad():
            left = F.mse_loss(model(noisy), unseen).item()
        faster = times["as written"] / times[name]
        print(
            f"{name + ':':12} last loss {losses[-1]:.5f}, noise left on unseen pieces {left:.5f}, "
            f"{faster:.2f} times the speed of the first"
        )


if __name__ == "__main__":
    main()
