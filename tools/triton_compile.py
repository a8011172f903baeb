"""Triton kernels compiled ahead of time, as launches would have them: no GPU is needed.

The host side runs on tensors without memory, and each launch is recorded instead of made;
cuobjdump, which Triton carries, tells registers and bytes of stack, where spilled registers are.
"""

from __future__ import annotations

import re
import subprocess
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

TYPES = {
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.uint8: "*u8",
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


def launch_of(kernel: Any, grid: Any, args: Any, kwargs: dict[str, Any]) -> Launch:
    """What Triton's `kernel[grid](*args, **kwargs)` asks for."""
    options = {name: kwargs[name] for name in _OPTIONS if name in kwargs}
    rest = {name: value for name, value in kwargs.items() if name not in options}
    arguments = {**dict(zip(kernel.arg_names, args, strict=False)), **rest}
    return Launch(kernel, grid, arguments, options)


def record(run: Callable[[], object]) -> list[Launch]:
    """The launches that `run` would make."""
    launches: list[Launch] = []

    def note(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launches.append(launch_of(self, grid, args, kwargs))

    original = JITFunction.run
    JITFunction.run = note  # type: ignore[method-assign]
    try:
        run()
    finally:
        JITFunction.run = original  # type: ignore[method-assign]
    return launches


def source(launch: Launch) -> ASTSource:
    """What Triton would specialize the kernel on: alignment, and sizes of one.

    A tensor without memory is as aligned as torch's allocator makes them.
    """
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[Any]] = {}
    for i, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        specialized = not parameter.do_not_specialize
        if isinstance(value, Tensor):
            signature[parameter.name] = TYPES[value.dtype]
            if value.is_meta or value.data_ptr() % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
        elif parameter.is_constexpr or value is None or (value == 1 and specialized):
            signature[parameter.name] = "constexpr"
            constants[(i,)] = value
        else:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if specialized and value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(launch.kernel, signature, constants, attributes)


def given(launch: Launch) -> list[Any]:
    """What the compiled kernel is given: the arguments that it is not specialized on."""
    names = [name for name, kind in source(launch).signature.items() if kind != "constexpr"]
    return [launch.arguments[name] for name in names]


class Compiled(NamedTuple):
    """What a kernel takes: registers, bytes of stack and of shared memory, of the widest load and
    store of global memory; and the layouts of threads in which it loads, stores and adds up tiles.
    """

    registers: int
    stack: int
    shared: int
    load: int
    store: int
    layouts: tuple[str, ...]
    sass: str

    @property
    def spills(self) -> bool:
        return self.stack > _SPILL


def _access(ptx: str, what: str) -> int:
    found = re.findall(rf"{what}\.global(?:\.[\w:]+)*?(?:\.v(\d))?\.b(\d+)", ptx)
    return max((int(count or 1) * int(bits) // 8 for count, bits in found), default=0)


def _layouts(ttgir: str) -> tuple[str, ...]:
    """Values to a thread, threads to a warp and warps by the dimensions of tiles, in the order in
    which a kernel meets them. Every reduction has the layout of what it reduces.
    """
    named = {}
    pattern = (
        r"(#blocked\d*) = #ttg\.blocked<\{sizePerThread = \[([\d, ]+)\], "
        r"threadsPerWarp = \[([\d, ]+)\], warpsPerCTA = \[([\d, ]+)\], order = \[([\d, ]+)\]"
    )
    for name, each, lanes, warps, order in re.findall(pattern, ttgir):
        sizes = ["x".join(part.split(", ")) for part in (each, lanes, warps)]
        named[name] = f"{sizes[0]} {sizes[1]} {sizes[2]} ({order[0]} first)"
    # tensor<64x32xf32, #blocked>, as a load, a store or a reduction takes it
    tile = r"tensor<\d+x\d+x[^,>]+(?:<\w+>)?, (#blocked\d*)>"
    met = [
        found
        for line in ttgir.splitlines()
        if re.search(r"tt\.(load|store) |^\s*\}\) : \(", line)
        for found in re.findall(tile, line)[:1]
    ]
    return tuple(dict.fromkeys(named[name] for name in met))


def compile_for(launch: Launch, capability: int) -> Compiled:
    """The kernel compiled and assembled for a compute capability, 80 or 90, say."""
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source(launch), target=target, options=launch.options)
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(compiled.asm["cubin"])
        said, sass = (
            subprocess.run(
                [str(cuobjdump), what, str(path)], capture_output=True, text=True, check=True
            ).stdout
            for what in ("--dump-resource-usage", "--dump-sass")
        )

    def number(name: str) -> int:
        found = re.search(rf"{name}:(\d+)", said)
        if found is None:
            raise SystemExit(f"cuobjdump does not say {name}:\n{said}")
        return int(found.group(1))

    ptx = compiled.asm["ptx"]
    return Compiled(
        number("REG"),
        number("STACK"),
        compiled.metadata.shared,
        _access(ptx, "ld"),
        _access(ptx, "st"),
        _layouts(compiled.asm["ttgir"]),
        sass,
    )
