"""Who serves a call: the one place that chooses.

A kernel called at once; the operator itself, which stands in a compiler's graph; the plain formula,
which torch can transform and differentiate as it likes; torch's own operators, in what is traced
for a file that runs without truenorm; or, where the input is a DTensor, each process its own part.
Whoever computes asks here, and nobody else.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.jit import _trace

from . import exporting, sharding
from .call import Call

KERNEL, GRAPH, PLAIN, STANDARD, SHARDED = range(5)

# looked up once: every call asks
_is_compiling = torch.compiler.is_compiling
_transforms_active = torch._C._are_functorch_transforms_active
_MKLDNN = torch._mkldnn  # type: ignore[attr-defined]
# what torch.jit.trace, and all that is built on it, records into; None elsewhere
_tracing_state = torch._C._get_tracing_state


def tracing() -> bool:
    """Whether torch.jit.trace is recording, for which a choice by shape or value is a constant.

    Or checks a module's trace, as it does unasked: it then runs the module as it is, and warns of
    every difference, that between truenorm's rounding and torch's too.
    """
    return _tracing_state() is not None or _trace._trace_module_map is not None


def standard() -> bool:
    """Whether the call is recorded for a file that runs without truenorm."""
    return (not _is_compiling() and tracing()) or exporting.wanted()


def transformed(*tensors: Tensor | None) -> bool:
    """Whether a function transform or forward-mode AD is at work: the plain formulas serve both."""
    return _transforms_active() or (forward_ad._current_level >= 0 and has_tangent(*tensors))


def has_tangent(*tensors: Tensor | None) -> bool:
    """Whether forward-mode AD carries a derivative of one of them."""
    if forward_ad._current_level < 0:
        return False
    return any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors)


def way_of(x: Tensor, *others: Tensor | None) -> int:
    """One of the five above, for this input; others: what else of the call is differentiated."""
    if x.layout is _MKLDNN:
        return STANDARD
    if sharding.wanted(x, *others):
        return SHARDED
    if standard():
        return STANDARD
    # empty inputs have no moments, and complex RMSNorm has no kernel
    if x.numel() == 0 or x.is_complex() or transformed(x, *others):
        return PLAIN
    return GRAPH if _is_compiling() else KERNEL


def way(call: Call) -> int:
    """One of the five above, for a whole call."""
    if call.given is not None:
        sharding.wanted(call.x, *call.given)  # which refuses what is sharded beside a plain x
    found = way_of(call.x, call.weight, call.bias, call.residual)
    if call.mask is not None and found in (KERNEL, GRAPH) and call.own_mask():
        return PLAIN
    return found
