"""Compiles every Triton kernel ahead of time, as its launches would, and reports what it takes.

No GPU is needed (triton_compile.py). Layouts are written as values to a thread, threads to a warp
and warps, by units and values of a tile. Exit status: 1 where a kernel spills, or, with --batches,
where one is laid out in another way for two samples than for one, which would change the order of
a sample's sums.

    python tools/triton_resources.py --capability 80 90 --quick
    python tools/triton_resources.py --batches
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor
from triton_compile import Compiled, Launch, compile_for, record, source

from truenorm._core import geometry
from truenorm._core.call import BEFORE, ROUNDS_PRODUCT, ROUNDS_X_HAT, SWISH
from truenorm._triton import form, host, view

BATCH, RMS, LAYER = geometry.BATCH, geometry.rms(1), geometry.layer(1)
GIVEN = LAYER._replace(as_given=True)


def _turned(x: Tensor) -> Tensor:
    """(N, *positions, C) in the memory of (N, C, *positions)."""
    return x.movedim(-1, 1).contiguous().movedim(1, -1)


def _heads(x: Tensor) -> Tensor:
    """(B, H, S, D) as a part of what one product gave, (B, S, 3, H, D)."""
    b, h, s, d = x.shape
    return x.new_empty(b, s, 3, h, d)[:, :, 0].transpose(1, 2)


LAYS: dict[Any, Callable[[Tensor], Tensor]] = {
    False: lambda x: x,
    True: lambda x: x.to(memory_format=torch.channels_last),
    "turned": _turned,
    "heads": _heads,
}
# what, axes, shape, how it lies (True: channels_last), and whether it is of --quick
CASES: tuple[tuple[str, geometry.Axes, tuple[int, ...], bool | str, bool], ...] = (
    ("LayerNorm", LAYER, (16384, 4096), False, True),
    ("LayerNorm", LAYER, (8192, 768), False, False),
    ("LayerNorm", LAYER, (2048, 8192), False, False),
    ("LayerNorm, wide", LAYER, (64, 100_000), False, True),
    ("RMSNorm", RMS, (16384, 4096), False, True),
    ("RMSNorm", RMS, (2048, 16384), False, False),
    ("InstanceNorm", geometry.instance(64), (2, 64, 128, 128, 128), False, True),
    ("InstanceNorm, small", geometry.instance(320), (2, 320, 8, 8, 8), False, False),
    ("InstanceNorm, channels_last", geometry.instance(64), (2, 64, 256, 256), True, True),
    ("InstanceNorm, channels_last small", geometry.instance(320), (2, 320, 16, 16), True, False),
    ("GroupNorm", geometry.group(32), (16, 320, 64, 64), False, False),
    ("GroupNorm, small", geometry.group(32), (2, 1280, 16, 16), False, True),
    ("GroupNorm, channels_last small", geometry.group(32), (2, 1280, 16, 16), True, True),
    ("GroupNorm, channels_last", geometry.group(32), (16, 320, 64, 64), True, False),
    ("BatchNorm", BATCH, (256, 256, 56, 56), False, True),
    ("BatchNorm", BATCH, (256, 2048, 7, 7), False, False),
    ("BatchNorm, small", BATCH, (32, 64, 14, 14), False, False),
    ("BatchNorm, channels_last", BATCH, (256, 256, 56, 56), True, False),
    ("BatchNorm1d", BATCH, (256, 512), False, False),
    # sizes of one, which Triton makes constants of
    ("GroupNorm, odd", geometry.group(3), (5, 9), False, False),
    ("InstanceNorm, odd", geometry.instance(1), (2, 1, 33, 1), False, False),
    ("LayerNorm, odd", LAYER, (5, 1), False, False),
    ("LayerNorm of an image", LAYER, (16, 56, 56, 192), "turned", True),
    ("LayerNorm of an image, odd", LAYER, (16, 7, 7, 770), "turned", False),
    ("LayerNorm as given", GIVEN, (16, 56, 56, 192), "turned", True),
    ("LayerNorm as given, odd", GIVEN, (16, 7, 7, 770), "turned", False),
    ("LayerNorm as given, wide", GIVEN, (8, 16, 16, 3072), "turned", False),
    ("RMSNorm of heads", RMS, (4, 32, 2048, 128), "heads", True),
    ("BatchNorm1d, odd", BATCH, (5, 1), False, False),
)


class Extra(NamedTuple):
    """What is done beyond the norm."""

    act: int = 0
    mask: bool = False
    residual: bool = False
    parts: bool = False  # weights of their own for each sample, of which 1 is left out

    def __str__(self) -> str:
        return "".join(
            f" +{word}"
            for word, has in (("mask", self.mask), ("residual", self.residual),
                              (f"act {self.act}", self.act), ("parts", self.parts))
            if has
        )  # fmt: skip


PLAIN, PARTS = Extra(), Extra(parts=True)
# as CASES
PARTED: tuple[tuple[str, geometry.Axes, tuple[int, ...], bool | str, bool], ...] = (
    ("LayerNorm", LAYER, (16, 1024, 1152), False, True),
    ("LayerNorm, wide", LAYER, (8, 4, 100_000), False, False),
    ("RMSNorm", RMS, (8, 256, 64), False, False),
    ("InstanceNorm", geometry.instance(64), (8, 64, 256, 256), False, False),
    ("GroupNorm", geometry.group(32), (8, 320, 64, 64), False, False),
    ("GroupNorm, small", geometry.group(32), (8, 1280, 16, 16), False, True),
    ("GroupNorm, channels_last small", geometry.group(32), (8, 1280, 16, 16), True, True),
    ("BatchNorm", BATCH, (64, 256, 28, 28), False, True),
    ("BatchNorm, channels_last", BATCH, (64, 256, 28, 28), True, False),
)
# the activations that differ most in what they take
EXTRAS = [
    Extra(mask=True), Extra(residual=True), Extra(1), Extra(1, residual=True), Extra(5),
    Extra(6, True, True), Extra(7, True, True),
]  # fmt: skip


def passes(
    axes: geometry.Axes,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    lay: bool | str,
    extra: Extra = PLAIN,
    device: str = "meta",
) -> Callable[[], None]:
    """A forward and its backward; of a batch norm, those of evaluation too."""
    features = shape[-1] if axes.feature_dims else shape[1]
    x = LAYS[lay](torch.empty(shape, dtype=dtype, device=device))
    weight = torch.empty(((shape[0],) if extra.parts else ()) + (features,), device=device)
    if device != "meta":
        x.normal_()
        weight.uniform_(0.5, 1.5)
    bias = weight if axes.centred else None
    mask = residual = None
    if extra.mask:
        mask = torch.empty((*shape[:1], *shape[2:]), dtype=torch.bool, device=device)
        if axes.feature_dims:
            mask = mask.new_empty(shape[:-1])
    if extra.residual:
        residual = torch.empty_like(x)
    bits = form.pack(axes) | extra.act << form.ACT | (form.ONE_PLUS if extra.parts else 0)
    needs, tensors = 15 if extra.residual else 7, (weight, bias, mask, residual)

    def run() -> None:
        y, kept = host.norm(x, *tensors, None, None, bits | form.KEEP, 1e-5, 0.1, 0.0)
        host.norm_backward(y, x, kept, *tensors, None, bits | needs, 1e-5, 0.1)
        if axes == BATCH:
            given = torch.empty(features, device=device)
            if extra == PLAIN:
                host.move(given, given, None, kept, 0.1, False)
            host.norm(x, *tensors, given, given, bits, 1e-5, 0.1, 0.0)
            constant = bits | form.CONSTANT | needs
            host.norm_backward(y, x, kept, *tensors, None, constant, 1e-5, 0.1)

    return run


def _launches(*case: Any) -> list[Launch]:
    return record(passes(*case))


def _sum(shape: tuple[int, ...], dtype: torch.dtype) -> list[Launch]:
    """Of a sum and its norm."""
    x, weight = (
        torch.empty(shape, dtype=dtype, device="meta"),
        torch.empty(shape[-1], device="meta"),
    )
    bits = form.pack(LAYER) | form.KEEP | 7

    def run() -> None:
        y, h, kept = host.add_norm(x, x, weight, weight, bits, 1e-5)
        host.add_norm_backward(y, h, h, kept, weight, bits, 1e-5)

    return record(run)


# what, shape of the rows, their groups, the order of steps, and whether it is of --quick
GATED = (
    ("RMSNorm, gate before", (8192, 4096), 1, BEFORE | SWISH, True),
    ("RMSNorm, gate before", (8192, 8192), 1, BEFORE | SWISH, True),
    ("RMSNorm, gate before, groups", (8192, 8192), 8, BEFORE | SWISH | ROUNDS_X_HAT, True),
    ("RMSNorm, gate after", (65536, 128), 1, SWISH | ROUNDS_X_HAT | ROUNDS_PRODUCT, True),
    ("RMSNorm, gate after", (8192, 8192), 1, SWISH | ROUNDS_X_HAT | ROUNDS_PRODUCT, False),
    ("RMSNorm, gate within", (8192, 2048), 1, 0, False),
    ("RMSNorm, gate before, odd", (5, 15), 3, BEFORE | SWISH, False),
)


def _gated(shape: tuple[int, ...], groups: int, order: int, dtype: torch.dtype) -> list[Launch]:
    """Beside a gate, x and gate being parts of what one product gave."""
    n, c = shape
    x, gate = torch.empty(n, 2 * c, dtype=dtype, device="meta").chunk(2, 1)
    weight = torch.empty(c, device="meta")
    bits = form.pack(geometry.Axes(groups, 0, False)) | form.KEEP | 3

    def run() -> None:
        y, kept = host.gated_norm(x, gate, weight, bits, 1e-5, order)
        host.gated_norm_backward(y, x, gate, kept, weight, bits, 1e-5, order)

    return record(run)


def _response(dtype: torch.dtype) -> list[Launch]:
    x = torch.empty(32, 64, 27, 27, dtype=dtype, device="meta")

    def run() -> None:
        host.response(x, 5, 1e-4, 0.75, 1.0)
        host.response_backward(x, x, 5, 1e-4, 0.75, 1.0)

    return record(run)


# axes, shape of a sample, how it lies: statistics of a sample of its own, whole and in chunks,
# channels that 16 divides and that it does not, groups of one row of threads and of several
SAMPLES: tuple[tuple[str, geometry.Axes, tuple[int, ...], bool | str], ...] = (
    ("LayerNorm", LAYER, (4, 768), False),
    ("LayerNorm, wide", LAYER, (1, 100_000), False),
    ("RMSNorm, odd", RMS, (3, 1023), False),
    ("LayerNorm of an image", LAYER, (56, 56, 192), "turned"),
    ("LayerNorm of an image, odd", LAYER, (7, 9, 30), "turned"),
    ("LayerNorm as given", GIVEN, (56, 56, 192), "turned"),
    ("LayerNorm as given, odd", GIVEN, (7, 9, 30), "turned"),
    ("LayerNorm as given, wide", GIVEN, (16, 16, 3072), "turned"),
    ("RMSNorm of heads", RMS, (12, 100, 64), "heads"),
    *(
        (f"{kind}{', channels_last' * last}", axes, shape, last)
        for last in (False, True)
        for kind, axes, shape in (
            ("InstanceNorm", geometry.instance(64), (64, 256, 256)),
            ("InstanceNorm, odd", geometry.instance(30), (30, 128, 128)),
            ("InstanceNorm, small", geometry.instance(320), (320, 8, 8)),
            ("InstanceNorm, small, odd", geometry.instance(30), (30, 7, 9)),
            ("GroupNorm", geometry.group(32), (320, 64, 64)),
            ("GroupNorm, small", geometry.group(32), (1280, 16, 16)),
            ("GroupNorm, small, odd", geometry.group(3), (21, 8, 8)),
        )
    ),
)


def _of_samples(launches: list[Launch]) -> list[Launch]:
    """Without those that add up parameters' gradients alone: these do depend on the batch."""
    return [
        launch
        for launch in launches
        if launch.arguments.get("STATISTICS", True)
        and not launch.arguments.get("STATISTIC_BY_VALUE", False)
    ]


