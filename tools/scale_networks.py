"""ResNet-50 and a 3-D U-Net of nnU-Net's shape, for the sizes and times of docs/scale.md."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Bottleneck(nn.Module):
    def __init__(self, inside: int, width: int, stride: int) -> None:
        super().__init__()
        outside = 4 * width
        self.body = nn.Sequential(
            nn.Conv2d(inside, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, outside, 1, bias=False), nn.BatchNorm2d(outside),
        )  # fmt: skip
        self.shortcut = nn.Sequential()
        if stride != 1 or inside != outside:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside)
            )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


def resnet50() -> nn.Sequential:
    """53 BatchNorm layers."""
    layers: list[nn.Module] = [
        nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
    ]  # fmt: skip
    inside = 64
    for width, blocks, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for block in range(blocks):
            layers.append(Bottleneck(inside, width, stride if block == 0 else 1))
            inside = 4 * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2048, 1000))


def _pair(inside: int, outside: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv3d(inside, outside, 3, stride, 1), nn.InstanceNorm3d(outside, affine=True),
        nn.LeakyReLU(0.01),
        nn.Conv3d(outside, outside, 3, 1, 1), nn.InstanceNorm3d(outside, affine=True),
        nn.LeakyReLU(0.01),
    )  # fmt: skip


class UNet3d(nn.Module):
    """Six stages down, five up, two InstanceNorm layers each: nnU-Net's plain configuration."""

    def __init__(self, widths: tuple[int, ...] = (32, 64, 128, 256, 320, 320)) -> None:
        super().__init__()
        before = (1, *widths)
        self.down = nn.ModuleList(
            _pair(a, b, 1 if i == 0 else 2)
            for i, (a, b) in enumerate(zip(before, widths, strict=False))
        )
        pairs = list(zip(widths[:0:-1], widths[-2::-1], strict=True))
        self.widen = nn.ModuleList(nn.ConvTranspose3d(a, b, 2, 2) for a, b in pairs)
        self.up = nn.ModuleList(_pair(2 * b, b, 1) for _, b in pairs)
        self.head = nn.Conv3d(widths[0], 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        kept = []
        for stage in self.down:
            x = stage(x)
            kept.append(x)
        kept.pop()
        for widen, stage in zip(self.widen, self.up, strict=True):
            x = stage(torch.cat([widen(x), kept.pop()], 1))
        return self.head(x)
