"""Errors of an activation, a residual, a scale and a shift as part of a layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .layers import _shape, sizes

ACTIVATIONS = ("relu", "relu6", "leaky_relu", "elu", "gelu", "silu", "hardswish")


def check_activation(value: Any) -> None:
    if value is not None and value not in ACTIVATIONS:
        known = ", ".join(f'"{name}"' for name in ACTIVATIONS)
        raise ValueError(
            f"`activation` must be None or one of {known}, but got {value!r}: call any other one "
            "on the layer's output"
        )


def check_coefficient(name: str, activation: str) -> Callable[[Any], None]:
    """A check that the option `name` is a finite number."""

    def check(value: Any) -> None:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not math.isfinite(value):
            raise ValueError(
                f"`{name}` must be a finite number, but got {value!r}: it is the coefficient of "
                f'activation="{activation}"'
            )

    return check


def check_gelu_approximate(value: Any) -> None:
    if value not in ("none", "tanh"):
        raise ValueError(
            f'`gelu_approximate` must be "none" or "tanh", but got {value!r}: it is how '
            'activation="gelu" is computed'
        )


def check_residual(residual: Any, input: Any) -> None:
    """What is added to a layer's output, against the input, whose shape the output has."""
    if not isinstance(residual, Tensor):
        raise TypeError(
            f"`residual` must be a torch.Tensor, but got {type(residual).__name__}: pass the "
            "tensor that is added to the layer's output, or None"
        )
    if not isinstance(input, Tensor):
        return  # the layer says so
    if residual.is_nested != input.is_nested:
        raise ValueError(
            f"`residual` is {'a' if residual.is_nested else 'no'} nested tensor and `input` is "
            f"{'one' if input.is_nested else 'none'}: pass both in one form"
        )
    if input.is_nested and not (input.layout is residual.layout is torch.jagged):
        raise ValueError(
            f"`residual` is a nested tensor of layout {residual.layout}, and `input` of "
            f"{input.layout}: build both with layout=torch.jagged, on the same offsets"
        )
    if residual.shape != input.shape:
        raise ValueError(
            f"`residual` must have the shape of `input`, {sizes(input.shape)}, but got "
            f"{_shape(residual)}: project it, or expand it with residual.expand_as(input)"
        )
    if residual.device != input.device:
        raise ValueError(
            f"`residual` is on device {residual.device}, but `input` is on {input.device}: move "
            f"both to one device, e.g. residual.to({str(input.device)!r})"
        )
    # under autocast the layers before have chosen dtypes of their own
    if residual.dtype != input.dtype and not torch.is_autocast_enabled(input.device.type):
        raise ValueError(
            f"`residual` must have the dtype of `input`, {input.dtype}, but got {residual.dtype}: "
            f"pass residual.to({input.dtype})"
        )


def check_may_be_overwritten(input: Any) -> None:
    """An input of a layer with `overwrite_input=True`."""
    if not isinstance(input, Tensor) or input.is_nested:
        return  # the layer says so, or makes a copy
    if input.is_leaf and input.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(
            f"`input` {sizes(input.shape)} is a leaf that requires grad, which a layer with "
            "overwrite_input=True may not overwrite: pass input.clone(), or set "
            "layer.overwrite_input = False"
        )
    if any(step == 0 and size > 1 for step, size in zip(input.stride(), input.shape, strict=True)):
        raise RuntimeError(
            f"`input` of shape {sizes(input.shape)} and strides {input.stride()} is expanded: "
            "several of its elements are one in memory, which a layer with overwrite_input=True "
            "cannot overwrite: pass input.contiguous(), or set layer.overwrite_input = False"
        )


def check_no_activation(layers: Sequence[str], name: str, remedy: str) -> None:
    if layers:
        raise ValueError(
            f"`{name}` has {len(layers)} layer(s) with an activation, the first {layers[0]!r}: "
            f"{remedy}"
        )


def check_has_own_layers(name: str, has: bool) -> None:
    if not has:
        raise ValueError(
            f"`{name}` has no truenorm layer: call truenorm.convert({name}) first, which makes "
            "torch's normalization layers truenorm's"
        )


def check_modulation(
    name: str, t: Any, x: Tensor, features: int, fits: Callable[[Tensor, Tensor, int], bool]
) -> None:
    """A scale or shift of x's output: of x's size or 1 along each dimension, or one per sample."""
    if not isinstance(t, Tensor):
        raise TypeError(
            f"`{name}` must be a torch.Tensor, but got {type(t).__name__}: pass a tensor that "
            "norm(x) · (1 + scale) + shift takes, or None"
        )
    if not t.is_floating_point():
        raise TypeError(f"`{name}` has dtype {t.dtype}: pass {name}.float()")
    if t.device != x.device:
        raise RuntimeError(
            f"`{name}` is on device {t.device}, but the input is on {x.device}: move both to one "
            f"device, e.g. {name}.to({str(x.device)!r})"
        )
    if not fits(t, x, features):
        like = x.shape[x.dim() - features :] if features else x.shape[1:2]
        of_sample = (x.shape[0], *like)
        raise ValueError(
            f"`{name}` of {_shape(t)} does not fit an input seen as {sizes(x.shape)}: pass "
            f"{sizes(like)}, one for each sample {sizes(of_sample)}, or as many dimensions as the "
            "input, each of its size or 1"
        )


def check_no_modulation(scale: Any, shift: Any) -> None:
    for name, t in (("scale", scale), ("shift", shift)):
        if t is not None:
            raise ValueError(
                f"`{name}` must be None beside a nested tensor: pad the input "
                "(torch.nested.to_padded_tensor) and pass its lengths"
            )
