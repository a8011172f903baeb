"""The formulas in plain PyTorch ops: any device, any dtype, differentiable to any order.

They serve devices without a truenorm kernel, function transforms (vmap, jvp, jacrev), and second
derivatives. Everything is computed in float64 where the device has it, which keeps every promise of
the kernels except speed and memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._core import geometry
from ._core.geometry import Axes

# values per statistic, on the device where no one may wait for it
Count = int | Tensor


def _wide(x: Tensor) -> Tensor:
    if x.is_complex():
        return x.to(torch.complex128)
    has_float64 = x.device.type != "mps"
    return x.to(torch.float64 if has_float64 else torch.float32)


def _per_channel(p: Tensor, v: Tensor) -> Tensor:
    """A parameter over channels, against v (N, G, C / G, S)."""
    return _wide(p).reshape(1, v.shape[1], v.shape[2], 1)


def _like(values: Tensor, x: Tensor, axes: Axes) -> Tensor:
    """values in x's shape, dtype and memory format."""
    result = values.reshape(x.shape).to(x.dtype)
    strides = geometry.kept_strides(x, axes)
    if result.stride() == strides:
        return result
    order = geometry.inside_out(x.shape, strides)[::-1]
    back = [order.index(d) for d in range(x.dim())]
    return result.permute(order).contiguous().permute(back)


def moments(x: Tensor, axes: Axes) -> tuple[Tensor, Tensor]:
    """Mean and biased variance (RMSNorm: zero and mean square), one per statistic."""
    v, dims = geometry.grouped_view(x, axes)
    v = _wide(v)
    if axes.centred:
        mean = v.mean(dims, keepdim=True)
        d = v - mean
        remainder = d.mean(dims, keepdim=True)
        mean, d = mean + remainder, d - remainder
    else:
        mean, d = torch.zeros_like(v.sum(dims, keepdim=True)), v
    return mean.reshape(-1), (d * d).mean(dims).reshape(-1)


def _against(statistic: Tensor, v: Tensor, axes: Axes) -> Tensor:
    """One value per statistic, against v (N, G, C / G, S)."""
    n = v.shape[0] if axes.num_groups else 1
    return _wide(statistic).reshape(n, v.shape[1], 1, 1)


def apply(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    axes: Axes,
    eps: float,
) -> Tensor:
    v, _ = geometry.grouped_view(x, axes)
    y = (_wide(v) - _against(mean, v, axes)) * torch.rsqrt(_against(var, v, axes) + eps)
    if weight is not None:
        y = y * _per_channel(weight, v)
    if bias is not None:
        y = y + _per_channel(bias, v)
    return _like(y, x, axes)


def forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, axes: Axes, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    mean, var = moments(x, axes)
    return apply(x, mean, var, weight, bias, axes, eps), mean, var


