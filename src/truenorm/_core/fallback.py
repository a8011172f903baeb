"""Torch's own operators, for devices and platforms without kernels: at torch's speed.

Two things that torch gets wrong are called in another way, at little cost. An InstanceNorm is a
GroupNorm of one channel a group, which takes a pass less, and has the right gradients where torch's
InstanceNorm does not: where the batch is 1 and the gradient channels_last. And on a CPU the means
and deviations that an operator gives back tell whether the offset has spoilt them. Then it is
called again on the distances from one of each statistic's own values, which are as small as the
deviations whatever the offset.

Functions take what they need one by one: a small input's time is all Python.
"""

from __future__ import annotations

from collections.abc import Callable
from math import isnan
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import activation, geometry, library, operators, running, standard
from .call import (
    CONSTANT,
    FEATURES,
    GROUPS,
    ONE_PLUS,
    PER_CHANNEL,
    ROUNDS,
    UNCENTRED,
    Call,
    Running,
)

# Means of up to so many deviations are torch's to take. What it makes of float32 is then off by
# 5e-6 at most, and by 3e-5 where the channels lie inside, for which it has other sums.
_FAR, _FAR_INSIDE = 30.0, 4.0

_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}
_FLOATING = torch.float32, torch.float64, torch.float16, torch.bfloat16
_PLAIN = Tensor, torch.nn.Parameter

_is_compiling = torch.compiler.is_compiling
_dispatch_modes = torch._C._len_torch_dispatch_stack
_norm_of = torch.linalg.vector_norm

Triple = tuple[Tensor, Any, Any]


def norm(call: Call) -> Tensor:
    """A call's output; x's own statistics move `running`."""
    groups, features, centred, *_ = call.form.axes
    rest = 0 if features else groups, features, centred, call.form.eps, call.given, call.running
    return standard.finished(call, lambda weight, bias: _normalized(call.x, weight, bias, *rest))


def shortly(
    x: Tensor, weight: Any, bias: Any, form: int, eps: float, statistics: tuple[Any, ...],
    after: tuple[Any, ...] | None,
) -> Tensor | None:  # fmt: skip
    """What `eager.call` is asked for; None where this is not for it, or not in order."""
    if library.FORMULA or (after is not None and (len(after) == 5 or after[0] is not None)):
        return None
    if operators.within_backward():
        # what is computed again knows of its running statistics on the long way alone
        return None
    try:
        return _shortly(x, weight, bias, form, eps, statistics, after)
    # what is refused here, the long way words
    except (RuntimeError, TypeError, AttributeError):
        return None


def _shortly(
    x: Tensor, weight: Any, bias: Any, form: int, eps: float, statistics: tuple[Any, ...],
    after: tuple[Any, ...] | None,
) -> Tensor | None:  # fmt: skip
    numel, given, moving = x.numel(), None, None
    if statistics and (statistics[0].requires_grad or statistics[1].requires_grad):
        return None
    plain = x.dtype in _FLOATING and x.layout is torch.strided
    if not (numel and plain) or form & (ROUNDS | ONE_PLUS):
        return None
    features, groups = form >> FEATURES & 0xFF, 0
    if features and form >> GROUPS:
        return None
    if not features:
        if x.dim() < 2:
            return None
        channels = x.shape[1]
        groups = channels if form & PER_CHANNEL else form >> GROUPS
        if (groups and channels % groups) or (
            not form & CONSTANT and numel == (x.shape[0] * groups or channels)
        ):
            return None
        for t in (weight, bias, *statistics[:2]):
            # torch's operators read as many as there are channels
            if t is not None and not (t.numel() == channels and t.dim() == 1 and t.is_cpu):
                return None
    if form & CONSTANT:
        given = statistics
    elif statistics:
        momentum = None if isnan(statistics[3]) else statistics[3]
        mean, var, count = statistics[:3]
        moving = Running(mean, var, count, momentum)
    y = _normalized(x, weight, bias, groups, features, not form & UNCENTRED, eps, given, moving)
    return y if after is None else activation.act(y, *after[1:])


def _normalized(
    x: Tensor, weight: Any, bias: Any, groups: int, features: int, centred: bool, eps: float,
    given: Any, moving: Running | None,
) -> Tensor:  # fmt: skip
    dtype = x.dtype
    if groups and groups == x.shape[1] and x.shape[0] == 1 and _has_channels_inside(x):
        # the statistics of one sample's channels, which stay inside, are those of a batch
        groups = 0
    by_channel = moving is not None or not (features or groups)
    if weight is None and bias is not None and not by_channel:
        # alone torch's LayerNorm has no second derivatives of it, and its GroupNorm no first
        weight = torch.ones_like(bias)
    f = _fitted(x, weight, bias, by_channel, centred)
    if given is not None:
        mean, var = (t.detach().to(_wide(x)) for t in given)
        if torch.is_grad_enabled():
            # torch's backward reads them, which may have moved by then
            mean, var = mean.clone(), var.clone()
        y = torch.batch_norm(*f, mean, var, False, 0.0, eps, torch.backends.cudnn.enabled)
    elif features:
        y = _of_features(*f, features, centred, eps)
    elif groups and moving is not None:
        y = _of_channels(f, eps, moving)
    elif not groups:
        y = _of_batch(f, eps, moving)
    else:
        y = _of_groups(f, groups, eps)
    # autocast has some of them give float32
    return y if y.dtype is dtype else y.to(dtype)


