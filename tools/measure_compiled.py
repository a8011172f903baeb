"""Networks under torch.compile: torch's own layers compiled, over truenorm's, converted and fused.

    python tools/measure_compiled.py [--rounds N] [--threads N] [--inference] [WORD …]

Per network, how many times as fast as torch's own compiled it runs: torch eager, truenorm eager,
converted and compiled, fused and compiled. A step is forward and backward with a random output
gradient; contenders take turns in one process, and the median of the ratios is printed, then how
far outputs and gradients of the compiled networks are from float64's. Small networks of
this file; with the libraries that have them, whole ones too (torchvision, monai, transformers).
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


class InvertedResidual(nn.Module):
    """MobileNetV2's block."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        hidden = 6 * inside
        self.body = nn.Sequential(
            nn.Conv2d(inside, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6(True),
            nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden), nn.ReLU6(True),
            nn.Conv2d(hidden, outside, 1, bias=False), nn.BatchNorm2d(outside),
        )  # fmt: skip
        self.adds = stride == 1 and inside == outside

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.adds else self.body(x)


class Bottleneck(nn.Module):
    """ResNet-50's block, written as torchvision's."""

    def __init__(self, inside: int, width: int, stride: int) -> None:
        super().__init__()
        outside = 4 * width
        self.conv1 = nn.Conv2d(inside, width, 1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.conv3 = nn.Conv2d(width, outside, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.bn3 = nn.BatchNorm2d(outside)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = nn.Sequential()
        if stride != 1 or inside != outside:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        y += self.shortcut(x)
        return self.relu(y)


class SmoothBlock(nn.Module):
    """A diffusion U-Net's block: norm, SiLU, convolution, twice, and a sum."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(8, channels), nn.GroupNorm(8, channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(y)))


class TokenBlock(nn.Module):
    """A transformer's feed-forward half, twice."""

    def __init__(self, width: int, norm: type[nn.Module]) -> None:
        super().__init__()
        self.norms = nn.ModuleList(norm(width) for _ in range(2))
        self.up = nn.ModuleList(nn.Linear(width, 4 * width) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(4 * width, width) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for norm, up, down in zip(self.norms, self.up, self.down, strict=True):
            x = x + down(F.gelu(up(norm(x))))
        return x


def mobile() -> Made:
    stem = nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU6(True)
    blocks = InvertedResidual(16, 24, 2), InvertedResidual(24, 24, 1), InvertedResidual(24, 32, 2)
    return nn.Sequential(*stem, *blocks), torch.randn(8, 3, 128, 128)


def residual() -> Made:
    stem = nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(True)
    blocks = nn.MaxPool2d(3, 2, 1), Bottleneck(64, 64, 1), Bottleneck(256, 64, 1)
    return nn.Sequential(*stem, *blocks), torch.randn(2, 3, 160, 160)


def instances() -> Made:
    layers: list[nn.Module] = []
    for inside in (1, 32):
        layers += [nn.Conv2d(inside, 32, 3, 1, 1), nn.InstanceNorm2d(32, affine=True)]
        layers += [nn.LeakyReLU(0.01, True)]
    return nn.Sequential(*layers), torch.randn(4, 1, 160, 160)


def smooth() -> Made:
    stem = nn.Conv2d(4, 64, 3, padding=1)
    return nn.Sequential(stem, SmoothBlock(64), SmoothBlock(64)), torch.randn(2, 4, 64, 64)


def tokens() -> Made:
    return TokenBlock(384, nn.LayerNorm), torch.randn(4, 196, 384)


def tokens_rms() -> Made:
    return TokenBlock(384, nn.RMSNorm), torch.randn(4, 196, 384)


def digits() -> Made:
    """Small everywhere: what a compiler alone may do better."""
    layers = (
        nn.Linear(64, 128),
        nn.BatchNorm1d(128),
        nn.GELU(),
        nn.Linear(128, 64),
        nn.LayerNorm(64),
    )
    return nn.Sequential(*layers, nn.ReLU()), torch.randn(32, 64)


def mobilenet_v2() -> Made:
    import torchvision  # type: ignore[import-untyped]

    return torchvision.models.mobilenet_v2(), torch.randn(8, 3, 160, 160)


def resnet50() -> Made:
    import torchvision

    return torchvision.models.resnet50(), torch.randn(4, 3, 160, 160)


def dynunet() -> Made:
    from monai.networks.nets import DynUNet

    kernels, strides = [3] * 4, [1, 2, 2, 2]
    net = DynUNet(3, 1, 2, kernels, strides, strides[1:], filters=[16, 32, 64, 96])
    return net, torch.randn(1, 1, 64, 64, 64)


NETWORKS: dict[str, Callable[[], Made]] = {
    "mobile": mobile,
    "residual": residual,
    "instances": instances,
    "smooth": smooth,
    "tokens": tokens,
    "tokens_rms": tokens_rms,
    "digits": digits,
    "mobilenet_v2": mobilenet_v2,
    "resnet50": resnet50,
    "dynunet": dynunet,
}


def _step(model: Any, x: Tensor, grad: Tensor | None) -> None:
    if grad is None:
        with torch.no_grad():
            model(x)
        return
    for p in model.parameters():
        p.grad = None
    model(x).backward(grad)


def _results(model: Any, x: Tensor, grad: Tensor) -> list[Tensor]:
    for p in model.parameters():
        p.grad = None
    y = model(x)
    y.backward(grad.to(y.dtype))
    return [y.detach().double(), *(p.grad.double() for p in model.parameters())]


def _error(found: list[Tensor], wanted: list[Tensor]) -> float:
    """Largest difference of a tensor over that tensor's largest value; zero gradients aside."""
    worst = 0.0
    for f, w in zip(found, wanted, strict=True):
        size = w.abs().max().item()
        if size > 1e-9 * wanted[0].numel():
            worst = max(worst, (f - w).abs().max().item() / size)
    return worst


def _compiled(model: nn.Module) -> Any:
    """With graphs of its own: those of one function are tried one after the other."""

    def call(x: Tensor) -> Tensor:
        return model(x)  # type: ignore[no-any-return]

    call.__code__ = call.__code__.replace()
    found = torch.compile(call)
    found.parameters = model.parameters  # type: ignore[attr-defined]
    return found


def norms_of(model: nn.Module) -> list[str]:
    """The names of those that `convert` would swap."""
    names = {norm.name for norm in truenorm.survey(model).norms if norm.swappable}
    return [name for name, _ in model.named_modules() if name in names]


def bare(model: nn.Module, norms: list[str]) -> nn.Module:
    """With nothing in the place of these: what no norm could be faster than."""
    for name in norms:
        parent, _, last = name.rpartition(".")
        norm = model.get_submodule(name)
        # timm's take their activation with them
        setattr(model.get_submodule(parent), last, getattr(norm, "act", None) or nn.Identity())
    return model


def measure(name: str, args: argparse.Namespace) -> None:
    torch.manual_seed(0)
    torch.compiler.reset()
    model, x = NETWORKS[name]()
    if args.channels_last:
        model = model.to(memory_format=torch.channels_last)
        x = x.contiguous(memory_format=torch.channels_last)
    model.train(not args.inference)
    converted = truenorm.convert(copy.deepcopy(model))
    fused = truenorm.fuse(copy.deepcopy(converted))
    y = model(x)
    grad = None if args.inference else torch.randn(y.shape)
    contenders = {
        "torch compiled": _compiled(copy.deepcopy(model)),
        "torch eager": model,
        "converted eager": converted,
        "fused eager": fused,
        "converted compiled": _compiled(copy.deepcopy(converted)),
        "fused compiled": _compiled(copy.deepcopy(fused)),
    }
    contenders = {n: m for n, m in contenders.items() if "eager" not in n or not args.short}
    errors = []
    if args.bare:
        contenders["no norms"] = _compiled(bare(copy.deepcopy(model), norms_of(model)))
    elif grad is not None and not args.short:
        wanted = _results(copy.deepcopy(model).double(), x.double(), grad.double())
        for each in contenders.values():
            errors.append(_error(_results(each, x, grad), wanted))
    clock = time.perf_counter if args.threads > 1 else time.thread_time
    for each in contenders.values():
        for _ in range(2):
            _step(each, x, grad)
    times: dict[str, list[float]] = {n: [] for n in contenders}
    for _ in range(args.rounds):
        for n, each in contenders.items():
            start = clock()
            _step(each, x, grad)
            times[n].append(clock() - start)
    base = times.pop("torch compiled")
    ratios = [statistics.median(b / t for b, t in zip(base, times[n], strict=True)) for n in times]
    print(f"{name:14} {1e3 * statistics.median(base):8.1f} ms", end="")
    print("".join(f"{r:20.2f}" for r in ratios), "  ", " ".join(f"{e:.1e}" for e in errors))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("words", nargs="*", metavar="WORD")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--inference", action="store_true")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--short", action="store_true", help="compiled ones alone, without errors")
    parser.add_argument("--own", type=int, help="truenorm.compile_options(own=…)")
    parser.add_argument("--bare", action="store_true", help="and the network without its norms")
    args = parser.parse_args()
    truenorm.compile_options(own=args.own)
    torch.set_num_threads(args.threads)
    names = (
        "torch eager",
        "converted eager",
        "fused eager",
        "converted compiled",
        "fused compiled",
    )
    names = names[3 * args.short :] + ("no norms, compiled",) * args.bare
    print(f"{'network':14} {'compiled':>11}" + "".join(f"{n:>20}" for n in names))
    for name in NETWORKS:
        if not args.words or name in args.words:
            measure(name, args)


if __name__ == "__main__":
    main()