def compare(dtype: torch.dtype, capability: int, quick: bool) -> tuple[int, int]:
    """(kernels laid out in another way for more samples, kernels that spill), told line by line."""
    compiled: dict[str, Compiled] = {}

    def find(launch: Launch) -> Compiled:
        # the same source is the same machine code
        key = f"{source(launch).hash()} {launch.options}"
        if key not in compiled:
            compiled[key] = compile_for(launch, capability)
        return compiled[key]

    different = 0
    cases = [(*case, PLAIN) for case in (SAMPLES[-6::2] if quick else SAMPLES)]
    cases += [(what, axes, shape[1:], lay, PARTS) for what, axes, shape, lay, is_quick in PARTED
              if axes != BATCH and (is_quick or not quick)]  # fmt: skip
    named: list[tuple[str, Callable[[int], list[Launch]]]] = [
        (what, lambda n, a=axes, s=shape, more=(dtype, lay, extra): _launches(a, (n, *s), *more))
        for what, axes, shape, lay, extra in cases
    ]
    named += [
        (what, lambda n, c=shape[1], more=(groups, order, dtype): _gated((n, c), *more))
        for what, shape, groups, order, is_quick in GATED
        if is_quick or not quick
    ]
    for what, launches in named:
        batches = {f"{n} samples": (n, False) for n in (2, 3, 16)}
        batches["offsets of 64 bits"] = (2, True)
        alone = _of_samples(launches(1))
        for name, (n, wide) in batches.items():
            if wide:
                narrow_index = view.index
                view.index = lambda x: tl.int64
            try:
                among = _of_samples(launches(n))
            finally:
                if wide:
                    view.index = narrow_index
            for one, more in zip(alone, among, strict=True):
                assert one.kernel is more.kernel
                before, after = find(one), find(more)
                if before.layouts != after.layouts:
                    different += 1
                    print(
                        f"  {what}, {one.kernel.__name__}, {name}: {'; '.join(after.layouts)}"
                        f" instead of {'; '.join(before.layouts)}"
                    )
    return different, sum(found.spills for found in compiled.values())


