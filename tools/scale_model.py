"""The cost of synchronized statistics on paper: a model fitted to measured all-gathers.

    python tools/scale_measure.py collectives > collectives.jsonl
    python tools/scale_model.py fit collectives.jsonl
    python tools/scale_model.py networks --alpha 100 --beta 0.9
    python tools/scale_model.py simulate --alpha 100 --beta 0.9

alpha: microseconds that a message takes whatever its length; beta: nanoseconds for each byte more.
A ring all-gather takes (ranks − 1) · (alpha + beta · bytes), one by doubling
log2(ranks) · alpha + (ranks − 1) · beta · bytes.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch
from scale_networks import UNet3d, resnet50
from torch.nn.modules.batchnorm import _NormBase

RANKS = [2, 8, 64, 512, 4096]
BYTES = 8  # of a number


def ring(ranks: int, size: float, alpha: float, beta: float) -> float:
    """Microseconds of a ring all-gather of `size` bytes from each rank."""
    return (ranks - 1) * (alpha + beta * size / 1e3)


def doubling(ranks: int, size: float, alpha: float, beta: float) -> float:
    """Microseconds of an all-gather by recursive doubling."""
    return math.log2(ranks) * alpha + (ranks - 1) * beta * size / 1e3


def fit(path: Path) -> None:
    """alpha and beta for each number of ranks, by least squares of the relative error."""
    rows = [json.loads(line) for line in path.read_text().splitlines() if line.startswith("{")]
    for ranks in sorted({row["ranks"] for row in rows}):
        mine = [row for row in rows if row["ranks"] == ranks]
        times = torch.tensor([row["us"] for row in mine], dtype=torch.float64)
        sizes = torch.tensor([row["numbers"] * BYTES for row in mine], dtype=torch.float64)
        columns = torch.stack([torch.ones_like(sizes), sizes / 1e3], 1) * (ranks - 1)
        found = torch.linalg.lstsq(columns / times[:, None], torch.ones_like(times)[:, None])
        alpha, beta = found.solution[:, 0].tolist()
        off = (columns @ found.solution[:, 0] / times - 1.0).abs()
        print(
            f"| {ranks} | {alpha:.0f} | {beta:.2f} | {100 * off.median():.0f}% "
            f"| {100 * off.max():.0f}% |"
        )


def features(name: str) -> list[int]:
    """Channels of each norm layer."""
    model = resnet50() if name == "ResNet-50" else UNet3d()
    return [m.num_features for m in model.modules() if isinstance(m, _NormBase)]


def step(sizes: list[int], ranks: int, alpha: float, beta: float, gather: object, at_once: int = 1):
    """Microseconds of exchange in a training step, `at_once` layers sharing one."""
    total = 0.0
    for first in range(0, len(sizes), at_once):
        some = sizes[first : first + at_once]
        forward = sum(2 * c + 2 for c in some) * BYTES
        backward = sum(2 * c for c in some) * BYTES
        total += gather(ranks, forward, alpha, beta) + gather(ranks, backward, alpha, beta)
    return total


def networks(alpha: float, beta: float) -> None:
    """Exchange in a step of whole networks, in ms, and what groups of 8 and sharing make of it."""
    for name in ("ResNet-50", "nnU-Net"):
        sizes = features(name)
        sent = sum(4 * c + 2 for c in sizes) * BYTES
        print(f"{name}: {len(sizes)} layers, {2 * len(sizes)} all-gathers and {sent} bytes a step")
        for ranks in RANKS:
            row = [step(sizes, ranks, alpha, beta, gather) / 1e3 for gather in (ring, doubling)]
            four = step(sizes, ranks, alpha, beta, doubling, 4) / 1e3
            local = step(sizes, min(ranks, 8), alpha, beta, doubling) / 1e3
            print(
                f"| {name} | {ranks} | "
                + " | ".join(f"{t:.1f}" for t in (*row, four, local))
                + " |"
            )


def simulate(alpha: float, beta: float, compute: float, spread: float, layers: int) -> None:
    """Every rank's clock through a step: compute between layers, late ranks, the exchange itself.

    Each layer's compute takes every rank its own time, log-normal about the mean; an exchange by
    doubling starts, pair by pair, when both are there.
    """
    generator = torch.Generator().manual_seed(1)
    size = (2 * 500 + 2) * BYTES
    for ranks in RANKS:
        clock = torch.zeros(ranks, dtype=torch.float64)
        for _ in range(2 * layers):
            noise = torch.randn(ranks, generator=generator, dtype=torch.float64) * spread
            clock += compute * 1e3 / (2 * layers) * torch.exp(noise - spread**2 / 2)
            for hop in range(int(math.log2(ranks))):
                partner = torch.arange(ranks) ^ (1 << hop)
                late = torch.maximum(clock, clock[partner])
                jitter = torch.empty(ranks, dtype=torch.float64).exponential_(generator=generator)
                clock = late + alpha * (0.8 + 0.2 * jitter) + beta * size * (1 << hop) / 1e3
        busy = compute * 1e3
        exchange = 2 * layers * doubling(ranks, size, alpha, beta)
        waiting = clock.max().item() - busy - exchange
        print(
            f"| {ranks} | {clock.max().item() / 1e3:.1f} | {exchange / 1e3:.1f} "
            f"| {waiting / 1e3:.1f} | {100 * busy / clock.max().item():.0f}% |"
        )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["fit", "networks", "simulate"])
    parser.add_argument("file", nargs="?", type=Path)
    parser.add_argument("--alpha", type=float, default=100.0)
    parser.add_argument("--beta", type=float, default=0.9)
    parser.add_argument(
        "--compute", type=float, default=546.0, help="ms of a step without exchange"
    )
    parser.add_argument("--spread", type=float, default=0.02, help="of a rank's time for a layer")
    parser.add_argument("--layers", type=int, default=53)
    args = parser.parse_args()
    if args.what == "fit":
        fit(args.file)
    elif args.what == "networks":
        networks(args.alpha, args.beta)
    else:
        simulate(args.alpha, args.beta, args.compute, args.spread, args.layers)


if __name__ == "__main__":
    main()
