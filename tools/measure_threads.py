"""The CPU kernels on more and more threads, beside torch's: does a ratio fall where cores are many?

    python tools/measure_threads.py [--threads 1 2 4 8 16] [--seconds 60] [--json FILE]

Each case is timed forward with the backward, truenorm and torch in turn in one process, medians,
on as many threads as --threads says; rounds go on until the time is spent. Exit status: 1 where a
case's ratio on the most threads is a tenth and more below that on two.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch

import truenorm
from truenorm._tools.bench.cases import Case
from truenorm._tools.bench.cuda import run_of
from truenorm._tools.bench.subject import Subject
from truenorm._tools.bench.timing import BOTH

AFFINE = {"affine": True}
CASES = [
    Case(layer, kwargs, shape, "", last)
    for layer, kwargs, shape, layouts in (
        ("InstanceNorm2d", {"num_features": 64, **AFFINE}, (8, 64, 128, 128), 2),
        ("BatchNorm2d", {"num_features": 256}, (32, 256, 56, 56), 2),
        ("GroupNorm", {"num_groups": 32, "num_channels": 320}, (4, 320, 64, 64), 2),
        ("LayerNorm", {"normalized_shape": 768}, (8192, 768), 1),
        ("RMSNorm", {"normalized_shape": 4096}, (2048, 4096), 1),
    )
    for last in (False, True)[:layouts]
]
DTYPES = torch.float32, torch.bfloat16
# of a ratio, what rounds differ by
NOISE = 0.9
Times = dict[tuple[str, int], dict[str, list[float]]]


def timed(threads: list[int], seconds: float) -> Times:
    """Seconds of each round, by case and threads."""
    times: Times = defaultdict(lambda: defaultdict(list))
    end, rounds = time.monotonic() + seconds, 0
    while not rounds or time.monotonic() < end:
        for case, dtype in itertools.product(CASES, DTYPES):
            # the first round is whole
            if rounds and time.monotonic() > end:
                break
            subject = Subject(case, dtype)
            name = f"{case.name}, {str(dtype).removeprefix('torch.')}"
            for count in threads:
                torch.set_num_threads(count)
                for who, layer in (("truenorm", subject.ours), ("torch", subject.theirs)):
                    times[name, count][who] += _seconds(run_of(layer, layer, subject, BOTH))
        rounds += 1
    return times


def _seconds(run: Callable[[], object]) -> list[float]:
    found = []
    for _ in range(4):
        start = time.perf_counter()
        run()
        found.append(time.perf_counter() - start)
    # the first one warms up
    return found[1:]


def fallen(found: dict[str, dict[int, float]]) -> list[str]:
    """Cases that lose with threads."""
    return [
        name
        for name, by in found.items()
        if 2 in by and max(by) > 2 and by[max(by)] < NOISE * by[2]
    ]


def ratios(times: Times) -> dict[str, dict[int, float]]:
    """Torch's time over truenorm's, by case and threads."""
    found: dict[str, dict[int, float]] = defaultdict(dict)
    for (name, count), of in times.items():
        found[name][count] = statistics.median(of["torch"]) / statistics.median(of["truenorm"])
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cores = os.cpu_count() or 1
    known = [count for count in (1, 2, 4, 8, 16) if count <= cores]
    parser.add_argument("--threads", nargs="+", type=int, default=known)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    print(truenorm.info())
    if truenorm.info().cpu != "native":
        parser.error("the CPU kernels are not loaded here: TRUENORM_LIBRARY names a built library")
    times = timed(args.threads, args.seconds)
    found = ratios(times)
    print(f"\n{'torch over truenorm':<58}" + "".join(f"{count:>8}" for count in args.threads))
    for name, by in found.items():
        print(f"{name:<58}" + "".join(f"{by[count]:>8.2f}" for count in args.threads))
    if args.json:
        rounds = {f"{name}, {count}": of for (name, count), of in times.items()}
        args.json.write_text(json.dumps({"ratios": found, "seconds": rounds}, indent=1) + "\n")
    lost = fallen(found)
    for name in lost:
        print(f"below two threads' ratio: {name}")
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
