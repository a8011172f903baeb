"""Measures what recycled memory is worth: whole training steps of real networks, pool off and on.

    .venv/bin/python tools/measure_pool.py --mib 256

Step times come from processes that switch the pool off and on in turn (the first step after each
switch is not timed); a ratio below 1 says that the pool is faster. Several processes per network,
since how the heap happens to lie in one is worth more than a percent. Peaks of resident memory come
from fresh processes, one per setting: the kernel's VmHWM after a few steps.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

import truenorm
from truenorm._core import pool


class Residual(nn.Module):
    """A block of a residual network: two 3x3 convolutions, or a bottleneck."""

    def __init__(self, before: int, after: int, stride: int, bottleneck: bool) -> None:
        super().__init__()
        narrow = after // 4 if bottleneck else after
        kernels = (1, 3, 1) if bottleneck else (3, 3)
        sizes = [before, *[narrow] * (len(kernels) - 1), after]
        layers: list[nn.Module] = []
        for i, kernel in enumerate(kernels):
            step = stride if kernel == 3 and (bottleneck or i == 0) else 1
            conv = nn.Conv2d(sizes[i], sizes[i + 1], kernel, step, kernel // 2, bias=False)
            layers += [conv, nn.BatchNorm2d(sizes[i + 1]), nn.ReLU(inplace=True)]
        self.body = nn.Sequential(*layers[:-1])
        self.skip: nn.Module = nn.Identity()
        if stride != 1 or before != after:
            conv = nn.Conv2d(before, after, 1, stride, bias=False)
            self.skip = nn.Sequential(conv, nn.BatchNorm2d(after))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.skip(x))


def resnet(blocks: tuple[int, ...], bottleneck: bool) -> nn.Module:
    """ResNet-18 or ResNet-50."""
    stem = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
    layers: list[nn.Module] = [
        stem, nn.BatchNorm2d(64), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1),
    ]  # fmt: skip
    channels = 64
    for stage, count in enumerate(blocks):
        after = 64 * 2**stage * (4 if bottleneck else 1)
        for i in range(count):
            layers.append(Residual(channels, after, 2 if stage and i == 0 else 1, bottleneck))
            channels = after
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 100))


class UNet(nn.Module):
    """A U-Net with InstanceNorm, in two or three dimensions."""

    def __init__(self, dims: int, width: int, depth: int) -> None:
        super().__init__()
        conv, norm = (nn.Conv2d, nn.InstanceNorm2d) if dims == 2 else (nn.Conv3d, nn.InstanceNorm3d)
        up = nn.ConvTranspose2d if dims == 2 else nn.ConvTranspose3d

        def twice(before: int, after: int, stride: int) -> nn.Module:
            layers: list[nn.Module] = []
            for size, step in ((before, stride), (after, 1)):
                layers += [conv(size, after, 3, step, 1, bias=False), norm(after, affine=True)]
                layers.append(nn.LeakyReLU(0.01, inplace=True))
            return nn.Sequential(*layers)

        widths = [width * 2**i for i in range(depth)]
        pairs = list(pairwise(widths))
        self.down = nn.ModuleList([twice(1, width, 1), *(twice(a, b, 2) for a, b in pairs)])
        self.up = nn.ModuleList([up(b, a, 2, 2) for a, b in reversed(pairs)])
        self.merge = nn.ModuleList([twice(2 * a, a, 1) for a, _ in reversed(pairs)])
        self.head = conv(width, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        kept: list[Tensor] = []
        for down in self.down:
            x = down(x)
            kept.append(x)
        kept.pop()
        for up, merge in zip(self.up, self.merge, strict=True):
            x = merge(torch.cat([up(x), kept.pop()], 1))
        return self.head(x)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "ResNet-18": (lambda: resnet((2, 2, 2, 2), False), (16, 3, 112, 112)),
    "ResNet-50": (lambda: resnet((3, 4, 6, 3), True), (8, 3, 112, 112)),
    "U-Net 2-D": (lambda: UNet(2, 32, 4), (4, 1, 192, 192)),
    "U-Net 3-D": (lambda: UNet(3, 16, 3), (1, 1, 64, 64, 64)),
}


def stepper(name: str, channels_last: bool) -> Callable[[], float]:
    """One whole training step, which returns its seconds."""
    torch.manual_seed(0)
    build, shape = NETWORKS[name]
    net, x = truenorm.convert(build()), torch.randn(shape)
    if channels_last:
        format = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
        net, x = net.to(memory_format=format), x.to(memory_format=format)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9)
    target = torch.zeros((x.shape[0], *net(x).shape[2:]), dtype=torch.long)

    def step() -> float:
        start = time.perf_counter()
        torch.nn.functional.cross_entropy(net(x), target).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return time.perf_counter() - start

    return step


def child(name: str, channels_last: bool, mib: int, rounds: int) -> list[tuple[float, float]]:
    """(off, on / off) in seconds for each round; where there are none, the peak of `mib` in MiB."""
    step = stepper(name, channels_last)
    if rounds == 0:
        pool.set_cap(mib)
        for _ in range(6):
            step()
        status = Path("/proc/self/status").read_text().splitlines()
        peak = next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmHWM"))
        return [(peak, 0.0)]
    found = []
    for i in range(rounds):
        times: dict[int, float] = {}
        for cap in (0, mib) if i % 2 else (mib, 0):
            pool.set_cap(cap)
            step()
            times[cap] = min(step(), step())
        found.append((times[0], times[mib] / times[0]))
    return found


def started(arguments: argparse.Namespace, name: str, *words: object) -> list[list[float]]:
    command = [sys.executable, __file__, "--threads", str(arguments.threads)]
    command += ["--child", name, *map(str, words)]
    environment = {**os.environ, "TRUENORM_POOL_MIB": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr[-2000:]}")
    return list(json.loads(done.stdout))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--mib", type=int, default=256, help="the cap to measure")
    parser.add_argument("--rounds", type=int, default=6, help="off and on, in a process")
    parser.add_argument("--processes", type=int, default=3, help="per network and figure")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.child:
        name, *numbers = arguments.child
        print(json.dumps(child(name, *map(int, numbers))))
        return
    print(
        f"cap {arguments.mib} MiB, {arguments.threads} threads, "
        f"{arguments.processes} x {arguments.rounds} rounds\n"
    )
    print("| network | off, ms | time on / off | quartiles | peak off, MiB | peak on / off |")
    print("| --- | --: | --: | --: | --: | --: |")
    for name in arguments.networks:
        for layout in (0, 1):
            timed: list[list[float]] = []
            peaks: dict[int, list[float]] = {0: [], arguments.mib: []}
            for _ in range(arguments.processes):
                timed += started(arguments, name, layout, arguments.mib, arguments.rounds)
                for cap, found in peaks.items():
                    found.append(started(arguments, name, layout, cap, 0)[0][0])
            off, on = (median(found) for found in peaks.values())
            ratios = sorted(ratio for _, ratio in timed)
            low, high = ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]
            print(
                f"| {name} {'channels_last' if layout else 'contiguous'} "
                f"| {median(t for t, _ in timed) * 1e3:.0f} | {median(ratios):.3f} "
                f"| {low:.3f} to {high:.3f} | {off:.0f} | {on / off:.3f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
