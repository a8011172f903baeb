"""Every formula, forward and backward, in plain PyTorch float64, to be read and checked on paper.

These are the oracle of the test suite: each layer is written out on its own, and nothing here is
shared with the code that it judges. All results are float64; inputs of any floating dtype.

The backward functions return the gradients of (input, weight, bias) for an output gradient. With
x̂ = (x − mean) / sqrt(var + eps), n values per statistic, and g the gradient of x̂:

    grad_input = (g − mean(g) − x̂ · mean(g · x̂)) / sqrt(var + eps)

where the two means are taken over the values that share the statistic.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "batch_norm",
    "batch_norm_backward",
    "group_norm",
    "group_norm_backward",
    "instance_norm",
    "instance_norm_backward",
    "layer_norm",
    "layer_norm_backward",
    "local_response_norm",
    "local_response_norm_backward",
    "rms_norm",
    "rms_norm_backward",
    "running_update",
]


class Gradients(NamedTuple):
    """Gradients of one layer, float64; None for a parameter that the layer does not have."""

    input: Tensor
    weight: Tensor | None
    bias: Tensor | None


def _f64(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.detach().to(torch.float64)


def _channels(p: Tensor | None, like: Tensor, absent: float) -> Tensor:
    """A (C,) parameter against (N, C, *); `absent` stands for a missing one."""
    if p is None:
        return torch.tensor(absent, dtype=torch.float64)
    return p.detach().to(torch.float64).view(1, -1, *[1] * (like.dim() - 2))


def _mean_and_var(x: Tensor, dims: list[int]) -> tuple[Tensor, Tensor]:
    # two passes: the sum of squares is taken about the mean, never about zero
    mean = x.mean(dims, keepdim=True)
    mean = mean + (x - mean).mean(dims, keepdim=True)
    return mean, ((x - mean) ** 2).mean(dims, keepdim=True)


def _input_gradient(g: Tensor, x_hat: Tensor, rstd: Tensor, dims: list[int]) -> Tensor:
    along_mean = g.mean(dims, keepdim=True)
    along_x_hat = (g * x_hat).mean(dims, keepdim=True)
    return (g - along_mean - x_hat * along_x_hat) * rstd


def _batch_dims(x: Tensor) -> list[int]:
    return [0, *range(2, x.dim())]


def batch_norm(
    x: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = True,
    eps: float = 1e-5,
) -> Tensor:
    """y = (x − mean) / sqrt(var + eps) · weight + bias, mean and var per channel of (N, C, *).

    training: over the N samples and all positions; else the running statistics.
    """
    x = x.detach().to(torch.float64)
    if training:
        mean, var = _mean_and_var(x, _batch_dims(x))
    else:
        mean, var = _channels(running_mean, x, 0.0), _channels(running_var, x, 1.0)
    x_hat = (x - mean) / torch.sqrt(var + eps)
    return x_hat * _channels(weight, x, 1.0) + _channels(bias, x, 0.0)


def batch_norm_backward(
    grad: Tensor,
    x: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = True,
    eps: float = 1e-5,
) -> Gradients:
    """Gradients of `batch_norm`; with running statistics the input's is grad · weight / std."""
    x, grad = x.detach().to(torch.float64), grad.detach().to(torch.float64)
    dims = _batch_dims(x)
    if training:
        mean, var = _mean_and_var(x, dims)
    else:
        mean, var = _channels(running_mean, x, 0.0), _channels(running_var, x, 1.0)
    rstd = 1.0 / torch.sqrt(var + eps)
    x_hat = (x - mean) * rstd
    g = grad * _channels(weight, x, 1.0)
    return Gradients(
        _input_gradient(g, x_hat, rstd, dims) if training else g * rstd,
        None if weight is None else (grad * x_hat).sum(dims),
        None if bias is None else grad.sum(dims),
    )


