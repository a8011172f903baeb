"""Triton kernels compiled for a GPU, and run without one: on the machine of tools/ptx.

`compiled(capability)` has every launch compiled as it would be on that GPU, for its tensors as they
are, and its PTX carried out on their memory, which is the CPU's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ptx
import triton
import triton_compile
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

# by source, options and capability: (program, bytes of shared memory)
PROGRAMS: dict[Any, tuple[ptx.Program, int]] = {}
# by the text of a kernel, another one that is run in its place
INSTEAD: dict[str, ptx.Program] = {}


def program_of(launch: triton_compile.Launch, capability: int) -> tuple[ptx.Program, int]:
    """The launch's kernel, and the bytes of shared memory that it asks for."""
    source = triton_compile.source(launch)
    # a kernel of a test's own may leave the choice to Triton
    options = {"enable_fp_fusion": True, **launch.options}
    key = source.hash(), tuple(sorted(options.items())), capability
    if key not in PROGRAMS:
        made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        # an assembler that is told not to does not fuse either
        contract = options["enable_fp_fusion"]
        parsed = ptx.Program(made.asm["ptx"], launch.kernel.__name__, contract=contract)
        PROGRAMS[key] = parsed, made.metadata.shared
    return PROGRAMS[key]


@contextmanager
def compiled(
    capability: int, look: Callable[..., None] | None = None, least: int = 0
) -> Iterator[None]:
    """look: is told of each launch, and what it moved (launch, memory, traffic).
    least: bytes of a tensor whose accesses count in that.
    """

    def launched(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launch = triton_compile.launch_of(self, grid, args, kwargs)
        made, shared = program_of(launch, capability)
        made = INSTEAD.get(made.ptx, made)
        traffic = ptx.Traffic(least) if look else None
        memory = made.run(grid[0], shared, triton_compile.given(launch), traffic)
        if look:
            look(launch, memory, traffic)

    original = JITFunction.run
    JITFunction.run = launched  # type: ignore[method-assign]
    try:
        yield
    finally:
        JITFunction.run = original  # type: ignore[method-assign]
