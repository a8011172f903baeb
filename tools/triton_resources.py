"""Compiles every Triton kernel ahead of time, as its launches would, and reports what it takes.

No GPU is needed: the host side runs on tensors without memory, each launch is recorded instead of
made, compiled for the compute capability given, and assembled; cuobjdump, which Triton carries,
tells registers and bytes of stack, where spilled registers are. Exit status: 1 where there is one.

    python tools/triton_resources.py --capability 80 90 --quick
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from truenorm import _axes
from truenorm._triton import host

TYPES = {
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
}
# a division or a root of float64 is a call, which may need some bytes
_SPILL = 16
_OPTIONS = ("num_warps", "enable_fp_fusion")


class Launch(NamedTuple):
    """A kernel as it would have been launched."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, Any]


def record(run: Callable[[], object]) -> list[Launch]:
    """The launches that `run` would make."""
    launches: list[Launch] = []

    def note(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        options = {name: kwargs.pop(name) for name in _OPTIONS if name in kwargs}
        arguments = {**dict(zip(self.arg_names, args, strict=False)), **kwargs}
        launches.append(Launch(self, grid, arguments, options))

    original = JITFunction.run
    JITFunction.run = note  # type: ignore[method-assign]
    try:
        run()
    finally:
        JITFunction.run = original  # type: ignore[method-assign]
    return launches


def _source(launch: Launch) -> ASTSource:
    """What Triton would specialize the kernel on: alignment, and sizes of one."""
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[Any]] = {}
    for i, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        specialized = not parameter.do_not_specialize
        if isinstance(value, Tensor):
            signature[parameter.name] = TYPES[value.dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]
        elif parameter.is_constexpr or value is None or (value == 1 and specialized):
            signature[parameter.name] = "constexpr"
            constants[(i,)] = value
        else:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if specialized and value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(launch.kernel, signature, constants, attributes)


class Resources(NamedTuple):
    registers: int
    stack: int
    shared: int
    ptx: str


def compile_for(launch: Launch, capability: int) -> Resources:
    """The kernel compiled and assembled for a compute capability, 80 or 90, say."""
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(_source(launch), target=target, options=launch.options)
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(compiled.asm["cubin"])
        said = subprocess.run(
            [str(cuobjdump), "--dump-resource-usage", str(path)],
            capture_output=True,
            text=True,
            check=True,
        ).stdout

    def number(name: str) -> int:
        found = re.search(rf"{name}:(\d+)", said)
        if found is None:
            raise SystemExit(f"cuobjdump does not say {name}:\n{said}")
        return int(found.group(1))

    return Resources(number("REG"), number("STACK"), compiled.metadata.shared, compiled.asm["ptx"])


BATCH, RMS, LAYER = _axes.BATCH, _axes.rms(1), _axes.layer(1)
_LAST = torch.channels_last
# what, axes, shape, channels_last, and whether it is of --quick
CASES: tuple[tuple[str, _axes.Axes, tuple[int, ...], bool, bool], ...] = (
    ("LayerNorm", LAYER, (16384, 4096), False, True),
    ("LayerNorm", LAYER, (8192, 768), False, False),
    ("LayerNorm", LAYER, (2048, 8192), False, False),
    ("LayerNorm, wide", LAYER, (64, 100_000), False, True),
    ("RMSNorm", RMS, (16384, 4096), False, True),
    ("RMSNorm", RMS, (2048, 16384), False, False),
    ("InstanceNorm", _axes.instance(64), (2, 64, 128, 128, 128), False, True),
    ("InstanceNorm, small", _axes.instance(320), (2, 320, 8, 8, 8), False, False),
    ("InstanceNorm, channels_last", _axes.instance(64), (2, 64, 256, 256), True, True),
    ("InstanceNorm, channels_last small", _axes.instance(320), (2, 320, 16, 16), True, False),
    ("GroupNorm", _axes.group(32), (16, 320, 64, 64), False, False),
    ("GroupNorm, small", _axes.group(32), (2, 1280, 16, 16), False, True),
    ("GroupNorm, channels_last", _axes.group(32), (16, 320, 64, 64), True, False),
    ("BatchNorm", BATCH, (256, 256, 56, 56), False, True),
    ("BatchNorm", BATCH, (256, 2048, 7, 7), False, False),
    ("BatchNorm, small", BATCH, (32, 64, 14, 14), False, False),
    ("BatchNorm, channels_last", BATCH, (256, 256, 56, 56), True, False),
    ("BatchNorm1d", BATCH, (256, 512), False, False),
    # sizes of one, which Triton makes constants of
    ("GroupNorm, odd", _axes.group(3), (5, 9), False, False),
    ("InstanceNorm, odd", _axes.instance(1), (2, 1, 33, 1), False, False),
    ("LayerNorm, odd", LAYER, (5, 1), False, False),
)


