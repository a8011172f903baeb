"""What one pass for norm, activation and residual saves: time, and memory kept for backward.

Prints, per case, the time of the layer with torch's activation (and addition) after it over the
layer's own `activation=` (and `residual=`), and the time of torch's layers over it: forward, and
forward with backward; medians of pairs timed in turn in one process. Then, per network, the
memory that is kept between forward and backward, over that of torch's layers: fused alone, and
within `recompute_outputs()`.

    python tools/measure_fused.py [--rounds N] [--memory]
"""

from __future__ import annotations

import argparse
import copy
import gc
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import truenorm

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "hardswish": F.hardswish,
    "elu": F.elu,
    "silu": F.silu,
    "gelu": F.gelu,
}
# a layer, an input, channels_last, an activation, a residual
CASES: list[tuple[str, tuple[int, ...], bool, str, bool]] = [
    ("BatchNorm2d", (32, 64, 56, 56), False, "relu", False),
    ("BatchNorm2d", (32, 64, 56, 56), True, "relu", False),
    ("BatchNorm2d", (32, 256, 56, 56), False, "relu", True),
    ("BatchNorm2d", (32, 256, 56, 56), True, "relu", True),
    ("BatchNorm2d", (32, 512, 14, 14), False, "relu", True),
    ("BatchNorm2d", (32, 96, 56, 56), False, "hardswish", False),
    ("BatchNorm2d", (32, 96, 56, 56), True, "silu", False),
    ("InstanceNorm2d", (8, 32, 128, 128), False, "leaky_relu", False),
    ("InstanceNorm3d", (2, 32, 48, 48, 48), False, "leaky_relu", True),
    ("InstanceNorm3d", (2, 32, 48, 48, 48), True, "leaky_relu", False),
    ("InstanceNorm2d", (8, 64, 64, 64), False, "elu", False),
    ("GroupNorm", (8, 64, 64, 64), False, "silu", False),
    ("GroupNorm", (8, 64, 64, 64), True, "silu", True),
    ("LayerNorm", (16, 512, 768), False, "gelu", False),
]


def make(module: Any, name: str, channels: int, **options: Any) -> Any:
    if name == "GroupNorm":
        return module.GroupNorm(8, channels, **options)
    if name.startswith("Instance"):
        return getattr(module, name)(channels, affine=True, **options)
    return getattr(module, name)(channels, **options)


def time_of(call: Callable[[], Tensor], leaves: list[Tensor], grad: Tensor | None) -> float:
    start = time.perf_counter()
    y = call()
    if grad is not None:
        torch.autograd.grad(y, leaves, grad)
    return time.perf_counter() - start


def measure(rounds: int) -> None:
    print(f"{'case':62} {'unfused/fused':>16} {'torch/fused':>16}   (forward, with backward)")
    products: list[list[float]] = []
    for name, shape, channels_last, activation, residual in CASES:
        channels = shape[-1] if name == "LayerNorm" else shape[1]
        fused = make(truenorm, name, channels, activation=activation)
        unfused, theirs = make(truenorm, name, channels), make(nn, name, channels)
        x, r, grad = (torch.randn(shape) for _ in range(3))
        if channels_last:
            x, r, grad = (t.movedim(1, -1).contiguous().movedim(-1, 1) for t in (x, r, grad))
        x.requires_grad_(), r.requires_grad_()
        act = ACTIVATIONS[activation]

        def then(
            layer: Any, act: Any = act, x: Tensor = x, r: Any = r if residual else None
        ) -> Any:
            y = layer(x)
            return act(y if r is None else y + r)

        calls = [
            lambda f=fused, x=x, r=r if residual else None: f(x, residual=r),
            lambda u=unfused, then=then: then(u),
            lambda t=theirs, then=then: then(t),
        ]
        leaves = [x, *([r] if residual else []), fused.weight, fused.bias]
        row = []
        for backward in (None, grad):
            times: list[list[float]] = [[], [], []]
            layers = (fused, unfused, theirs)
            for turn in range(rounds + 2):
                for which, (call, layer) in enumerate(zip(calls, layers, strict=True)):
                    wanted = [*leaves[:-2], layer.weight, layer.bias]
                    seconds = time_of(call, wanted, backward)
                    if turn > 1:
                        times[which].append(seconds)
            for other in (1, 2):
                pairs = zip(times[other], times[0], strict=True)
                row.append(statistics.median(a / b for a, b in pairs))
        products.append(row)
        case = f"{name} {shape} {'channels_last ' if channels_last else ''}{activation}"
        case += " + residual" if residual else ""
        print(f"{case:62} {row[0]:7.2f} {row[2]:8.2f} {row[1]:7.2f} {row[3]:8.2f}", flush=True)
    means = [
        math.exp(statistics.fmean(map(math.log, column))) for column in zip(*products, strict=True)
    ]
    print(f"{'geometric mean':62} {means[0]:7.2f} {means[2]:8.2f} {means[1]:7.2f} {means[3]:8.2f}")


