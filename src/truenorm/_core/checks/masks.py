"""Errors of masks, lengths and channel axes."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .layers import check_tensor, sizes


def check_one_of_mask_and_lengths(mask: Any, lengths: Any) -> None:
    if mask is not None and lengths is not None:
        raise ValueError(
            "`mask` and `lengths` were both given: a length is a mask of leading positions; give "
            "one of them"
        )


def check_mask(mask: Any, shapes: list[tuple[int, ...]], input: Tensor) -> None:
    check_tensor("mask", mask)
    if mask.dtype != torch.bool:
        raise TypeError(
            f"`mask` must be boolean, True where a value counts, but has dtype {mask.dtype}: "
            "convert it with mask.bool(), or invert a padding mask with ~mask"
        )
    if mask.device != input.device:
        raise RuntimeError(
            f"`mask` is on {mask.device} and `input` on {input.device}: move it with "
            "mask.to(input.device)"
        )
    fits = any(
        mask.dim() == len(shape)
        # not `in (1, s)`: the compiler's sizes are equal without being the same
        and all(m == 1 or m == s for m, s in zip(mask.shape, shape, strict=True))
        for shape in shapes
    )
    if not fits:
        allowed = " or ".join([f"{sizes(shape)}" for shape in shapes])
        raise ValueError(
            f"`mask` has shape {sizes(mask.shape)}, which does not fit `input` of shape "
            f"{sizes(input.shape)}: give one of shape {allowed}, or with 1 in place of a size"
        )


def check_lengths(lengths: Any, input: Tensor, channel_axis: int) -> None:
    check_tensor("lengths", lengths)
    positions = [s for d, s in enumerate(input.shape) if d not in (0, channel_axis % input.dim())]
    if len(positions) != 1:
        raise ValueError(
            f"`lengths` goes with inputs of one dimension of positions, but `input` has shape "
            f"{sizes(input.shape)}: give a `mask`"
        )
    if lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool:
        raise TypeError(
            f"`lengths` must be integers, but has dtype {lengths.dtype}: convert it with "
            "lengths.long()"
        )
    if lengths.shape != input.shape[:1]:
        raise ValueError(
            f"`lengths` has shape {sizes(lengths.shape)}, but `input` of shape "
            f"{sizes(input.shape)} needs one length for each sample, shape {sizes(input.shape[:1])}"
        )
    if lengths.device != input.device:
        raise RuntimeError(
            f"`lengths` is on {lengths.device} and `input` on {input.device}: move it with "
            "lengths.to(input.device)"
        )
    # on a GPU, in a graph and in a map over them nobody looks at the values
    hidden = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    if lengths.is_cpu and not hidden and lengths.numel():
        most, least = int(lengths.max()), int(lengths.min())
        if most > positions[0] or least < 0:
            wrong = most if most > positions[0] else least
            raise ValueError(
                f"`lengths` holds {wrong}, but each must be from 0 to {positions[0]}, the "
                f"positions of `input` of shape {sizes(input.shape)}"
            )


def check_no_lengths(layer: str, given: bool) -> None:
    if given:
        raise ValueError(
            f"{layer} takes no `lengths`, since it is told where its rows are by its "
            "normalized_shape alone: give a `mask` of the leading dimensions"
        )


def check_padding_value(value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(
            f"`padding_value` must be a number, but got {value!r}: it is what outputs hold where "
            "nothing is valid, 0.0 by default"
        )


def _check_alone(masked: bool) -> None:
    if masked:
        raise ValueError(
            "`input` is a nested tensor, which says its lengths itself: leave `mask` and `lengths` "
            "out"
        )


def check_nested(input: Tensor, masked: bool, channel_axis: int) -> None:
    _check_alone(masked)
    if input.layout != torch.jagged or input.dim() < 3 or getattr(input, "_ragged_idx", 1) != 1:
        raise ValueError(
            "`input` is a nested tensor, which must be of layout torch.jagged and of shape "
            f"(N, ragged, …, C), but has layout {input.layout} and {input.dim()} dimensions"
        )
    if channel_axis % input.dim() == 1:
        raise ValueError(
            f"`channel_axis` is {channel_axis}, but dimension 1 of a nested tensor `input` is the "
            "ragged one, of positions: build the layer with channel_axis=-1"
        )


def check_nested_rows(input: Any, normalized_shape: tuple[int, ...], masked: bool) -> None:
    _check_alone(masked)
    if input.layout != torch.jagged or input._ragged_idx >= input.dim() - len(normalized_shape):
        raise ValueError(
            "`input` is a nested tensor, which must be of layout torch.jagged and ragged in none "
            f"of the dimensions of normalized_shape {list(normalized_shape)}, but has layout "
            f"{input.layout} and {input.dim()} dimensions: "
            "torch.nested.as_nested_tensor(…, layout=torch.jagged)"
        )


def check_channel_axis(axis: Any) -> None:
    if isinstance(axis, bool) or not isinstance(axis, int):
        raise TypeError(
            f"`channel_axis` must be an integer, but got {axis!r}: 1 for (N, C, …), -1 for "
            "(N, …, C)"
        )


def check_channel_axis_fits(axis: int, dims: int) -> None:
    if not -dims <= axis < dims or axis % dims == 0:
        raise ValueError(
            f"`channel_axis` is {axis}, but an input of {dims} dimensions has its channels at one "
            f"of 1 to {dims - 1}, or -1 to {1 - dims}: dimension 0 is the samples"
        )


def check_unmasked(name: str, masked: bool) -> None:
    if masked:
        raise NotImplementedError(
            f"layer {name!r} is called with a `mask` or `lengths`, which recalibrate does not see: "
            "recalibrate on samples of one length at a time, without them"
        )


def check_channels_where_torch_has_them(names: Sequence[str]) -> None:
    if names:
        raise ValueError(
            f"`model` has {len(names)} layer(s) with a `channel_axis` other than 1, the first "
            f"{names[0]!r}, and torch's layers have their channels in dimension 1: transpose "
            "around it and set channel_axis=1 before revert"
        )
