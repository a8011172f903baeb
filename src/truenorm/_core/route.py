"""Who serves a call: the one place that chooses.

A kernel called at once; the operator itself, which stands in a compiler's graph; the plain formula,
which torch can transform and differentiate as it likes; torch's own operators, in what is traced
for a file that runs without truenorm, and where no kernel serves the device; or, where the input is
a DTensor, each process its own part. Whoever computes asks here, and nobody else.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.jit import _trace

from .. import _triton
from . import exporting, geometry, imports, library, sharding
from .call import Call

KERNEL, GRAPH, PLAIN, STANDARD, SHARDED, TORCH = range(6)

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


def has_kernel(x: Tensor) -> bool:
    """Whether truenorm's kernels serve x's device."""
    # x.is_cpu would be a node in a compiler's graph, and a use of what x comes from
    kind = x.device.type
    if kind == "cpu":
        return library.NATIVE is not None
    return kind == "cuda" and not _triton.why_plain(x.device.index or 0)


def lacks_kernel(x: Tensor) -> bool:
    """Whether none does, nor was the formula asked for by name."""
    kind = x.device.type
    formula = _triton.FORMULA if kind == "cuda" else library.FORMULA
    return not (formula or kind == "meta" or has_kernel(x))


# what a device is does not change under a compiler, which need not look into the question
imports.constant_in_graphs("which devices have kernels", _triton.why_plain)


def way_of(x: Tensor, *others: Tensor | None) -> int:
    """One of the first five, for this input; others: what else of the call is differentiated."""
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
    """One of the first five, for a whole call and its statistics."""
    if call.given is not None:
        sharding.wanted(call.x, *call.given)  # which refuses what is sharded beside a plain x
    found = way_of(call.x, call.weight, call.bias, call.residual)
    if call.mask is not None and found in (KERNEL, GRAPH) and call.own_mask():
        return PLAIN
    return found


def way_to_output(call: Call) -> int:
    """One of the six, for a call's output."""
    found = way(call)
    by_torch = found in (KERNEL, GRAPH) and lacks_kernel(call.x) and _by_torch(call)
    return TORCH if by_torch else found


def _by_torch(call: Call) -> bool:
    """Whether torch's operators compute this call; the formula has the rest."""
    if call.mask is not None or call.group is not None or call.by_part():
        return False
    if call.x.layout is not torch.strided or not call.x.is_floating_point():
        return False  # in the operator's words
    if call.given is None:
        return True
    # they pass no gradient through statistics that are given, and take those of one dtype
    wide = torch.promote_types(call.x.dtype, torch.float32)
    fit = all(torch.promote_types(t.dtype, wide) == wide for t in call.given)
    return fit and call.form.constant and call.form.axes == geometry.BATCH