def local_response_norm(x: Tensor, *window: Any) -> Tensor:
    # torch's own has no half precision of some ranks, and rounds every step of it
    return F.local_response_norm(x.to(_wide(x)), *window).to(x.dtype)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _fitted(x: Tensor, weight: Any, bias: Any, by_channel: bool, centred: bool) -> Triple:
    """An input and its parameters in dtypes that an operator takes together, none rounded."""
    dtype = x.dtype
    alike = (weight is None or weight.dtype is dtype) and (bias is None or bias.dtype is dtype)
    wide = _wide(x)
    if alike and (dtype is wide or not by_channel):
        return x, weight, bias
    if by_channel:
        # half precision goes with wide statistics, and those with wide parameters
        x = x if x.is_cpu or x.is_cuda else x.to(wide)
    elif weight is None or not (x.is_cpu and centred):
        x = x.to(wide)
    weight, bias = (None if t is None else t.to(wide) for t in (weight, bias))
    return x, weight, bias


# ---------------------------------------------------------------- offsets


def _looks(x: Tensor) -> bool:
    """Whether to look at what an operator makes of an offset: where nobody waits for the answer."""
    return (
        x.is_cpu
        and x.dtype is torch.float32
        and not (_is_compiling() or _dispatch_modes())
        and type(x) in _PLAIN
    )


def _is_far(mean: Tensor, rstd: Tensor, limit: float) -> bool:
    return bool(_norm_of(mean * rstd, torch.inf).item() > limit)


def _has_channels_inside(x: Tensor) -> bool:
    """Whether torch's operators read x with the channels inside."""
    memory_format = None if x.is_contiguous() else _FORMATS.get(x.dim())
    return memory_format is not None and x.is_contiguous(memory_format=memory_format)


def _as_taken(x: Tensor) -> tuple[Tensor, bool]:
    """x as torch's operators read it, and whether they read it with the channels inside."""
    if not _has_channels_inside(x):
        return x.contiguous(), False
    if x.stride(0) * x.shape[0] != x.numel():
        # of one sample: torch goes by the strides of sizes of 1 too, and its gradients are wrong
        last = x.movedim(1, -1)
        x = last.reshape(-1, x.shape[1]).view(last.shape).movedim(-1, 1)
    return x, True


def _corner(x: Tensor, leading: tuple[Any, ...], dims: int) -> Tensor:
    """One value of each statistic, which is a constant: x[leading, :1, ...], of so many."""
    at = *leading, *(slice(1),) * dims
    return x.detach()[at]


# ---------------------------------------------------------------- the operators


def _of_features(x: Tensor, weight: Any, bias: Any, dims: int, centred: bool, eps: float) -> Tensor:
    shape = x.shape[-dims:] if weight is None else weight.shape
    if not centred:
        y = torch.rms_norm(x, shape, weight, eps)
        return y if bias is None else y + bias
    if not _looks(x):
        return torch.layer_norm(x, shape, weight, bias, eps)
    y, mean, rstd = torch.native_layer_norm(x, shape, weight, bias, eps)
    if _is_far(mean, rstd, _FAR):
        first = _corner(x, (...,), dims)
        y = torch.layer_norm(x - first, shape, weight, bias, eps)
    return y