def _launches(
    axes: _axes.Axes, shape: tuple[int, ...], dtype: torch.dtype, last: bool
) -> list[Launch]:
    features = shape[-1] if axes.feature_dims else shape[1]
    x = torch.empty(shape, dtype=dtype, device="meta")
    if last:
        x = x.to(memory_format=_LAST)
    weight = torch.empty(features, device="meta")
    bias = weight if axes.centred else None

    def run() -> None:
        y, mean, var = host.forward(x, weight, bias, *axes, 1e-5)
        host.backward(y, x, mean, var, weight, *axes, 1e-5, False, 7)
        if axes == BATCH:
            host.update_running(weight, weight, None, x, mean, var, 0.1)
            host.apply(x, mean, var, weight, bias, 1e-5)
            host.backward(y, x, mean, var, weight, *axes, 1e-5, True, 7)

    return record(run)


def _response(dtype: torch.dtype) -> list[Launch]:
    x = torch.empty(32, 64, 27, 27, dtype=dtype, device="meta")

    def run() -> None:
        host.local_response_norm(x, 5, 1e-4, 0.75, 1.0)
        host.local_response_norm_backward(x, x, 5, 1e-4, 0.75, 1.0)

    return record(run)


def _access(ptx: str, what: str) -> int:
    """Bytes of the widest load or store of global memory."""
    found = re.findall(rf"{what}\.global(?:\.[\w:]+)*?(?:\.v(\d))?\.b(\d+)", ptx)
    return max((int(count or 1) * int(bits) // 8 for count, bits in found), default=0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--capability", nargs="+", type=int, default=[90])
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--quick", action="store_true", help="fewer shapes")
    args = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET"):
        parser.error("unset TRITON_INTERPRET: the interpreter compiles nothing")
    spilling = 0
    for name in args.dtype:
        dtype = getattr(torch, name)
        named = [
            (what, launch)
            for what, axes, shape, last, quick in CASES
            if quick or not args.quick
            for launch in _launches(axes, shape, dtype, last)
        ]
        named += [("LocalResponseNorm", launch) for launch in _response(dtype)]
        for capability in args.capability:
            head = "kernel, programs, tile, warps, registers, stack, bytes a load/a store"
            print(f"\n{name}, sm_{capability}: {head}")
            for what, launch in named:
                found = compile_for(launch, capability)
                tile = "x".join(
                    str(launch.arguments[key])
                    for key in ("BU", "BQ", "BC", "BK", "BP", "BN", "BLOCK")
                    if key in launch.arguments
                )
                wide = "/".join(str(_access(found.ptx, way)) for way in ("ld", "st"))
                print(
                    f"  {what:<34}{launch.kernel.__name__:<24}{launch.grid[0]:>8}{tile:>10}"
                    f"{launch.options.get('num_warps', 4):>3}{found.registers:>5}"
                    f"{found.stack:>6}  {wide:>7}",
                    flush=True,
                )
                spilling += found.stack > _SPILL
    print(f"\n{spilling} of the launches spill")
    return 1 if spilling else 0


if __name__ == "__main__":
    sys.exit(main())
