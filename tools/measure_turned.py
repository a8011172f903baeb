"""What lies with its channels outside where they are wanted inside, and the other way round.

`python tools/measure_turned.py [--threads N]`, medians of rounds in which all take turns:

norms of a contiguous image's channels: LayerNorm by the operator whose result lies as the image
does, by that whose result has the channels inside, and of what has them inside already, over
`clone()`; and torch's permuted layer_norm over the second, and with a copy back over the first;
gradients in the other memory format than the input's: over those in the same, and torch's over
ours.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import truenorm
from truenorm._core import eager
from truenorm._core.call import AS_GIVEN
from truenorm._tools.bench.timing import Plan, in_turn

PLAN = Plan(minimum=15, maximum=15, round_seconds=0.02)
SHAPES = (2, 32, 8, 8), (8, 96, 56, 56), (8, 768, 7, 7), (2, 256, 64, 64), (2, 4, 128, 128)


def ratio(seconds: dict[str, list[float]], one: str, other: str) -> float:
    return statistics.median(a / b for a, b in zip(seconds[one], seconds[other], strict=True))


def of_channels(shape: tuple[int, ...], dtype: torch.dtype) -> str:
    x = torch.randn(shape).to(dtype)
    weight, bias = torch.randn(2, shape[1]).to(dtype)
    last = x.movedim(1, -1)
    inside = last.contiguous()

    def ours(t: Tensor, flags: int) -> Callable[[], Any]:
        return lambda: eager.call(
            eager.OWN, t, weight, bias, flags | eager.layer(1), 1e-5, (), None
        )

    def theirs() -> Tensor:
        return F.layer_norm(last, shape[1:2], weight, bias).movedim(-1, 1)

    seconds = in_turn(
        {
            "clone": x.clone,
            "as given": ours(last, AS_GIVEN),
            "to inside": ours(last, 0),
            "inside": ours(inside, 0),
            "torch": theirs,
            "torch, back": lambda: theirs().contiguous(),
        },
        PLAN,
    )
    over = [ratio(seconds, name, "clone") for name in ("as given", "to inside", "inside")]
    faster = ratio(seconds, "torch", "to inside"), ratio(seconds, "torch, back", "as given")
    return (
        f"over clone(): as given {over[0]:.2f}, to inside {over[1]:.2f}, inside {over[2]:.2f}; "
        f"torch's time over ours: to inside {faster[0]:.2f}, as given {faster[1]:.2f}"
    )


def of_gradients(kind: str, shape: tuple[int, ...], dtype: torch.dtype, inside: bool) -> str:
    formats = torch.contiguous_format, torch.channels_last
    layers = [
        m.GroupNorm(2, shape[1]) if kind == "GroupNorm" else getattr(m, kind)(shape[1], affine=True)
        for m in (truenorm, torch.nn)
    ]
    x = torch.randn(shape).to(dtype).contiguous(memory_format=formats[inside])
    grads = [torch.randn(shape).to(dtype).contiguous(memory_format=f) for f in formats]
    x.requires_grad_()

    def backward(layer: Any, grad: Tensor) -> Callable[[], Any]:
        y, leaves = layer(x), [x, *layer.parameters()]
        return lambda: torch.autograd.grad(y, leaves, grad, retain_graph=True)

    ours, theirs = (layer.to(dtype) for layer in layers)
    same, other = grads[inside], grads[not inside]
    runs = {"same": backward(ours, same), "other": backward(ours, other)}
    seconds = in_turn({**runs, "torch": backward(theirs, other)}, PLAN)
    return (
        f"the other over the same {ratio(seconds, 'other', 'same'):.2f}, torch's over ours "
        f"{ratio(seconds, 'torch', 'other'):.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    torch.set_num_threads(parser.parse_args().threads)
    for dtype in (torch.float32, torch.bfloat16):
        for shape in SHAPES:
            print(f"channels {shape} {dtype}: {of_channels(shape, dtype)}", flush=True)
        for kind in ("BatchNorm2d", "InstanceNorm2d", "GroupNorm"):
            for shape in SHAPES:
                for inside in (False, True):
                    of = "channels_last" if inside else "contiguous"
                    found = of_gradients(kind, shape, dtype, inside)
                    print(f"{kind} {shape} {dtype}, x {of}: {found}", flush=True)


if __name__ == "__main__":
    main()
