"""Errors of a layer or a function: its input, parameters and arguments."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def sizes(shape: Sequence[int]) -> tuple[int, ...]:
    """The numbers, which an error says: a compiler has symbols for them, and none in an index."""
    return tuple([operator.index(size) for size in shape])


def _number(value: Any) -> Any:
    return float(value) if isinstance(value, float) else value


def _shape(x: Tensor) -> str:
    return f"shape {sizes(x.shape)}"


def check_tensor(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(
            f"`{name}` must be a torch.Tensor, but got {type(value).__name__}: "
            f"convert it with torch.as_tensor(…)"
        )


def check_floating(input: Tensor, *, complex_too: bool = False) -> None:
    # of one byte: float8 and its like, which are for storage
    floating = input.is_floating_point() and input.dtype.itemsize > 1
    if not (floating or (complex_too and input.is_complex())):
        raise NotImplementedError(
            f"`input` has dtype {input.dtype}, and normalization is not implemented for it: "
            "convert it to a floating point dtype, e.g. input.float()"
        )


def check_input_dim(input: Any, allowed: Sequence[int], layer: str, shapes: str) -> None:
    check_tensor("input", input)
    if input.dim() not in allowed:
        expected = " or ".join(f"{d}D" for d in allowed)
        raise ValueError(
            f"expected {expected} input (got {input.dim()}D input): `input` of {_shape(input)} "
            f"does not fit {layer}, which takes {shapes}"
        )


def check_at_least_2d(input: Tensor, error: type[Exception]) -> None:
    if input.dim() < 2:
        raise error(
            f"Expected at least 2 dimensions for input tensor but received {input.dim()}: `input` "
            f"of {_shape(input)} needs the dimensions (N, C, …); add them with input[None]"
        )


def check_num_features(
    input: Tensor, dim: int, num_features: int, error: type[Exception], note: str = ""
) -> None:
    if input.shape[dim] != num_features:
        got = operator.index(input.shape[dim])
        raise error(
            f"expected input's size at dim={dim} to match num_features ({num_features}), but got: "
            f"{got}. `input` has {_shape(input)}{note}; build the layer with num_features={got}, "
            f"or permute the input so that its channels are at dim={dim}"
        )


def warn_num_features(input: Tensor, dim: int, num_features: int) -> None:
    """As torch, for an InstanceNorm that has nothing of that size."""
    # a graph cannot warn: torch's own breaks there
    if input.shape[dim] != num_features and not torch.compiler.is_compiling():
        warnings.warn(
            f"input's size at dim={dim} does not match num_features. "
            "You can silence this warning by not passing in num_features, "
            "which is not used because affine=False",
            stacklevel=2,
        )


def check_eps(eps: Any, layer: str, *, training: bool = False) -> None:
    if training and eps <= 0.0:
        raise ValueError(
            f"{layer} eps must be positive during training, but got {_number(eps)}: use the "
            "default 1e-5"
        )
    if eps < 0.0:
        raise ValueError(
            f"{layer} eps must be non-negative, but got {_number(eps)}: use the default 1e-5"
        )


def check_momentum(momentum: Any) -> None:
    if not 0.0 <= momentum <= 1.0:
        raise ValueError(
            f"`momentum` must be in [0, 1] or None, but got {_number(momentum)}: it is the weight "
            "of the new observation, running = (1 - momentum) * running + momentum * observed"
        )


def check_more_than_one_value(input: Tensor, count: int, *, per_sample: bool) -> None:
    if count != 1:
        return
    size = torch.Size(sizes(input.shape))
    if per_sample:
        raise ValueError(
            "Expected more than 1 spatial element when training, got input size "
            f"{size}: one value has no variance; use larger maps, or eval() with "
            "track_running_stats=True"
        )
    raise ValueError(
        "Expected more than 1 value per channel when training, got input size "
        f"{size}: one value has no variance; use a larger batch, drop the last batch "
        "(drop_last=True), or call eval()"
    )


def check_parameter(
    name: str, value: Any, input: Tensor, shape: Sequence[int], remedy: str
) -> None:
    """A weight, bias or running statistic: a tensor of this shape, on the input's device."""
    if value is None:
        return
    check_tensor(name, value)
    if value.device != input.device:
        raise RuntimeError(
            f"`{name}` is on device {value.device}, but `input` is on {input.device}: "
            f"move both to one device, e.g. layer.to({str(input.device)!r})"
        )
    if tuple(value.shape) != tuple(shape):
        raise RuntimeError(
            f"{remedy}, but got {name} of {_shape(value)} and input of {_shape(input)}"
        )


