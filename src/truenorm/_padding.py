"""What a mask or lengths make of a call: a mask of x (N, C, *positions), and the result by it."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _checks, _ops
from ._axes import Axes
from ._ops import Running, masked, sharding


def normalize(
    x: Tensor,
    mask: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    axes: Axes,
    eps: float,
    padding_value: float,
    running: Running | None = None,
) -> Tensor:
    """x (N, C, *positions) by the statistics of its valid values, which move running ones."""
    if sharding.wanted(x, weight, bias):
        from ._ops import sharded  # which imports this module's own

        moving = sharded.whole_running(running)
        rest = axes, eps, padding_value, moving
        return sharded.by_mask(normalize, x, mask, (weight, bias), *rest)
    if x.dim() > 3 and not _in_order(x):
        x = x.contiguous()
    made = masked.normalize(x, mask, weight, bias, axes, eps, padding_value)
    if running is not None:
        masked.track(running, x, made, per_channel=mask.dim() == x.dim())
    return made.y


def _in_order(x: Tensor) -> bool:
    """Whether positions lie in memory as the dimensions say, as those of a mask do."""
    steps = [stride for stride, size in zip(x.stride()[2:], x.shape[2:], strict=True) if size != 1]
    return all(outer >= inner for outer, inner in zip(steps, steps[1:], strict=False))


def mask_of(
    x: Tensor,
    axis: int,
    mask: Tensor | None,
    lengths: Tensor | None,
    padding_value: float,
    unbatched: bool = False,
) -> Tensor | None:
    """True where a value counts: (N, *positions), or (N, C, *positions) for a mask per channel."""
    _checks.check_one_of_mask_and_lengths(mask, lengths)
    _checks.check_padding_value(padding_value)
    if lengths is not None:
        lengths = lengths[None] if unbatched and isinstance(lengths, Tensor) else lengths
        _checks.check_lengths(lengths, x, axis)
        (size,) = (s for d, s in enumerate(x.shape) if d not in (0, axis % x.dim()))
        return torch.arange(size, device=x.device) < lengths[:, None]
    if mask is None:
        return None
    if unbatched and isinstance(mask, Tensor):
        mask = mask[None]
    full = tuple(x.shape)
    positions = full[: axis % x.dim()] + full[axis % x.dim() + 1 :]
    _checks.check_mask(mask, [positions, full], x)
    if mask.dim() == len(full):
        mask = mask.movedim(axis, 1)
        if mask.shape[1] == 1:
            mask = mask[:, 0]
        else:
            return mask.expand(x.movedim(axis, 1).shape)
    return mask.expand(positions).contiguous()


def fixed(
    x: Tensor,
    mask: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    padding_value: float,
) -> Tensor:
    """x by given statistics, padding_value where nothing is valid: nothing there is read."""
    if sharding.wanted(x, mean, var, weight, bias):
        from ._ops import sharded

        return sharded.by_mask(fixed, x, mask, (mean, var, weight, bias), eps, padding_value)
    valid = against(mask, x)
    kept = torch.where(valid, x, 0.0)
    y = _ops.normalize_fixed(kept, mean, var, weight, bias, eps)
    return torch.where(valid, y, padding_value)


def against(mask: Tensor, x: Tensor) -> Tensor:
    """The mask against x (N, C, *positions)."""
    return mask if mask.dim() == x.dim() else mask.unsqueeze(1)