def instance_norm(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """y = (x − mean) / sqrt(var + eps) · weight + bias, mean and var per sample and channel."""
    x = x.detach().to(torch.float64)
    mean, var = _mean_and_var(x, list(range(2, x.dim())))
    x_hat = (x - mean) / torch.sqrt(var + eps)
    return x_hat * _channels(weight, x, 1.0) + _channels(bias, x, 0.0)


def instance_norm_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Gradients:
    """Gradients of `instance_norm`; those of weight and bias sum over samples and positions."""
    x, grad = x.detach().to(torch.float64), grad.detach().to(torch.float64)
    dims = list(range(2, x.dim()))
    mean, var = _mean_and_var(x, dims)
    rstd = 1.0 / torch.sqrt(var + eps)
    x_hat = (x - mean) * rstd
    return Gradients(
        _input_gradient(grad * _channels(weight, x, 1.0), x_hat, rstd, dims),
        None if weight is None else (grad * x_hat).sum(_batch_dims(x)),
        None if bias is None else grad.sum(_batch_dims(x)),
    )


def _groups(x: Tensor, num_groups: int) -> Tensor:
    """(N, C, *) as (N, num_groups, values of a group)."""
    return x.reshape(x.shape[0], num_groups, -1)


def group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """y = (x − mean) / sqrt(var + eps) · weight + bias, mean and var per sample and group.

    A group is num_channels / num_groups neighbouring channels with all their positions.
    """
    x = x.detach().to(torch.float64)
    grouped = _groups(x, num_groups)
    mean, var = _mean_and_var(grouped, [2])
    x_hat = ((grouped - mean) / torch.sqrt(var + eps)).reshape(x.shape)
    return x_hat * _channels(weight, x, 1.0) + _channels(bias, x, 0.0)


def group_norm_backward(
    grad: Tensor,
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Gradients:
    """Gradients of `group_norm`."""
    x, grad = x.detach().to(torch.float64), grad.detach().to(torch.float64)
    grouped = _groups(x, num_groups)
    mean, var = _mean_and_var(grouped, [2])
    rstd = 1.0 / torch.sqrt(var + eps)
    x_hat = (grouped - mean) * rstd
    g = _groups(grad * _channels(weight, x, 1.0), num_groups)
    return Gradients(
        _input_gradient(g, x_hat, rstd, [2]).reshape(x.shape),
        None if weight is None else (grad * x_hat.reshape(x.shape)).sum(_batch_dims(x)),
        None if bias is None else grad.sum(_batch_dims(x)),
    )


def _trailing(x: Tensor, normalized_shape: Sequence[int]) -> list[int]:
    return list(range(x.dim() - len(normalized_shape), x.dim()))


def _leading(x: Tensor, normalized_shape: Sequence[int]) -> list[int]:
    return list(range(x.dim() - len(normalized_shape)))


def _sum_leading(values: Tensor, normalized_shape: Sequence[int]) -> Tensor:
    leading = _leading(values, normalized_shape)
    return values.sum(leading) if leading else values


def layer_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """y = (x − mean) / sqrt(var + eps) · weight + bias, over the trailing dimensions."""
    x, w, b = x.detach().to(torch.float64), _f64(weight), _f64(bias)
    mean, var = _mean_and_var(x, _trailing(x, normalized_shape))
    y = (x - mean) / torch.sqrt(var + eps)
    y = y if w is None else y * w
    return y if b is None else y + b


def layer_norm_backward(
    grad: Tensor,
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Gradients:
    """Gradients of `layer_norm`; those of weight and bias sum over the leading dimensions."""
    x, grad, w = x.detach().to(torch.float64), grad.detach().to(torch.float64), _f64(weight)
    dims = _trailing(x, normalized_shape)
    mean, var = _mean_and_var(x, dims)
    rstd = 1.0 / torch.sqrt(var + eps)
    x_hat = (x - mean) * rstd
    return Gradients(
        _input_gradient(grad if w is None else grad * w, x_hat, rstd, dims),
        None if w is None else _sum_leading(grad * x_hat, normalized_shape),
        None if bias is None else _sum_leading(grad, normalized_shape),
    )


def _rms_eps(x: Tensor) -> float:
    half = x.dtype in (torch.float16, torch.bfloat16)
    return torch.finfo(torch.float32 if half else x.dtype).eps


def rms_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    """y = x / sqrt(mean(x²) + eps) · weight, over the trailing dimensions.

    eps None is the machine epsilon of x's dtype, and float32's for half precision.
    """
    eps = _rms_eps(x) if eps is None else eps
    x, w = x.detach().to(torch.float64), _f64(weight)
    mean_square = (x**2).mean(_trailing(x, normalized_shape), keepdim=True)
    y = x / torch.sqrt(mean_square + eps)
    return y if w is None else y * w


def rms_norm_backward(
    grad: Tensor,
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Gradients:
    """Gradients of `rms_norm`: (g − x̂ · mean(g · x̂)) / rms, without the mean of g."""
    eps = _rms_eps(x) if eps is None else eps
    x, grad, w = x.detach().to(torch.float64), grad.detach().to(torch.float64), _f64(weight)
    dims = _trailing(x, normalized_shape)
    rstd = 1.0 / torch.sqrt((x**2).mean(dims, keepdim=True) + eps)
    x_hat = x * rstd
    g = grad if w is None else grad * w
    return Gradients(
        (g - x_hat * (g * x_hat).mean(dims, keepdim=True)) * rstd,
        None if w is None else _sum_leading(grad * x_hat, normalized_shape),
        None,
    )


def _neighbours(values: Tensor, first: int, last: int) -> Tensor:
    """Sum over channels c + first … c + last of (N, C, *); channels outside count as zero."""
    channels = values.shape[1]
    total = torch.zeros_like(values)
    for shift in range(first, last + 1):
        low, high = max(0, -shift), min(channels, channels - shift)
        if low < high:
            total[:, low:high] += values[:, low + shift : high + shift]
    return total


def local_response_norm(
    x: Tensor, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0
) -> Tensor:
    """y_c = x_c · d_c^−beta, d_c = k + alpha / size · Σ x_j², `size` channels j ≥ c − size // 2."""
    x = x.detach().to(torch.float64)
    before = size // 2
    d = k + alpha / size * _neighbours(x**2, -before, size - 1 - before)
    return x * d.pow(-beta)


def local_response_norm_backward(
    grad: Tensor, x: Tensor, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0
) -> Gradients:
    """grad_j = g_j · d_j^−beta − 2 · alpha · beta / size · x_j · Σ g_c · x_c · d_c^(−beta − 1).

    The sum is over those channels c whose window contains j.
    """
    x, grad = x.detach().to(torch.float64), grad.detach().to(torch.float64)
    before = size // 2
    d = k + alpha / size * _neighbours(x**2, -before, size - 1 - before)
    across = _neighbours(grad * x * d.pow(-beta - 1.0), -(size - 1 - before), before)
    return Gradients(grad * d.pow(-beta) - 2.0 * alpha * beta / size * x * across, None, None)


def running_update(
    running_mean: Tensor,
    running_var: Tensor,
    x: Tensor,
    momentum: float,
    *,
    per_sample: bool = False,
) -> tuple[Tensor, Tensor]:
    """running = (1 − momentum) · running + momentum · observed, for (N, C, *).

    Observed are each channel's mean and unbiased variance (divided by n − 1) over the batch, or,
    `per_sample` (InstanceNorm), the averages over samples of each sample's own.
    """
    x = x.detach().to(torch.float64)
    dims = list(range(2, x.dim())) if per_sample else _batch_dims(x)
    mean, var = _mean_and_var(x, dims)
    n = x.numel() // mean.numel()
    unbiased = var * n / (n - 1)
    observed = [t.reshape(-1, x.shape[1]).mean(0) for t in (mean, unbiased)]
    old = [running_mean.detach().to(torch.float64), running_var.detach().to(torch.float64)]
    new_mean, new_var = (
        (1.0 - momentum) * before + momentum * seen
        for before, seen in zip(old, observed, strict=True)
    )
    return new_mean, new_var
