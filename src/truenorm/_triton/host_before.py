"""The operators under the names that they had, in terms of those that there are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._axes import Axes
from .form import CONSTANT, KEEP, NEEDS_INPUT, pack
from .host_backward import norm_backward
from .host_forward import norm, statistics
from .host_others import move, response, response_backward

Three = tuple[Tensor, Tensor, Tensor]


def _record(mean: Tensor, var: Tensor, count: Any = 0.0) -> Tensor:
    made = torch.empty((3, mean.numel()), dtype=torch.float64, device=mean.device)
    made[0], made[1], made[2] = mean, var, count
    return made


def forward(
    x: Tensor, weight: Any, bias: Any, num_groups: int, feature_dims: int, centred: bool, eps: float
) -> Three:
    bits = pack(Axes(num_groups, feature_dims, centred)) | KEEP
    y, record = norm(x, weight, bias, None, None, None, None, bits, eps, 0.0, 0.0)
    return y, record[0].clone(), record[1].clone()


def apply(x: Tensor, mean: Tensor, var: Tensor, weight: Any, bias: Any, eps: float) -> Tensor:
    return norm(x, weight, bias, None, None, mean, var, 0, eps, 0.0, 0.0)[0]


def backward(
    grad: Tensor, x: Tensor, mean: Tensor, var: Tensor, weight: Any, num_groups: int,
    feature_dims: int, centred: bool, eps: float, fixed: bool, needs: int,
) -> Three:  # fmt: skip
    bits = pack(Axes(num_groups, feature_dims, centred)) | needs | (CONSTANT if fixed else 0)
    record = _record(mean, var)
    made = norm_backward(grad, x, record, weight, None, None, None, None, bits, eps, 0.0)
    return made[:3]


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of each channel over the batch, without an output."""
    record = statistics(x, None, 0)
    return record[0].clone(), record[1].clone()


def backward_of_part(
    grad: Tensor, x: Tensor, mean: Tensor, var: Tensor, weight: Any, mean_grad: Tensor,
    mean_grad_x_hat: Tensor, eps: float,
) -> Tensor:  # fmt: skip
    """grad_x of a part of a batch, whose sums over all of it are given."""
    sums, record = torch.stack((mean_grad_x_hat, mean_grad)), _record(mean, var)
    return norm_backward(grad, x, record, weight, None, None, None, sums, NEEDS_INPUT, eps, 0.0)[0]


def update_running(
    running_mean: Tensor, running_var: Tensor, num_batches_tracked: Tensor | None, x: Tensor,
    mean: Tensor, var: Tensor, momentum: float | None,
) -> None:  # fmt: skip
    record = _record(mean, var, x.numel() // mean.numel())
    move(running_mean, running_var, num_batches_tracked, record, momentum, False)


KERNELS: dict[str, Callable[..., Any]] = {
    "forward": forward,
    "apply": apply,
    "backward": backward,
    "moments": moments,
    "backward_of_part": backward_of_part,
    "update_running_": update_running,
    "local_response_norm": response,
    "local_response_norm_backward": response_backward,
}
