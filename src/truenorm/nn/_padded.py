"""Padded inputs, and channels elsewhere than in dimension 1, for layers that take neither."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from .._core import activation, added, checks, masks
from ._base import Arranged, Direct
from ._options import Option


class Padded(Direct):
    """A layer over (N, C, *positions) that takes a mask or lengths, and a channel axis."""

    channel_axis: int
    _own_options: ClassVar[dict[str, Option | None]] = {
        "channel_axis": Option(1, checks.check_channel_axis)
    }

    def _is_unbatched(self, input: Tensor) -> bool:
        return False

    def _arranged(
        self, input: Tensor, mask: Tensor | None, lengths: Tensor | None, padding_value: float
    ) -> Arranged:
        """As (N, C, *positions), or (C, *positions) where nothing is to be done."""
        axis = self._truenorm_options.channel_axis
        if axis == 1 and mask is None and lengths is None:
            return Arranged(input)
        checks.check_tensor("input", input)
        unbatched = self._is_unbatched(input)
        x = input.unsqueeze(0) if unbatched else input
        checks.check_channel_axis_fits(axis, x.dim())
        axis %= x.dim()  # torch's older ONNX exporter writes a negative one as it is
        valid = masks.mask_of(x, axis, mask, lengths, padding_value, unbatched)
        at = Arranged(input, valid, axis, unbatched)
        x = at.move(input)
        return at._replace(x=x, valid=None if valid is None else masks.against(valid, x))

    def _of_nested(self, input: Any, masked: bool) -> Tensor:
        """A jagged tensor, padded and cut again: each component is a sample."""
        checks.check_nested(input, masked, self._truenorm_options.channel_axis)
        offsets: Any = input.offsets()
        lengths = offsets.diff()
        padded = torch.nested.to_padded_tensor(input, 0.0)
        at = self._arranged(padded, None, lengths, 0.0)
        y = at.back(self._normalized(self._call(at.x, at.mask)._replace(mask=at.mask)))
        inside = torch.arange(padded.shape[1], device=padded.device) < lengths[:, None]
        return torch.nested.nested_tensor_from_jagged(y[inside], offsets)


_NOTHING = activation.NONE, 0.0


class PaddedRows(Direct):
    """A layer over trailing dimensions, that takes a mask."""

    normalized_shape: tuple[int, ...]

    def _of_sum(self, input: Any, other: Any, given: dict[str, Any]) -> tuple[Tensor, Tensor]:
        if not given and added.is_large(input, other) and self._act() == _NOTHING:
            found = added.at_once(input, other, self._call(input, None))
            if found is not None:
                return found
        return super()._of_sum(input, other, given)

    def _arranged(
        self, input: Tensor, mask: Tensor | None, lengths: Tensor | None, padding_value: float
    ) -> Arranged:
        if mask is None and lengths is None:
            return Arranged(input)
        checks.check_tensor("input", input)
        checks.check_one_of_mask_and_lengths(mask, lengths)
        checks.check_padding_value(padding_value)
        checks.check_no_lengths(type(self).__name__, lengths is not None)
        rows = tuple(input.shape[: input.dim() - len(self.normalized_shape)])
        checks.check_mask(mask, [rows, tuple(input.shape)], input)
        assert mask is not None
        if mask.dim() == input.dim() and rows != input.shape:
            mask = mask.expand(input.shape)
            return Arranged(input, mask, valid=mask)
        mask = mask.expand(rows).contiguous()
        return Arranged(input, mask, valid=mask.reshape(*rows, *(1 for _ in self.normalized_shape)))

    def _of_nested(self, input: Any, masked: bool) -> Tensor:
        """A jagged tensor: its rows are those of the values that it holds one after the other."""
        layer: Any = self
        if input.layout == torch.strided and isinstance(self, torch.nn.LayerNorm) and not masked:
            # it has no shape to speak of; torch's own operator knows its inside
            args = self.normalized_shape, layer.weight, layer.bias, layer.eps
            return torch.nn.functional.layer_norm(input, *args)
        checks.check_nested_rows(input, self.normalized_shape, masked)
        y = self._normalized(self._call(input.values(), None))
        return torch.nested.nested_tensor_from_jagged(
            y, input.offsets(), input.lengths(), jagged_dim=input._ragged_idx
        )
