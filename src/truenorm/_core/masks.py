"""What a mask or lengths make of a call: a mask of x (N, C, *positions)."""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks


def mask_of(
    x: Tensor,
    axis: int,
    mask: Tensor | None,
    lengths: Tensor | None,
    padding_value: float,
    unbatched: bool = False,
) -> Tensor | None:
    """True where a value counts: (N, *positions), or (N, C, *positions) for a mask per channel."""
    checks.check_one_of_mask_and_lengths(mask, lengths)
    checks.check_padding_value(padding_value)
    if lengths is not None:
        lengths = lengths[None] if unbatched and isinstance(lengths, Tensor) else lengths
        checks.check_lengths(lengths, x, axis)
        (size,) = (s for d, s in enumerate(x.shape) if d not in (0, axis % x.dim()))
        return torch.arange(size, device=x.device) < lengths[:, None]
    if mask is None:
        return None
    if unbatched and isinstance(mask, Tensor):
        mask = mask[None]
    full = tuple(x.shape)
    positions = full[: axis % x.dim()] + full[axis % x.dim() + 1 :]
    checks.check_mask(mask, [positions, full], x)
    if mask.dim() == len(full):
        mask = mask.movedim(axis, 1)
        if mask.shape[1] == 1:
            mask = mask[:, 0]
        else:
            return mask.expand(x.movedim(axis, 1).shape)
    return mask.expand(positions).contiguous()


def against(mask: Tensor, x: Tensor) -> Tensor:
    """The mask against x (N, C, *positions)."""
    return mask if mask.dim() == x.dim() else mask.unsqueeze(1)