def report(dtype: torch.dtype, capability: int, quick: bool, extras: bool) -> int:
    """What every kernel takes, line by line; how many spill."""
    named = [
        (f"{what}{extra}", launch)
        for what, axes, shape, lay, is_quick in CASES
        # what keeps another memory takes a norm alone
        for extra in (EXTRAS if extras and not axes.as_given else [PLAIN])
        if is_quick or not quick
        for launch in _launches(axes, shape, dtype, lay, extra)
    ]
    more = [Extra(6, True, True, parts=True)] if extras else [PARTS]
    named += [
        (f"{what}{extra}", launch)
        for what, axes, shape, lay, is_quick in PARTED
        for extra in more
        if is_quick or not quick
        for launch in _launches(axes, shape, dtype, lay, extra)
    ]
    if not extras:
        for shape in ((16384, 4096), (8192, 768)):
            named += [("LayerNorm of a sum", launch) for launch in _sum(shape, dtype)]
        named += [
            (f"{what} {shape}", launch)
            for what, shape, groups, order, is_quick in GATED
            if is_quick or not quick
            for launch in _gated(shape, groups, order, dtype)
        ]
        named += [("LocalResponseNorm", launch) for launch in _response(dtype)]
    spilling = 0
    for what, launch in named:
        found = compile_for(launch, capability)
        tile = "x".join(
            str(launch.arguments[key])
            for key in ("BU", "BQ", "BC", "BK", "BP", "BN", "BLOCK")
            if key in launch.arguments
        )
        print(
            f"  {what:<46}{launch.kernel.__name__:<24}{launch.grid[0]:>8}{tile:>10}"
            f"{launch.options.get('num_warps', 4):>3}{found.registers:>5}"
            f"{found.stack:>6}{f'{found.load}/{found.store}':>7}  {'; '.join(found.layouts)}",
            flush=True,
        )
        spilling += found.spills
    return spilling


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--capability", nargs="+", type=int, default=[90])
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--quick", action="store_true", help="fewer shapes")
    parser.add_argument(
        "--batches", action="store_true", help="compare one sample with several, and no table"
    )
    parser.add_argument(
        "--extras", action="store_true", help="with masks, residuals and activations instead"
    )
    args = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET"):
        parser.error("unset TRITON_INTERPRET: the interpreter compiles nothing")
    spilling = different = 0
    for name in args.dtype:
        for capability in args.capability:
            head = "kernel, programs, tile, warps, registers, stack, bytes a load/a store, layouts"
            print(f"\n{name}, sm_{capability}" + ("" if args.batches else f": {head}"))
            dtype = getattr(torch, name)
            if args.batches:
                others, spills = compare(dtype, capability, args.quick)
                different += others
            else:
                spills = report(dtype, capability, args.quick, args.extras)
            spilling += spills
    if args.batches:
        print(f"\n{different} of the kernels are laid out in another way for more samples")
    print(f"\n{spilling} of the launches spill")
    return 1 if spilling or different else 0


if __name__ == "__main__":
    sys.exit(main())
