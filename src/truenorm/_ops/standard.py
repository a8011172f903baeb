"""torch's own operators in the place of truenorm's, in files that are to run without truenorm."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _axes, _plain
from .._axes import BATCH, Axes
from . import autograd
from .autograd import Running


def normalize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    axes: Axes,
    eps: float,
    running: Running | None = None,
) -> Tensor:
    """x by its own statistics, which move `running`."""
    if axes.feature_dims:
        shape = x.shape[-axes.feature_dims :] if weight is None else weight.shape
        if axes.centred:
            return F.layer_norm(x, list(shape), weight, bias, eps)
        if torch.onnx.is_in_onnx_export() and not torch.compiler.is_exporting():
            return _rms(x, axes.feature_dims, weight, eps)
        return F.rms_norm(x, list(shape), weight, eps)
    if running is not None and not _moved_by_torch(running):
        y = normalize(x, weight, bias, axes, eps)
        autograd.track(running, x, *_plain.moments(x, axes))
        return y
    mean, var, count, momentum = (None, None, None, 0.0) if running is None else running[:4]
    if not axes.num_groups or mean is not None:
        weight, bias = _widened(weight, x, mean), _widened(bias, x, mean)
    if not axes.num_groups:
        if count is not None:
            count.add_(1)
        return F.batch_norm(x, mean, var, weight, bias, True, momentum or 0.0, eps)
    # torch's instance_norm refuses one position, which one group per channel may have
    if axes.num_groups == x.shape[1] and _axes.ncs(x.shape, axes)[2] > 1:
        return F.instance_norm(x, mean, var, weight, bias, True, momentum or 0.0, eps)
    return F.group_norm(x, axes.num_groups, weight, bias, eps)


def _rms(x: Tensor, dims: int, weight: Tensor | None, eps: float) -> Tensor:
    """RMSNorm in operators that torch's older ONNX exporter has: it has none for rms_norm."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    mean_square = (wide * wide).mean(list(range(-dims, 0)), keepdim=True)
    y = wide * torch.rsqrt(mean_square + eps)
    return (y if weight is None else y * weight).to(x.dtype)


def _moved_by_torch(running: Running) -> bool:
    """Whether torch's own norm moves these statistics as this layer does.

    It does not skip what is not finite, and in a trace keeps the example's 1 / count.
    """
    plain = running.momentum is not None and not running.skip_nonfinite
    return plain and running.gathered is None


def _widened(parameter: Tensor | None, x: Tensor, statistic: Tensor | None) -> Tensor | None:
    """A parameter in the statistics' dtype, which torch's batch norm asks for.

    Half precision parameters would have it round the statistics to their dtype.
    """
    if parameter is None:
        return None
    wide = torch.promote_types(x.dtype, torch.float32) if statistic is None else statistic.dtype
    return parameter if parameter.dtype == wide else parameter.to(wide)


def normalize_fixed(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """x by given statistics, one per channel: BatchNorm in evaluation, and InstanceNorm too.

    torch's own exporter drops the running statistics of an InstanceNorm (pytorch#72057).
    """
    weight, bias = _widened(weight, x, mean), _widened(bias, x, mean)
    return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)


def normalize_with_statistics(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, axes: Axes, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    mean, var = _plain.moments(x, axes)
    return normalize(x, weight, bias, axes, eps), mean.detach(), var.detach()


def channel_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    return _plain.moments(x, BATCH)


def local_response_norm(x: Tensor, size: int, alpha: float, beta: float, k: float) -> Tensor:
    return F.local_response_norm(x, size, alpha, beta, k)
