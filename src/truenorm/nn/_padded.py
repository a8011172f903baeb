"""Padded inputs, and channels elsewhere than in dimension 1, for layers that take neither."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import _checks, _padding
from .._axes import Axes, rms_eps
from .._ops import Running, masked
from ._options import Configurable, More, Option


class Padded(Configurable):
    """A layer over (N, C, *positions) that takes a mask or lengths, and a channel axis."""

    channel_axis: int
    _own_options: ClassVar[dict[str, Option | None]] = {
        "channel_axis": Option(1, _checks.check_channel_axis)
    }

    def _is_unbatched(self, input: Tensor) -> bool:
        return False

    def _validated(self, input: Tensor, more: More) -> Tensor:
        """The call on (N, C, *positions), or (C, *positions), with a mask against these or None."""
        raise NotImplementedError

    def _long_way(self, input: Tensor, more: More) -> Tensor:
        if isinstance(input, Tensor) and input.is_nested:
            return self._nested(input, more)
        axis = self._truenorm_options.channel_axis
        if axis == 1 and more.mask is None and more.lengths is None:
            return self._validated(input, more)
        _checks.check_tensor("input", input)
        unbatched = self._is_unbatched(input)
        x = input.unsqueeze(0) if unbatched else input
        _checks.check_channel_axis_fits(axis, x.dim())
        axis %= x.dim()  # torch's older ONNX exporter writes a negative one as it is
        more = more._replace(mask=_padding.mask_of(x, axis, *more[:3], unbatched), lengths=None)
        # a view: channels_last memory, to the kernels
        y = self._validated(x.movedim(axis, 1), more).movedim(1, axis)
        return y.squeeze(0) if unbatched else y

    def _valid(self, input: Tensor, more: More) -> Tensor:
        """The mask against the input, where more has a mask or lengths."""
        unbatched = self._is_unbatched(input)
        x = input.unsqueeze(0) if unbatched else input
        axis = self._truenorm_options.channel_axis
        mask = _padding.mask_of(x, axis, *more[:3], unbatched)
        assert mask is not None
        valid = _padding.against(mask, x).movedim(1, axis)
        return valid.squeeze(0) if unbatched else valid

    def _by_valid(
        self, x: Tensor, mask: Tensor, axes: Axes, running: Running | None, more: More
    ) -> Tensor:
        """x (N, C, *positions), checked, by the statistics of its valid values."""
        layer: Any = self
        others = sorted(self._chosen().keys() & {"on_single", "virtual_batch_size", "renorm"})
        if running is not None and running.gathered is not None and axes.num_groups:
            others.append("accumulate")
        if running is not None and running.gathered is not None and mask.dim() == x.dim():
            others.append("accumulate and a mask per channel")
        _checks.check_no_mask_with(type(self).__name__, others)
        return _padding.normalize(
            x, mask, layer.weight, layer.bias, axes, layer.eps, more.padding_value, running
        )

    def _nested(self, input: Tensor, more: More) -> Tensor:
        """A jagged tensor, padded and cut again: each component is a sample."""
        given = more.mask is not None or more.lengths is not None
        _checks.check_nested(input, given, self._truenorm_options.channel_axis)
        offsets: Any = input.offsets()  # type: ignore[attr-defined]
        lengths = offsets.diff()
        padded = torch.nested.to_padded_tensor(input, 0.0)
        y = Padded._long_way(self, padded, more._replace(lengths=lengths))
        inside = torch.arange(padded.shape[1], device=padded.device) < lengths[:, None]
        return torch.nested.nested_tensor_from_jagged(y[inside], offsets)


class PaddedRows(Configurable):
    """A layer over trailing dimensions, that takes a mask."""

    normalized_shape: tuple[int, ...]

    def _long_way(self, input: Tensor, more: More) -> Tensor:
        if isinstance(input, Tensor) and input.is_nested:
            return self._nested(input, more)
        if more.mask is None and more.lengths is None:
            return self._validated(input, more)
        _checks.check_tensor("input", input)
        _checks.check_one_of_mask_and_lengths(more.mask, more.lengths)
        _checks.check_padding_value(more.padding_value)
        _checks.check_no_lengths(type(self).__name__, more.lengths is not None)
        mask = more.mask
        rows = tuple(input.shape[: input.dim() - len(self.normalized_shape)])
        _checks.check_mask(mask, [rows, tuple(input.shape)], input)
        assert mask is not None
        if mask.dim() == input.dim() and rows != input.shape:
            return self._by_elements(input, mask.expand(input.shape), more)
        # a row is valid or not: zeros instead, whose gradients count for nothing
        valid = self._valid(input, more)
        y = self._validated(torch.where(valid, input, 0.0), more._replace(mask=None))
        return torch.where(valid, y, more.padding_value)

    def _nested(self, input: Tensor, more: More) -> Tensor:
        """A jagged tensor: its rows are those of the values that it holds one after the other."""
        nested: Any = input
        layer: Any = self
        given = more.mask is not None or more.lengths is not None
        if input.layout == torch.strided and isinstance(self, torch.nn.LayerNorm) and not given:
            # it has no shape to speak of; torch's own operator knows its inside
            args = self.normalized_shape, layer.weight, layer.bias, layer.eps
            return torch.nn.functional.layer_norm(input, *args)
        _checks.check_nested_rows(
            nested, self.normalized_shape, more.mask is not None or more.lengths is not None
        )
        y = self._validated(nested.values(), more)
        return torch.nested.nested_tensor_from_jagged(
            y, nested.offsets(), nested.lengths(), jagged_dim=nested._ragged_idx
        )

    def _valid(self, input: Tensor, more: More) -> Tensor:
        """The mask against the input, where more has a mask."""
        mask = more.mask
        assert mask is not None
        if mask.dim() == input.dim():
            return mask.expand(input.shape)
        return mask.reshape(*mask.shape, *(1 for _ in self.normalized_shape))

    def _by_elements(self, input: Tensor, mask: Tensor, more: More) -> Tensor:
        """Statistics of each row's valid elements."""
        layer: Any = self
        self._validated(input[:0] if input.dim() > len(self.normalized_shape) else input, more)
        centred = not isinstance(self, torch.nn.RMSNorm)
        axes = Axes(1, len(self.normalized_shape), centred)
        eps = rms_eps(layer.eps, input.dtype)
        bias = getattr(layer, "bias", None)
        made = masked.normalize(input, mask, layer.weight, bias, axes, eps, more.padding_value)
        return made.y

    def _validated(self, input: Tensor, more: More) -> Tensor:
        raise NotImplementedError
