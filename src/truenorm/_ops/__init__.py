"""What functional.py calls: one function per kind of normalization.

Eager calls go through `torch.autograd.Function` over an operator's raw handle (9 µs a call, against
34 µs through `register_autograd`); the compiler sees the operator itself, with the same formula
registered. Function transforms and forward-mode AD are served by the plain formulas.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from .. import _checks, _plain
from .._axes import BATCH, Axes
from . import (
    activated,
    activation,
    autograd,
    eager,
    operators,
    recomputed,
    route,
    sharding,
    standard,
)
from .activation import Epilogue
from .autograd import Running
from .operators import within_backward

__all__ = [
    "Running",
    "activated",
    "channel_moments",
    "eager",
    "local_response_norm",
    "normalize",
    "normalize_fixed",
    "normalize_with_statistics",
    "recomputed",
    "route",
    "within_backward",
]


def _after(y: Tensor, after: Epilogue) -> Tensor:
    z = y if after.residual is None else y + after.residual
    return activation.act(z, after.act, after.parameter)


def _sharded() -> Any:
    from . import sharded  # which imports this module

    return sharded


def _wants_gradient(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> bool:
    return torch.is_grad_enabled() and (
        x.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
    )


def normalize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    axes: Axes,
    eps: float,
    running: Running | None = None,
    after: Epilogue | None = None,
) -> Tensor:
    """Normalize x by its own statistics, and update `running` with them."""
    if sharding.wanted(x, weight, bias):
        return _sharded().normalize(x, weight, bias, axes, eps, running, after)  # type: ignore[no-any-return]
    if after is not None:
        return activated.normalize(x, weight, bias, axes, eps, running, after)
    way = route.way(x, weight, bias)
    if way == route.STANDARD:
        return standard.normalize(x, weight, bias, axes, eps, running)
    if way == route.PLAIN:
        y, mean, var = _plain.forward(x, weight, bias, axes, eps)
        if running is not None:
            _update_plain(x, running, mean, var)
        return y
    if way == route.GRAPH:
        y, mean, var = operators.forward(x, weight, bias, *axes, eps)
        if running is not None:
            autograd.track(running, x, mean, var)
        return cast(Tensor, y)
    if not _wants_gradient(x, weight, bias):
        return autograd.normalize_raw(axes, eps, running, x, weight, bias)[0]
    y = autograd.Normalize.apply((axes, eps), running, x, weight, bias)  # type: ignore[no-untyped-call]
    recomputed.remember(y, operators.forward, (x, weight, bias), (*axes, eps))
    return cast(Tensor, y)


def _update_plain(x: Tensor, running: Running, mean: Tensor, var: Tensor) -> None:
    with torch.no_grad():
        if x.numel():
            autograd.track(running, x, mean, var)
        elif operators.within_backward() or running.gathered is not None:
            return
        elif running.num_batches_tracked is not None:
            # as torch: an empty batch counts as a batch and leaves the statistics alone
            running.num_batches_tracked.add_(1)


def normalize_with_statistics(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, axes: Axes, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """x normalized by its own statistics, and these: mean and biased variance, as constants."""
    if sharding.wanted(x, weight, bias):
        return _sharded().normalize_with_statistics(x, weight, bias, axes, eps)  # type: ignore[no-any-return]
    way = route.way(x, weight, bias)
    if way == route.STANDARD:
        return standard.normalize_with_statistics(x, weight, bias, axes, eps)
    if way == route.PLAIN:
        y, mean, var = _plain.forward(x, weight, bias, axes, eps)
        return y, mean.detach(), var.detach()
    if way == route.GRAPH:
        return cast(tuple[Tensor, Tensor, Tensor], operators.forward(x, weight, bias, *axes, eps))
    found = autograd.NormalizeWithStatistics.apply((axes, eps), x, weight, bias)  # type: ignore[no-untyped-call]
    return cast(tuple[Tensor, Tensor, Tensor], found)


def normalize_fixed(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    after: Epilogue | None = None,
) -> Tensor:
    """Normalize x (N, C, *) by given statistics, one mean and variance per channel."""
    if x.layout is torch._mkldnn:  # type: ignore[attr-defined]
        y = torch.batch_norm(x, weight, bias, mean, var, False, 0.0, eps, False)
        return y if after is None else _after(y, after)
    if sharding.wanted(x, mean, var, weight, bias):
        return _sharded().normalize_fixed(x, mean, var, weight, bias, eps, after)  # type: ignore[no-any-return]
    if after is not None:
        return activated.normalize_fixed(x, mean, var, weight, bias, eps, after)
    way = route.way(x, weight, bias)
    if way == route.STANDARD:
        return standard.normalize_fixed(x, mean, var, weight, bias, eps)
    if way == route.PLAIN:
        # as torch: a backward sees none of it
        _checks.check_running_constant(route.has_tangent(mean, var))
        return _plain.apply(x, mean, var, weight, bias, BATCH, eps)
    if way == route.GRAPH:
        return cast(Tensor, operators.apply(x, mean, var, weight, bias, eps))
    if not _wants_gradient(x, weight, bias):
        return autograd.apply_raw(eps, mean, var, x, weight, bias)
    return cast(Tensor, autograd.NormalizeFixed.apply(eps, mean, var, x, weight, bias))  # type: ignore[no-untyped-call]


def channel_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel of x (N, C, *); zeros where x is empty."""
    if sharding.wanted(x):
        return _sharded().channel_moments(x)  # type: ignore[no-any-return]
    if x.numel() == 0:
        mean = x.new_zeros(x.shape[1], dtype=operators.statistic_dtype(x))
        return mean, torch.zeros_like(mean)
    way = route.way(x)
    if way == route.STANDARD:
        return standard.channel_moments(x)
    if way == route.PLAIN:
        return _plain.moments(x, BATCH)
    if way == route.GRAPH:
        return cast(tuple[Tensor, Tensor], operators.moments(x))
    with autograd._below_autograd():
        return cast(tuple[Tensor, Tensor], operators.moments._op(x))


def local_response_norm(x: Tensor, size: int, alpha: float, beta: float, k: float) -> Tensor:
    """Divide each value of x (N, C, *) by a power of its neighbouring channels' energy."""
    if sharding.wanted(x):
        return _sharded().local_response_norm(x, size, alpha, beta, k)  # type: ignore[no-any-return]
    way = route.way(x)
    if way == route.STANDARD:
        return standard.local_response_norm(x, size, alpha, beta, k)
    if way == route.PLAIN:
        return _plain.local_response_norm(x, size, alpha, beta, k)
    if way == route.GRAPH:
        return cast(Tensor, operators.local_response_norm(x, size, alpha, beta, k))
    return cast(Tensor, autograd.LocalResponseNorm.apply((size, alpha, beta, k), x))  # type: ignore[no-untyped-call]