def backward(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    axes: Axes,
    eps: float,
    *,
    fixed: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of input, weight and bias; `fixed` where mean and var do not depend on x."""
    v, dims = geometry.grouped_view(x, axes)
    g, _ = geometry.grouped_view(grad, axes)
    v, g = _wide(v), _wide(g)
    rstd = torch.rsqrt(_against(var, v, axes) + eps)
    x_hat = (v - _against(mean, v, axes)) * rstd
    per_channel = [0, 3]
    grad_weight = (g * x_hat).sum(per_channel).reshape(-1)
    grad_bias = g.sum(per_channel).reshape(-1)
    if weight is not None:
        g = g * _per_channel(weight, v)
    if not fixed:
        g = (
            g
            - x_hat * (g * x_hat).mean(dims, keepdim=True)
            - (g.mean(dims, keepdim=True) if axes.centred else 0.0)
        )
    return _like(g * rstd, x, axes), grad_weight, grad_bias


def backward_of_part(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    mean_grad: Tensor,
    mean_grad_x_hat: Tensor,
    eps: float,
) -> Tensor:
    """Gradient of a part of a batch, by means of weight · grad and weight · grad · x̂ over all.

    One statistic per channel of (N, C, *).
    """
    axes = geometry.BATCH
    v, _ = geometry.grouped_view(x, axes)
    g, _ = geometry.grouped_view(grad, axes)
    v, g = _wide(v), _wide(g)
    rstd = torch.rsqrt(_against(var, v, axes) + eps)
    x_hat = (v - _against(mean, v, axes)) * rstd
    if weight is not None:
        g = g * _per_channel(weight, v)
    g = g - _against(mean_grad, v, axes) - x_hat * _against(mean_grad_x_hat, v, axes)
    return _like(g * rstd, x, axes)


def observed(mean: Tensor, var: Tensor, num_features: int, count: Count) -> tuple[Tensor, Tensor]:
    """What running statistics record: the mean and the unbiased variance, averaged over samples."""
    unbiased = var * (count / (count - 1))
    return mean.reshape(-1, num_features).mean(0), unbiased.reshape(-1, num_features).mean(0)


def update_running(
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor | None,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    momentum: float | None,
) -> None:
    """running = (1 − momentum) · running + momentum · observed; momentum None: 1 / batches seen.

    Of x only the shape counts: it says how many values each new statistic spans.
    """
    if mean.numel() == 0:
        return
    move_running(
        running_mean,
        running_var,
        num_batches_tracked,
        mean,
        var,
        x.numel() // mean.numel(),
        momentum,
    )


def move_running(
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor | None,
    mean: Tensor,
    var: Tensor,
    count: Count,
    momentum: float | None,
    *,
    skip_nonfinite: bool = False,
) -> None:
    """`update_running` for statistics of `count` values each; none where a tensor `count` is 0.

    skip_nonfinite: none, nor a batch counted, where one of the statistics is not finite.
    """
    factor: float | Tensor
    if momentum is not None:
        factor = momentum
    else:
        assert num_batches_tracked is not None
        factor = 1.0 / (_wide(num_batches_tracked) + 1.0)
    seen = observed(_wide(mean), _wide(var), running_mean.numel(), count)
    for running, new in zip((running_mean, running_var), seen, strict=True):
        moved = (1.0 - factor) * _wide(running) + factor * new
        if isinstance(count, Tensor):
            moved = torch.where(count > 0, moved, _wide(running))
        if skip_nonfinite:
            moved = torch.where(all_finite(mean, var), moved, _wide(running))
        running.copy_(moved)
    if num_batches_tracked is not None:
        num_batches_tracked.add_(all_finite(mean, var) if skip_nonfinite else 1)


def all_finite(mean: Tensor, var: Tensor) -> Tensor:
    """Whether every statistic is, where nobody waits for the answer."""
    return mean.isfinite().all() & var.isfinite().all()


def _window_sum(values: Tensor, size: int, before: int) -> Tensor:
    """Sum over channels c − before … c − before + size − 1 of (N, C, S)."""
    channels = values.shape[1]
    # of a window there are no more than all channels
    after = min(size - 1 - before, max(channels - 1, 0))
    before = min(before, max(channels - 1, 0))
    padded = torch.nn.functional.pad(values, (0, 0, before, after))
    total = padded.narrow(1, 0, channels)
    for shift in range(1, before + after + 1):
        total = total + padded.narrow(1, shift, channels)
    return total


def local_response_norm(x: Tensor, size: int, alpha: float, beta: float, k: float) -> Tensor:
    n, c, s = geometry.ncs(x.shape, geometry.BATCH)
    v = _wide(x.reshape(n, c, s))
    d = k + alpha / size * _window_sum(v * v, size, size // 2)
    return _like(v * d.pow(-beta), x, geometry.BATCH)


def local_response_norm_backward(
    grad: Tensor, x: Tensor, size: int, alpha: float, beta: float, k: float
) -> Tensor:
    n, c, s = geometry.ncs(x.shape, geometry.BATCH)
    v, g = _wide(x.reshape(n, c, s)), _wide(grad.reshape(n, c, s))
    d = k + alpha / size * _window_sum(v * v, size, size // 2)
    across = _window_sum(g * v * d.pow(-beta - 1.0), size, (size - 1) // 2)
    result = g * d.pow(-beta) - (2.0 * alpha * beta / size) * v * across
    return _like(result, x, geometry.BATCH)
