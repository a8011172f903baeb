"""Plans (_triton/replay.py) of what operators come to on CUDA tensors, kept by the kind of a call.

A kind is all that decides what is compiled and launched: numbers, and of each tensor the sizes,
strides, dtype, device and address. The first call of one is served by the operator's kernel, which
looks at every argument, while a recorder looks on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _triton
from .._triton.config import CALLS
from . import operators

_below_autograd = torch._C._AutoDispatchBelowAutograd
_dispatch_modes = torch._C._len_torch_dispatch_stack
# what is refused here, an operator words
REFUSED = (RuntimeError, TypeError, AttributeError)
PLAIN = Tensor, torch.nn.Parameter
# kinds of calls: far more than a network has, and little memory
MOST = 1024
NEW = object()

_kernels: dict[str, Callable[..., Any]] = {}


def kernel(name: str) -> Callable[..., Any]:
    """An operator's kernel behind its checks; those of Triton are imported at the first call."""
    if name not in _kernels:
        from .._triton import host

        _kernels[name] = operators.defined.checked(name, host.KERNELS[name])
    return _kernels[name]


def kind(t: Any) -> Any:
    """All of a tensor that decides what is compiled and launched, and whether it is in order."""
    if t is None:
        return None
    # the dispatcher makes others of these before a kernel sees them
    if type(t) not in PLAIN or t.is_neg():
        raise TypeError
    at = t.data_ptr()
    # freed memory is at 0
    return t.shape, t.stride(), t.dtype, t.device, at % 16 if at else -1


def apart(given: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same, each an object of its own, by which a recorder knows it: x may be the residual."""
    apart: list[Any] = []
    for t in given:
        known = t is not None and any(t is other for other in apart)
        apart.append(t.detach() if known else t)
    return tuple(apart)


def recorder(given: tuple[Any, ...]) -> Any:
    from .._triton import replay

    return replay.Recorder(given[0].device, given)


def keep(key: Any, plan: Any) -> None:
    if len(CALLS) >= MOST:
        CALLS.clear()
    CALLS[key] = plan


def operator(
    name: str, tensors: tuple[Any, ...], numbers: tuple[Any, ...], seen: int
) -> list[Any] | None:
    """What an operator of tensors and numbers gives, with None for what is empty.

    None where this is not for a plan. seen: how many of its outputs are a caller's; those behind
    them only a backward reads.
    """
    try:
        # 0.0 and -0.0 are alike to a dictionary
        key = name, *(n.hex() if type(n) is float else n for n in numbers), *map(kind, tensors)
        plan: Any = CALLS.get(key, NEW)
        if plan is None:
            return None
        if plan is not NEW:
            return plan(*tensors)  # type: ignore[no-any-return]
        first = tensors[0]
        if _triton.why_plain(first.device.index or 0):
            return None
        serve, given = kernel(name), apart(tensors)
        from .._triton import host

        if not host.serves(first):
            return None
        with _below_autograd(), recorder(given) as recording:
            made = [t if t.numel() else None for t in serve(*given, *numbers) or ()]
        keep(key, recording.plan(made[:seen], made[seen:]))
        return made
    except REFUSED:
        return None


def serves(x: Tensor) -> bool:
    """Whether a kernel's call on this tensor may be a plan's: where nobody looks on."""
    return x.is_cuda and not _triton.WHY_NOT and not _dispatch_modes()


def run(op: Any, tensors: tuple[Any, ...], numbers: tuple[Any, ...], seen: int) -> Any:
    """What an operator gives below autograd, by a plan where that may be; see `operator`."""
    made: Any = None
    if serves(tensors[0]):
        made = operator(op._opname, tensors, numbers, seen)
    if made is None:
        with _below_autograd():
            made = op._op(*tensors, *numbers)
    return made