def _of_groups(f: Triple, groups: int, eps: float) -> Tensor:
    x, weight, bias = f
    n, c = x.shape[:2]
    # of one channel a group torch's layer makes x contiguous, which its sums are more exact for
    v, inside = (x.contiguous(), False) if groups == c else _as_taken(x)
    if not _looks(x):
        return torch.group_norm(v, groups, weight, bias, eps, torch.backends.cudnn.enabled)
    # unlike torch.group_norm, it takes what it is given as contiguous
    weight, bias = (None if t is None else t.contiguous() for t in (weight, bias))
    sizes = n, c, x.numel() // (n * c), groups
    y, mean, rstd = torch.native_group_norm(v, weight, bias, *sizes, eps)
    if mean.requires_grad:
        mean, rstd = mean.detach(), rstd.detach()
    if _is_far(mean, rstd, _FAR_INSIDE if inside else _FAR):
        first = _corner(x, (slice(None), slice(None, None, c // groups)), x.dim() - 2)
        v = v - first.repeat_interleave(c // groups, 1)
        y = torch.group_norm(v, groups, weight, bias, eps)
    return y


def _of_batch(f: Triple, eps: float, moving: Running | None) -> Tensor:
    x = f[0]
    if moving is None:
        return _by_torch(f, eps)[0]
    if not _moved_by_torch(moving, x):
        y, own_mean, own_var = _by_torch(f, eps, 1.0, lambda: _nothing(x, x.shape[1]))
        _move(moving, own_mean, own_var, x.numel() // x.shape[1])
        return y
    mean, var, count, momentum, *_ = moving
    assert momentum is not None
    again = operators.within_backward()
    if x.is_cpu:
        # of a call's own: what a node holds is not to change before its backward
        y, *new = _by_torch(f, eps, momentum, lambda: (mean.clone(), var.clone()))
        if not again:
            mean.copy_(new[0])
            var.copy_(new[1])
    else:
        # what is computed again has the same node, and moves nothing
        moved = (mean.clone(), var.clone()) if again else (mean, var)
        y = torch.batch_norm(*f, *moved, True, momentum, eps, torch.backends.cudnn.enabled)
    if count is not None and not again:
        count.add_(1)
    return y


def _of_channels(f: Triple, eps: float, moving: Running) -> Tensor:
    """An InstanceNorm whose running statistics move: a batch of one with the samples' channels."""
    x, weight, bias = f
    n, c, values = geometry.ncs(x.shape, geometry.BATCH)
    if _is_compiling():
        # torch's own leaves the number of samples open
        mean, var = _nothing(x, c)
        rest = weight, bias, mean, var, True, 1.0, eps, torch.backends.cudnn.enabled
        y = torch.instance_norm(x, *rest)
        _move(moving, mean, var, values)
        return y
    weight, bias = (None if t is None else t.repeat(n) for t in (weight, bias))
    flat = x.reshape(1, n * c, values), weight, bias
    y, mean, var = _by_torch(flat, eps, 1.0, lambda: _nothing(x, n * c))
    _move(moving, mean, var, values)
    return y.view(x.shape)


def _nothing(x: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Statistics that a momentum of 1 has forgotten."""
    mean, var = x.new_zeros((2, size), dtype=_wide(x))
    return mean, var


def _by_torch(
    f: Triple, eps: float, momentum: float = 0.0,
    fresh: Callable[[], tuple[Tensor, Tensor]] | None = None,
) -> tuple[Tensor, Any, Any]:  # fmt: skip
    """Each channel by its own statistics over the batch; where `fresh` running ones move to."""
    x, weight, bias = f
    mean, var = (None, None) if fresh is None else fresh()
    if not x.is_cpu or _is_compiling():
        rest = True, momentum, eps, torch.backends.cudnn.enabled
        return torch.batch_norm(x, weight, bias, mean, var, *rest), mean, var
    v, inside = _as_taken(x)
    as_one = x.shape[0] == 1 and not inside
    if as_one:
        # torch goes by the strides of sizes of 1 in the gradient that comes, too
        v = v.view(1, x.shape[1], -1)
    y, own, rstd = torch.native_batch_norm(v, weight, bias, mean, var, True, momentum, eps)
    if _looks(x) and _is_far(own, rstd, _FAR_INSIDE if inside else _FAR):
        first = _corner(v, (slice(1), slice(None)), v.dim() - 2)
        if fresh is not None:
            mean, var = fresh()
            mean = mean - first.flatten()
        y = torch.native_batch_norm(v - first, weight, bias, mean, var, True, momentum, eps)[0]
        mean = None if mean is None else mean + first.flatten()
    return y.view(x.shape) if as_one else y, mean, var


# ---------------------------------------------------------------- running statistics


def _moved_by_torch(moving: Running, x: Tensor) -> bool:
    """Whether torch's own norm moves these statistics as this layer does."""
    return not _is_compiling() and standard.moved_by_torch(moving) and _are_wide(moving, x)


def _are_wide(moving: Running, x: Tensor) -> bool:
    wide = _wide(x)
    return moving.mean.dtype is wide and moving.var.dtype is wide


def _move(moving: Running, mean: Tensor, var: Tensor, values: int) -> None:
    """Towards observed ones; var: unbiased; values: of each of them."""
    direct = mean.is_cpu and not _is_compiling() and moving.gathered is None and values > 1
    if direct and moving.mean.numel() == mean.numel() and _are_wide(moving, mean):
        if not operators.within_backward():
            _move_directly(moving, mean, var)
        return
    record = torch.stack([mean, var * ((values - 1) / values), torch.full_like(mean, values)])
    running.move(moving, record.to(operators.statistic_dtype(mean)))


def _move_directly(moving: Running, mean: Tensor, var: Tensor) -> None:
    count, factor = moving.num_batches_tracked, moving.momentum
    if moving.skip_nonfinite and not (mean + var).isfinite().all().item():
        return
    if factor is None:
        assert count is not None
        factor = 1.0 / (count.item() + 1.0)
    moving.mean.lerp_(mean, factor)
    moving.var.lerp_(var, factor)
    if count is not None:
        count.add_(1)
