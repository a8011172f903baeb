"""The error of torch's kernel and of truenorm's on the most difficult values of an input."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from ... import functional as ours
from ..._core import geometry, plain
from ..._core.call import Form
from ..._core.geometry import Axes
from ..layers import BATCH, GROUP, INSTANCE, LAYER, View, eps_of, trailing, uses_running

# enough to show an error, and little beside a model's own work
VALUES, CHANNELS, SAMPLES = 2**14, 4, 2
# a sample of GroupNorm up to this size is taken with all its groups
WHOLE = 2**16


def kernel_errors(
    module: Module, kind: str, seen: View, offset: Tensor
) -> tuple[float | None, float | None]:
    """(torch's, truenorm's) largest error against float64, in standard deviations.

    Of the output before weight and bias, on the channels, group or rows with the largest offset,
    in the input's dtype and memory format. None where a library refuses the input.

    offset: |mean| / std, one per channel, per sample and channel, or per row.
    """
    if seen.axes is None or not bool(offset.isfinite().any()):
        return None, None
    part, channels = _part(module, kind, seen.x, offset)
    running: tuple[Any, Any] = (None, None)
    if uses_running(module, kind):
        running = tuple(getattr(module, n)[channels] for n in ("running_mean", "running_var"))
    axes = _own_axes(kind, seen, part)
    eps, wide = eps_of(module, part.dtype), part.double()
    if running[0] is not None:
        axes, given = geometry.BATCH, running
    else:
        given = None
    exact, _ = plain.norm(wide, None, None, None, None, given, Form(axes, eps))
    if not bool(exact.isfinite().all()):
        return None, None
    # where the running statistics are not the data's, the output is larger than one deviation
    size = max(1.0, exact.square().mean().sqrt().item())
    errors: list[float | None] = []
    for library in (torch.nn.functional, ours):
        try:
            y = _call(library, kind, part, axes, running, eps)
            errors.append((y.double() - exact).abs().max().item() / size)
        except (RuntimeError, ValueError, NotImplementedError):
            errors.append(None)
    return errors[0], errors[1]


def _own_axes(kind: str, seen: View, part: Tensor) -> Axes:
    assert seen.axes is not None
    if kind == INSTANCE:
        return geometry.instance(part.shape[1])
    if kind == GROUP and part.shape[1] < seen.x.shape[1]:
        return geometry.group(1)
    return seen.axes


def _call(
    library: Any, kind: str, part: Tensor, axes: Axes, running: tuple[Any, Any], eps: float
) -> Tensor:
    own = running[0] is None
    if kind == BATCH:
        y = library.batch_norm(part, *running, None, None, own, 0.0, eps)
    elif kind == INSTANCE:
        y = library.instance_norm(part, *running, None, None, own, 0.0, eps)
    elif kind == GROUP:
        y = library.group_norm(part, axes.num_groups, eps=eps)
    elif kind == LAYER:
        y = library.layer_norm(part, part.shape[1:], eps=eps)
    else:
        y = library.rms_norm(part, part.shape[1:], eps=eps)
    assert isinstance(y, Tensor)
    return y


def _groups(module: Module) -> int:
    return int(getattr(module, "num_groups"))  # noqa: B009  (a Module's attributes are untyped)


def _most(offset: Tensor, count: int) -> Tensor:
    """Where the largest are, in order."""
    finite = offset.nan_to_num(0.0, 0.0)
    return finite.topk(max(1, min(count, offset.numel()))).indices.sort().values


def _like(part: Tensor, x: Tensor) -> Tensor:
    if x.dim() in (4, 5) and not x.is_contiguous() and x.stride(1) == 1:
        last = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
        return part.contiguous(memory_format=last)
    return part.contiguous()


def _part(module: Module, kind: str, x: Tensor, offset: Tensor) -> tuple[Tensor, Any]:
    """The part of the input with the largest offsets, laid out as the input is; its channels."""
    if kind not in (BATCH, INSTANCE, GROUP):
        rows = x.reshape(-1, *x.shape[x.dim() - trailing(module) :])
        return rows[_most(offset, VALUES // rows[0].numel())], None
    positions = x[0, 0].numel()
    if kind == BATCH:
        n = min(x.shape[0], max(2, VALUES // positions))
        channels = _most(offset, min(CHANNELS, VALUES // (n * positions)))
        return _like(x[:n, channels], x), channels
    samples = _most(offset.amax(1), SAMPLES)
    nearest = offset[samples].amax(0)
    if kind == INSTANCE:
        channels = _most(nearest, CHANNELS)
        return _like(x[samples][:, channels], x), channels
    if x[0].numel() <= WHOLE:
        return _like(x[samples[:1]], x), None
    size = x.shape[1] // _groups(module)
    first = int(nearest.argmax()) // size * size
    return _like(x[samples, first : first + size], x), None
