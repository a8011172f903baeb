"""Whole steps of networks that others wrote: torch's time over truenorm's, eager.

    python tools/measure_networks.py [--inference] [--channels-last] [--bfloat16] [WORD …]

The network as it is, converted, fused, and with nothing in the place of its norms take turns in one
process. Printed are torch's median time; its medians over converted, over fused and over none; and
how far fused is on the way to the step whose norms cost what moving their bytes costs at the rate
of `clone()` (of five tensors, in inference two). What a network's package misses is left out.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import measure_compiled
import torch
from measure_compiled import Made, bare, norms_of
from torch import Tensor, nn
from torch.nn import Module

import truenorm
from truenorm._tools.bench.networks import first_tensor


def _timm(name: str, *shape: int, **more: Any) -> Made:
    import timm  # type: ignore[import-untyped]

    return timm.create_model(name, **more), torch.randn(shape)


def _torchvision(name: str, *shape: int) -> Made:
    import torchvision  # type: ignore[import-untyped]

    return getattr(torchvision.models, name)(), torch.randn(shape)


def _nnunet() -> Made:
    from dynamic_network_architectures.architectures.unet import (  # type: ignore[import-not-found]
        PlainConvUNet,
    )

    net = PlainConvUNet(
        1, 4, [16, 32, 64, 96], nn.Conv3d, 3, [1, 2, 2, 2], 2, 2, 2, True, nn.InstanceNorm3d,
        {"affine": True}, None, None, nn.LeakyReLU, {"inplace": True},
    )  # fmt: skip
    return net, torch.randn(1, 1, 64, 64, 64)


class _Residual(Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        conv = [nn.Conv2d(width, width, 3, padding=1, padding_mode="reflect") for _ in range(2)]
        norms = [nn.InstanceNorm2d(width) for _ in range(2)]
        self.inner = nn.Sequential(conv[0], norms[0], nn.ReLU(True), conv[1], norms[1])

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)  # type: ignore[no-any-return]


def _cyclegan() -> Made:
    """The generator of Zhu et al. 2017, of half as many channels."""

    def down(a: int, b: int) -> list[Module]:
        return [nn.Conv2d(a, b, 3, 2, 1), nn.InstanceNorm2d(b), nn.ReLU(True)]

    def up(a: int, b: int) -> list[Module]:
        return [nn.ConvTranspose2d(a, b, 3, 2, 1, 1), nn.InstanceNorm2d(b), nn.ReLU(True)]

    first = [nn.Conv2d(3, 32, 7, padding=3), nn.InstanceNorm2d(32), nn.ReLU(True)]
    middle = [_Residual(128) for _ in range(6)]
    layers = [*first, *down(32, 64), *down(64, 128), *middle, *up(128, 64), *up(64, 32)]
    return nn.Sequential(*layers, nn.Conv2d(32, 3, 7, padding=3), nn.Tanh()), torch.randn(
        1, 3, 128, 128
    )


class _Unconditioned(Module):
    def __init__(self, net: Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x, 10).sample  # type: ignore[no-any-return]


def _diffusion() -> Made:
    from diffusers import UNet2DModel  # type: ignore[import-not-found]

    blocks = {
        "down_block_types": ("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        "block_out_channels": (64, 128, 128),
    }
    net = UNet2DModel(sample_size=32, in_channels=3, out_channels=3, layers_per_block=1, **blocks)
    return _Unconditioned(net), torch.randn(4, 3, 32, 32)


NETWORKS: dict[str, Callable[[], Made]] = {
    "MobileNetV2": measure_compiled.mobilenet_v2,
    "EfficientNet-B0": lambda: _timm("efficientnet_b0", 8, 3, 128, 128),
    "ResNet-50": measure_compiled.resnet50,
    "ConvNeXt-atto": lambda: _timm("convnext_atto", 4, 3, 160, 160),
    "ConvNeXt-tiny": lambda: _torchvision("convnext_tiny", 2, 3, 128, 128),
    "DynUNet": measure_compiled.dynunet,
    "nnU-Net": _nnunet,
    "CycleGAN": _cyclegan,
    "diffusion U-Net": _diffusion,
}


def _step(model: Module, x: Tensor, grad: Tensor | None) -> Callable[[], Any]:
    wanted = list(model.parameters())

    def run() -> Any:
        if grad is None:
            with torch.no_grad():
                return first_tensor(model(x))
        y = first_tensor(model(x))
        return torch.autograd.grad(y, wanted, grad, allow_unused=True)

    return run


def _values(model: Module, norms: list[str], x: Tensor) -> int:
    """Of all inputs of the norms."""
    found: list[int] = []
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, inputs: found.append(inputs[0].numel())
        )
        for name in norms
    ]
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    return sum(found)


def measure(name: str, args: argparse.Namespace) -> str:
    torch.manual_seed(0)
    theirs, x = NETWORKS[name]()
    dtype = torch.bfloat16 if args.bfloat16 else torch.float32
    theirs, x = theirs.to(dtype).train(not args.inference), x.to(dtype)
    if args.channels_last:
        last = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
        theirs, x = theirs.to(memory_format=last), x.contiguous(memory_format=last)
    norms = norms_of(theirs)
    converted = truenorm.convert(copy.deepcopy(theirs))
    models = [
        theirs,
        converted,
        truenorm.fuse(copy.deepcopy(converted)),
        bare(copy.deepcopy(theirs), norms),
    ]
    with torch.no_grad():
        grad = None if args.inference else torch.randn_like(first_tensor(theirs(x)))
    runs = [_step(model, x, grad) for model in models]
    moved = torch.empty(1 << 22, dtype=dtype)
    for run in runs:
        run(), run()
    times = []
    for _ in range(args.rounds):
        each = []
        for run in [*runs, moved.clone]:
            start = time.perf_counter()
            run()
            each.append(time.perf_counter() - start)
        times.append(each)
    over = [statistics.median(t[0] / t[k] for t in times) for k in (1, 2, 3)]
    medians = [statistics.median(t[k] for t in times) for k in range(5)]
    tensors = 2 if args.inference else 5
    floor = medians[4] / moved.numel() * _values(theirs, norms, x) * tensors / 2
    way = medians[0] - medians[3] - floor
    share = f"{(medians[0] - medians[2]) / way:.2f}" if way > 0 else "none to go"
    return (
        f"{name:16} {1e3 * medians[0]:7.0f} ms, {len(norms)} norms: converted {over[0]:.2f}, fused "
        f"{over[1]:.2f}, none {over[2]:.2f}; norms at their floor "
        f"{medians[0] / (medians[3] + floor):.2f}, way {share}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("words", nargs="*")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    for option in ("--inference", "--channels-last", "--bfloat16"):
        parser.add_argument(option, action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for name in NETWORKS:
        if not args.words or any(word in name for word in args.words):
            try:
                print(measure(name, args), flush=True)
            except ImportError as error:
                print(f"{name:16} left out: {error}", flush=True)


if __name__ == "__main__":
    main()
