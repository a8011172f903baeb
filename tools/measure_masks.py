"""What a mask costs: layers on input of which half is padding, with and without it.

Prints, per case, the unmasked layer's time over the masked one's (1: a mask costs nothing), and the
time of the composition of torch operations over it, forward and forward with backward: medians of
pairs timed in turn in one process.

    python tools/measure_masks.py [--rounds N]
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

import truenorm

CASES: list[tuple[str, Callable[[int], torch.nn.Module], tuple[int, ...], bool]] = [
    ("InstanceNorm1d", truenorm.InstanceNorm1d, (32, 128, 1024), False),
    ("InstanceNorm1d", truenorm.InstanceNorm1d, (32, 128, 1024), True),
    ("BatchNorm1d", truenorm.BatchNorm1d, (32, 128, 1024), False),
    ("BatchNorm1d", truenorm.BatchNorm1d, (32, 128, 1024), True),
    ("InstanceNorm1d", truenorm.InstanceNorm1d, (256, 64, 40), False),
    ("BatchNorm1d", truenorm.BatchNorm1d, (256, 64, 40), False),
    ("GroupNorm", lambda c: truenorm.GroupNorm(8, c), (32, 128, 1024), False),
    ("InstanceNorm2d", truenorm.InstanceNorm2d, (8, 64, 96, 96), False),
    ("BatchNorm2d", truenorm.BatchNorm2d, (8, 64, 96, 96), False),
    ("BatchNorm2d", truenorm.BatchNorm2d, (8, 64, 96, 96), True),
]


def half(shape: tuple[int, ...], kind: str) -> Tensor:
    """A mask of half of the positions: leading ones in a row of lengths, or random ones."""
    n, _, *positions = shape
    if kind == "random":
        return torch.rand(n, *positions) < 0.5
    size = math.prod(positions)
    lengths = torch.linspace(0, size, n).round()
    return (torch.arange(size) < lengths[:, None]).view(n, *positions)


def composed(x: Tensor, mask: Tensor, over_batch: bool, eps: float) -> Tensor:
    """What users write without a mask in the layer."""
    valid = mask.unsqueeze(1)
    dims = [0, *range(2, x.dim())] if over_batch else list(range(2, x.dim()))
    count = valid.sum(dims, keepdim=True).clamp(min=1)
    mean = (x * valid).sum(dims, keepdim=True) / count
    d = (x - mean) * valid
    return d * torch.rsqrt((d * d).sum(dims, keepdim=True) / count + eps)


def seconds(call: Callable[[], Tensor], grad: Tensor | None, x: Tensor) -> float:
    start = time.perf_counter()
    y = call()
    if grad is not None:
        torch.autograd.grad(y, x, grad)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    torch.manual_seed(0)
    print(f"{'layer':34} {'mask':8} {'unmasked/masked':>22} {'composed/masked':>22}")
    products: dict[str, list[list[float]]] = {"lengths": [], "random": []}
    for name, make, shape, channels_last in CASES:
        layer = make(shape[1])
        for kind in ("lengths", "random"):
            mask = half(shape, kind)
            x, grad = torch.randn(shape), torch.randn(shape)
            if channels_last:
                x, grad = (t.movedim(1, -1).contiguous().movedim(-1, 1) for t in (x, grad))
            x.requires_grad_()
            over_batch = "Batch" in name
            calls = [
                lambda layer=layer, x=x, mask=mask: layer(x, mask=mask),
                lambda layer=layer, x=x: layer(x),
                lambda x=x, mask=mask, over=over_batch: composed(x, mask, over, 1e-5),
            ]
            found = []
            for wanted in (None, grad):
                times: list[list[float]] = [[], [], []]
                with torch.set_grad_enabled(wanted is not None):
                    for i in range(rounds + 2):
                        # each of them after each other one: what ran before leaves its traces
                        for k in ((0, 1, 2), (1, 0, 2), (2, 1, 0), (0, 2, 1))[i % 4]:
                            took = seconds(calls[k], wanted, x)
                            if i >= 2:
                                times[k].append(took)
                masked, unmasked, torchs = times
                pairs = [
                    statistics.median(o / m for o, m in zip(other, masked, strict=True))
                    for other in (unmasked, torchs)
                ]
                found.append(pairs)
            products[kind].append([found[0][0], found[1][0]])
            layout = " channels_last" if channels_last else ""
            columns = "".join(f"{found[0][k]:12.2f} {found[1][k]:9.2f}" for k in (0, 1))
            print(f"{name + ' ' + str(shape) + layout:48} {kind:8} {columns}", flush=True)
    for kind, found in products.items():
        means = (math.exp(statistics.fmean(math.log(p[k]) for p in found)) for k in (0, 1))
        print(
            "geometric means of unmasked/masked, {}: {:.2f} forward, {:.2f} with backward".format(
                kind, *means
            )
        )


if __name__ == "__main__":
    main()
