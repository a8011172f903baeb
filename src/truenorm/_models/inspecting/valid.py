"""What of a layer's input counts, where a call was given a mask or lengths."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.nn import Module

from ..._core import masks
from ...nn._options import options_of
from ...nn._padded import Padded, PaddedRows
from ..layers import BATCH, LAYER, RMS


def parts(
    module: Module, kind: str, x: Tensor, seen: Tensor, given: Mapping[str, Any]
) -> list[Tensor]:
    """`seen`, which is x as the layer sees it, without padding: a list of inputs of that form.

    A mask per channel, or per element of a row, leaves no input of that form: then all is seen.
    """
    mask, lengths = (given.get(name) for name in ("mask", "lengths"))
    if mask is None and lengths is None:
        return [seen]
    if kind in (LAYER, RMS):
        if mask is None or not isinstance(module, PaddedRows) or mask.dim() == x.dim():
            return [seen]
        return [seen[mask.expand(seen.shape[: mask.dim()])]] if mask.any() else []
    if not isinstance(module, Padded):
        return [seen]
    unbatched = module._is_unbatched(x)
    axis = options_of(module).channel_axis
    batched = x.unsqueeze(0) if unbatched else x
    valid = masks.mask_of(batched, axis, mask, lengths, 0.0, unbatched)
    if valid is None or valid.dim() == seen.dim():
        return [seen]
    if kind == BATCH:
        return [seen.movedim(1, -1)[valid].t()[None]] if valid.any() else []
    return [sample[:, here][None] for sample, here in zip(seen, valid, strict=True) if here.any()]
