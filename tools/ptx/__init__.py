"""A machine for PTX, the assembly that Triton compiles kernels to: no GPU is needed.

Triton's interpreter runs a kernel's Python; this runs what was compiled: which thread holds which
value, what goes by shared memory and what from lane to lane, copies that arrive late, products
that were fused, functions that are approximate. All threads of some programs step together, each
register an array with a value for each thread; those that part at a branch go on by turns, the one
that is behind first, and join again.

It is stricter than a GPU, on which these give wrong results now and then: memory that no tensor has
and addresses that are not aligned; shared memory read or written by two warps with no barrier
between; a copy that is read before it was waited for; memory that one program writes and another
reads or writes; lanes that read a lane that is not there. To write what stands there already is let
be. What is approximate errs by what the PTX manual allows, up or down as its bits have it. Shared
memory that nobody wrote is NaN.

    Program(ptx, name).run(programs, shared, arguments)

The instructions are those that kernels of truenorm use; another one is an error that names it. See
NVIDIA, Parallel Thread Execution ISA.
"""

from __future__ import annotations

from .program import Program
from .traffic import Traffic
from .values import PtxError

__all__ = ["Program", "PtxError", "Traffic"]
