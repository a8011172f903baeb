"""What the compiled Triton kernels move, told without a GPU: they run on the machine of tools/ptx.

    python tools/triton_traffic.py [--dtype bfloat16] [--only channels_last] [--capability 90]

For each launch the tensors of x's size that it reads and writes, R and W of docs/performance.md,
each byte once; what the sectors of 32 bytes hold that its warps ask for, over what they asked, and
the same as if each program's cache held what it was given: what is more leaves the L2 cache for
nothing; by how much lanes that meet in a bank of shared memory lengthen its accesses, and how many
passes these take for each KiB of memory that is moved: 71 take an H100 as long as the memory does.
Shapes are those of the table of triton_resources.py, with fewer samples, channels or positions
where that changes no tile.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton_resources as cases
from on_ptx import compiled
from ptx import Traffic
from triton_compile import Launch
from triton_resources import BATCH, GIVEN, LAYER, RMS

from truenorm._core import geometry

CASES: tuple[tuple[str, geometry.Axes, tuple[int, ...], bool | str], ...] = (
    ("LayerNorm", LAYER, (64, 4096), False),
    ("LayerNorm", LAYER, (64, 768), False),
    ("LayerNorm, wide", LAYER, (16, 100_000), False),
    ("RMSNorm", RMS, (64, 4096), False),
    ("InstanceNorm", geometry.instance(2), (1, 2, 64, 64, 64), False),
    ("InstanceNorm, channels_last", geometry.instance(64), (1, 64, 64, 64), True),
    ("InstanceNorm, channels_last small", geometry.instance(320), (1, 320, 16, 16), True),
    ("GroupNorm", geometry.group(2), (1, 20, 64, 64), False),
    ("GroupNorm, channels_last", geometry.group(32), (1, 320, 32, 32), True),
    ("BatchNorm", BATCH, (32, 2, 56, 56), False),
    ("BatchNorm", BATCH, (64, 64, 7, 7), False),
    ("BatchNorm", BATCH, (64, 64, 14, 14), False),
    ("BatchNorm, channels_last", BATCH, (4, 256, 28, 28), True),
    ("LayerNorm of an image", LAYER, (1, 56, 56, 192), "turned"),
    ("LayerNorm of an image, odd", LAYER, (4, 7, 7, 770), "turned"),
    ("LayerNorm as given", GIVEN, (1, 56, 56, 192), "turned"),
    ("RMSNorm of heads", RMS, (1, 4, 64, 128), "heads"),
)


class Moved(NamedTuple):
    """read, written: tensors of x's size. by_warps, by_programs: what their sectors hold over what
    was asked of such tensors, read and written. passes: of shared memory, over the least.
    passes_a_kib: of what memory moves.
    """

    kernel: str
    read: float
    written: float
    by_warps: tuple[float, float]
    by_programs: tuple[float, float]
    passes: float
    passes_a_kib: float


def moved(run: Callable[[], object], size: int, capability: int) -> list[Moved]:
    """What each launch moves; size: bytes of x."""
    found: list[Moved] = []

    def look(launch: Launch, memory: Any, traffic: Traffic) -> None:
        read, written = (
            sum(each) / size for each in zip(*(r.touched for r in memory.rooms), strict=True)
        )
        both = traffic.read, traffic.written
        warps, programs = (
            tuple(getattr(a, by) / max(a.asked, 1) for a in both)
            for by in ("by_warps", "by_programs")
        )
        taken = traffic.shared.taken
        passes = taken / max(traffic.shared.least, 1), taken / ((read + written) * size / 1024)
        found.append(Moved(launch.kernel.__name__, read, written, warps, programs, *passes))

    with compiled(capability, look, size // 2):
        run()
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--capability", type=int, default=90)
    parser.add_argument("--only", default="", help="part of a case's name")
    args = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET"):
        parser.error("unset TRITON_INTERPRET: the interpreter compiles nothing")
    dtype = getattr(torch, args.dtype)
    print(f"{'':<72}{'R':>6}{'W':>6}{'by warps':>12}{'by programs':>12}{'passes':>8}{'a KiB':>7}")
    for what, axes, shape, lay in CASES:
        if args.only not in what:
            continue
        run = cases.passes(axes, shape, dtype, lay, device="cpu")
        size = dtype.itemsize * torch.Size(shape).numel()
        for line in moved(run, size, args.capability):
            name = f"{what} {shape}"
            print(
                f"{name:<56.56}{line.kernel:<16}{line.read:>6.2f}{line.written:>6.2f}"
                f"{line.by_warps[0]:>7.2f}{line.by_warps[1]:>5.2f}"
                f"{line.by_programs[0]:>7.2f}{line.by_programs[1]:>5.2f}{line.passes:>8.2f}"
                f"{line.passes_a_kib:>7.1f}",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
