"""Each layer written out, group by group, with torch.mean and torch.var.

Slow on purpose: these loops are printed by `explain`, to be read. x is float64, and weight and bias
come after (`scale_and_shift`). correction=0 divides the variance by n, as the layers do;
correction=1, the default of torch.var, divides by n − 1 and is the mistake that `explain` shows.
"""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor


def batch_norm(x: Tensor, eps: float, correction: int = 0) -> Tensor:
    y = torch.empty_like(x)
    for c in range(x.shape[1]):
        values = x[:, c]
        mean = torch.mean(values)
        var = torch.var(values, correction=correction)
        y[:, c] = (values - mean) / torch.sqrt(var + eps)
    return y


def instance_norm(x: Tensor, eps: float, correction: int = 0) -> Tensor:
    y = torch.empty_like(x)
    for n in range(x.shape[0]):
        for c in range(x.shape[1]):
            values = x[n, c]
            mean = torch.mean(values)
            var = torch.var(values, correction=correction)
            y[n, c] = (values - mean) / torch.sqrt(var + eps)
    return y


def group_norm(x: Tensor, num_groups: int, eps: float, correction: int = 0) -> Tensor:
    y = torch.empty_like(x)
    size = x.shape[1] // num_groups
    for n in range(x.shape[0]):
        for g in range(num_groups):
            values = x[n, g * size : (g + 1) * size]
            mean = torch.mean(values)
            var = torch.var(values, correction=correction)
            y[n, g * size : (g + 1) * size] = (values - mean) / torch.sqrt(var + eps)
    return y


def layer_norm(x: Tensor, normalized_dims: int, eps: float, correction: int = 0) -> Tensor:
    y = torch.empty_like(x)
    leading = x.shape[: x.dim() - normalized_dims]
    for index in product(*(range(size) for size in leading)):
        values = x[index]
        mean = torch.mean(values)
        var = torch.var(values, correction=correction)
        y[index] = (values - mean) / torch.sqrt(var + eps)
    return y


def rms_norm(x: Tensor, normalized_dims: int, eps: float) -> Tensor:
    y = torch.empty_like(x)
    leading = x.shape[: x.dim() - normalized_dims]
    for index in product(*(range(size) for size in leading)):
        values = x[index]
        mean_square = torch.mean(values**2)
        y[index] = values / torch.sqrt(mean_square + eps)
    return y


def local_response_norm(x: Tensor, size: int, alpha: float, beta: float, k: float) -> Tensor:
    y = torch.empty_like(x)
    for n in range(x.shape[0]):
        for c in range(x.shape[1]):
            first = c - size // 2
            window = x[n, max(first, 0) : first + size]
            sum_of_squares = torch.sum(window**2, dim=0)
            y[n, c] = x[n, c] / (k + alpha / size * sum_of_squares) ** beta
    return y


def scale_and_shift(y: Tensor, weight: Tensor | None, bias: Tensor | None, dim: int) -> Tensor:
    """y · weight + bias, where the parameter's first dimension is y's `dim`."""
    for p, apply in ((weight, torch.mul), (bias, torch.add)):
        if p is not None:
            trailing = y.dim() - dim - p.dim()
            y = apply(y, p.detach().cpu().double().reshape(*p.shape, *[1] * trailing))
    return y


def body_of(function: Callable[..., Tensor]) -> str:
    """The lines that did the work, as they stand in this file."""
    lines = inspect.getsource(function).splitlines()[1:]
    body = [line for line in lines if not line.strip().startswith("return ")]
    return textwrap.dedent("\n".join(body)).replace("correction=correction", "correction=0")
