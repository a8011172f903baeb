"""What `truenorm.inspect` costs beside the forward passes that it looks at, on real networks.

    python tools/measure_inspect.py [--batches 8] [--rounds 5]

Rounds in turn, in one process: the plain forward passes in evaluation mode, then the inspection of
the same batches. The ratio is the median over rounds. Needs truenorm[models].
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

import truenorm
from truenorm._tools.bench.networks import NETWORKS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    for network in NETWORKS:
        torch.manual_seed(20)
        model = network.build(False).eval()
        data = [torch.randn(network.shape) for _ in range(args.batches)]
        seconds: list[tuple[float, float]] = []
        for _ in range(args.rounds + 1):
            start = time.perf_counter()
            with torch.no_grad():
                for x in data:
                    model(x)
            middle = time.perf_counter()
            truenorm.inspect(model, iter(data), batches=args.batches)
            seconds.append((middle - start, time.perf_counter() - middle))
        # the first round warms up
        plain, inspected = (statistics.median(s[i] for s in seconds[1:]) for i in (0, 1))
        ratio = statistics.median(b / a for a, b in seconds[1:])
        print(
            f"{network.name:<12} plain {plain:.2f} s, inspected {inspected:.2f} s, "
            f"ratio {ratio:.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
