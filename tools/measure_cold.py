"""What a layer's call takes amid a network: the caches hold what ran before it, not its code.

    python tools/measure_cold.py [--rounds N] [--gradients] [WORD …]

Before each call a convolution, a product of matrices and a pass over 4 MB run, as around a norm of
a network. Printed are medians in µs of torch's or another library's own layer and of truenorm's,
which take turns, and the time of each where the same call was made just before.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import truenorm

Made = tuple[nn.Module, Tensor]


def _timm(name: str, channels: int, **options: Any) -> nn.Module:
    import timm  # type: ignore[import-untyped]

    return getattr(timm.layers, name)(channels, **options)  # type: ignore[no-any-return]


def _inside(*shape: int) -> Tensor:
    return torch.randn(shape).contiguous(memory_format=torch.channels_last)


LAYERS: dict[str, Callable[[], Made]] = {
    "LayerNorm": lambda: (nn.LayerNorm(384), torch.randn(2, 8, 8, 384)),
    "RMSNorm": lambda: (nn.RMSNorm(384), torch.randn(2, 64, 384)),
    "BatchNorm2d": lambda: (nn.BatchNorm2d(192), torch.randn(8, 192, 4, 4)),
    "BatchNorm2d, evaluation": lambda: (nn.BatchNorm2d(192).eval(), torch.randn(8, 192, 4, 4)),
    "GroupNorm": lambda: (nn.GroupNorm(8, 128), torch.randn(2, 128, 8, 8)),
    "InstanceNorm2d": lambda: (nn.InstanceNorm2d(64), torch.randn(2, 64, 16, 16)),
    "timm's BatchNormAct2d, evaluation": lambda: (
        _timm("BatchNormAct2d", 192, act_layer=nn.SiLU).eval(),
        torch.randn(8, 192, 4, 4),
    ),
    "the same without an activation": lambda: (
        _timm("BatchNormAct2d", 192, apply_act=False).eval(),
        torch.randn(8, 192, 4, 4),
    ),
    "timm's LayerNorm2d": lambda: (_timm("LayerNorm2d", 160), torch.randn(4, 160, 10, 10)),
    "the same, channels_last": lambda: (_timm("LayerNorm2d", 160), _inside(4, 160, 10, 10)),
}


class _Around:
    """What runs before each call."""

    def __init__(self) -> None:
        self.conv, self.linear = nn.Conv2d(192, 192, 3, padding=1), nn.Linear(384, 1536)
        self.image, self.rows = torch.randn(2, 192, 16, 16), torch.randn(128, 384)
        self.passed = torch.randn(1 << 20)

    def __call__(self) -> None:
        with torch.no_grad():
            self.conv(self.image)
            F.gelu(self.linear(self.rows))
            self.passed.mul_(-1.0)


def measure(name: str, around: _Around, args: argparse.Namespace) -> str:
    layer, x = LAYERS[name]()
    # within another module: alone, torch's layer would be replaced
    ours = truenorm.convert(nn.Sequential(copy.deepcopy(layer)))[0].train(layer.training)
    pair = layer, ours
    x.requires_grad_(args.gradients)
    grad = torch.randn_like(layer(x)) if args.gradients else None

    def run(each: nn.Module) -> float:
        start = time.perf_counter()
        if grad is None:
            with torch.no_grad():
                each(x)
        else:
            each(x).backward(grad)
        return 1e6 * (time.perf_counter() - start)

    cold: list[list[float]] = [[], []]
    warm: list[list[float]] = [[], []]
    for _ in range(args.rounds):
        for k, each in enumerate(pair):
            around()
            cold[k].append(run(each))
            warm[k].append(run(each))
    theirs, own = map(statistics.median, cold)
    theirs_warm, own_warm = map(statistics.median, warm)
    return (
        f"{name:34}{theirs:8.1f}{own:8.1f}{theirs / own:7.2f}"
        f"{theirs_warm:12.1f}{own_warm:8.1f}{theirs_warm / own_warm:7.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("words", nargs="*")
    parser.add_argument("--rounds", type=int, default=201)
    parser.add_argument("--gradients", action="store_true", help="forward and backward")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    around = _Around()
    print(f"{'':34}{'theirs':>8}{'ours':>8}{'ratio':>7}{'again':>12}{'ours':>8}{'ratio':>7}")
    for name in LAYERS:
        if not args.words or any(word in name for word in args.words):
            print(measure(name, around, args), flush=True)


if __name__ == "__main__":
    main()