# ---------------------------------------------------------------- memory


class Bottleneck(nn.Module):
    """ResNet-50's block."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut: Any = None
        if channels != 4 * width:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width)
            )

    def forward(self, x: Tensor) -> Any:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += x if self.shortcut is None else self.shortcut(x)
        return self.relu(out)


def unet_block(channels: int, width: int) -> nn.Sequential:
    """nnU-Net's block: convolution, InstanceNorm, leaky ReLU, twice."""
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1), nn.InstanceNorm2d(width, affine=True),
        nn.LeakyReLU(0.01, inplace=True),
        nn.Conv2d(width, width, 3, padding=1), nn.InstanceNorm2d(width, affine=True),
        nn.LeakyReLU(0.01, inplace=True),
    )  # fmt: skip


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "ResNet-50 block": (lambda: Bottleneck(256, 64), (8, 256, 56, 56)),
    "ResNet-50 stage of three blocks": (
        lambda: nn.Sequential(Bottleneck(64, 64), Bottleneck(256, 64), Bottleneck(256, 64)),
        (8, 64, 56, 56),
    ),
    "nnU-Net block": (lambda: unet_block(32, 32), (8, 32, 96, 96)),
    "nnU-Net stage of two blocks": (
        lambda: nn.Sequential(unet_block(32, 64), unet_block(64, 64)),
        (8, 32, 96, 96),
    ),
}


def kept(model: nn.Module, x: Tensor, recompute: bool) -> int:
    """Bytes of the distinct tensors that live between forward and backward, besides x and weights.

    Everything alive is counted, so what a saved tensor refers to is too.
    """

    def alive() -> dict[int, int]:
        gc.collect()
        found = {}
        for thing in gc.get_objects():
            if isinstance(thing, Tensor):
                storage = thing.untyped_storage()
                found[storage.data_ptr()] = storage.nbytes()
        return found

    before = alive()
    total = 0
    with (
        truenorm.recompute_outputs()
        if recompute
        else torch.autograd.graph.saved_tensors_hooks(
            # so that what torch saves is an object to be found, here as there
            lambda t: t.detach(),
            lambda t: t,
        )
    ):
        loss = model(x).mean()
    total = sum(size for place, size in alive().items() if place not in before)
    loss.backward()
    return total


def measure_memory() -> None:
    print(f"{'network':34} {'torch, MiB':>10} {'fused':>8} {'recomputed':>11}   (of torch's)")
    for name, (build, shape) in NETWORKS.items():
        torch.manual_seed(0)
        theirs = build()
        ours = truenorm.fuse(truenorm.convert(copy.deepcopy(theirs)))
        x = torch.randn(shape)
        sizes = [kept(theirs, x, False), kept(ours, x, False), kept(ours, x, True)]
        rest = [f"{size / sizes[0]:.2f}" for size in sizes[1:]]
        print(f"{name:34} {sizes[0] / 2**20:10.1f} {rest[0]:>8} {rest[1]:>11}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--memory", action="store_true", help="memory alone")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    if not arguments.memory:
        measure(arguments.rounds)
    measure_memory()


if __name__ == "__main__":
    main()