def check_per_channel(name: str, value: Any, input: Tensor) -> None:
    """A parameter or statistic with one value per channel, at dim 1."""
    if value is None:
        return
    channels = input.shape[1]
    # what is nearly always so first: a small input's call is short enough to notice the rest
    if isinstance(value, Tensor) and value.shape == (channels,) and value.device == input.device:
        return
    if isinstance(value, Tensor) and value.numel() != channels and "running" in name:
        channels = operator.index(channels)
        raise RuntimeError(
            f"{name} should contain {channels} elements not {value.numel()}: `input` of "
            f"{_shape(input)} has {channels} channels; build the layer with num_features={channels}"
        )
    check_parameter(
        name,
        value,
        input,
        (channels,),
        f"Expected {name} to be a vector of size equal to the number of channels in input",
    )


def check_both_running(running_mean: Any, running_var: Any) -> None:
    if (running_mean is None) != (running_var is None):
        missing = "running_mean" if running_mean is None else "running_var"
        raise ValueError(
            "running_mean and running_var must either both be None or neither be None: "
            f"`{missing}` is None"
        )


def check_running_constant(has_tangent: bool) -> None:
    if has_tangent:
        raise RuntimeError(
            "batch_norm is not differentiable wrt running_mean and running_var, they cannot have "
            "forward grad defined: pass them without a tangent (forward_ad.unpack_dual(t).primal)"
        )


def check_running_has_no_gradient(statistics: tuple[Any, ...] | None) -> None:
    if statistics is None or not torch.is_grad_enabled():
        return
    for name, t in zip(("running_mean", "running_var"), statistics, strict=True):
        if t.requires_grad:
            raise RuntimeError(
                f"batch_norm is not differentiable with respect to argument {name!r}. This input "
                f"cannot have requires_grad True: pass {name}.detach()"
            )


def check_running_given(running_mean: Any, flag: str) -> None:
    if running_mean is None:
        raise RuntimeError(
            f"Expected running_mean and running_var to be defined when {flag}: pass both "
            f"(running_mean must be defined in evaluation mode), or change {flag}"
        )


def check_groups(input: Tensor, num_groups: int) -> None:
    if num_groups < 1:
        raise ValueError(f"`num_groups` must be at least 1, but got {num_groups}")
    if input.shape[1] % num_groups:
        raise RuntimeError(
            "Expected number of channels in input to be divisible by num_groups, but got input of "
            f"shape {list(sizes(input.shape))} and num_groups={num_groups}: choose a divisor of "
            f"{operator.index(input.shape[1])}"
        )


def check_num_groups_divide(num_groups: int, num_channels: int) -> None:
    if num_groups < 1:
        raise ValueError(f"`num_groups` must be at least 1, but got {num_groups}")
    if num_channels % num_groups:
        raise ValueError(
            f"num_channels ({num_channels}) must be divisible by num_groups ({num_groups}): "
            f"choose a divisor of {num_channels}"
        )


def check_normalized_shape(input: Tensor, normalized_shape: Sequence[int]) -> None:
    if not normalized_shape:
        raise RuntimeError(
            "Expected normalized_shape to be at least 1-dimensional, i.e., containing at least one "
            "element, but got normalized_shape = []: name the trailing sizes to normalize over"
        )
    if tuple(input.shape[-len(normalized_shape) :]) != tuple(normalized_shape):
        wanted = ", ".join(str(s) for s in normalized_shape)
        raise RuntimeError(
            f"Given normalized_shape=[{wanted}], expected input with shape [*, {wanted}], but got "
            f"input of size {list(sizes(input.shape))}: normalized_shape must equal the input's "
            "trailing sizes"
        )


def check_elementwise(
    name: str, value: Any, input: Tensor, normalized_shape: Sequence[int]
) -> None:
    check_parameter(
        name,
        value,
        input,
        normalized_shape,
        f"Expected {name} to be of same shape as normalized_shape ({list(normalized_shape)})",
    )


def check_local_response(input: Tensor, size: Any) -> None:
    if input.dim() < 3:
        raise ValueError(
            f"Expected 3D or higher dimensionality input (got {input.dim()} dimensions): `input` "
            f"of {_shape(input)} needs the dimensions (N, C, positions …)"
        )
    if size < 1:
        raise RuntimeError(
            f"`size` (={size}) is the number of neighbouring channels and should be greater than "
            "zero"
        )


def check_tunable(input: Tensor, why_plain: str) -> None:
    """`input` is where Triton kernels can be tuned; why_plain: why none serve its device, or ""."""
    if not input.is_cuda:
        raise RuntimeError(
            f"`input` is on device {input.device}, and only CUDA kernels can be tuned: "
            "move layer and input to a GPU, e.g. input.cuda()"
        )
    if why_plain:
        raise RuntimeError(
            f"`input` is on {input.device}, which no Triton kernel serves ({why_plain}): "
            "there is nothing to tune"
        )
