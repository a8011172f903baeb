"""torch's own operators in the place of truenorm's, in files that are to run without truenorm."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from . import activation, geometry, plain, running
from .call import Call, Running


def norm(call: Call) -> Tensor:
    """A call's output; x's own statistics move `running`."""
    if call.mask is not None:
        y, record = plain.norm(*call[:3], call.mask, call.residual, call.given, call.form)
        if call.running is not None:
            running.move(call.running, record)
        return y

    def by(weight: Tensor | None, bias: Tensor | None) -> Tensor:
        bare = call._replace(weight=weight, bias=bias)
        return _own(bare) if call.given is None else _given(bare, *call.given)

    return finished(call, by)


def finished(call: Call, by: Callable[[Tensor | None, Tensor | None], Tensor]) -> Tensor:
    """A call's output, whose norm with a weight and a bias `by` computes."""
    x, weight, bias, form = call[:4]
    if form.one_plus and weight is not None:
        weight = 1.0 + weight.to(torch.promote_types(x.dtype, torch.float32))
    if form.rounds and form.axes.feature_dims:
        y = by(None, None)
        y = y if weight is None else y * weight.to(x.dtype)
        y = y if bias is None else y + bias.to(x.dtype)
    else:
        y = by(weight, bias)
    if call.residual is not None:
        y = y + call.residual
    return activation.act(y, form.act, form.parameter)


def _own(call: Call) -> Tensor:
    x, weight, bias, form = call[:4]
    axes, eps = form.axes, form.eps
    if axes.feature_dims:
        shape = x.shape[-axes.feature_dims :] if weight is None else weight.shape
        if axes.centred:
            return F.layer_norm(x, list(shape), weight, bias, eps)
        older_onnx = torch.onnx.is_in_onnx_export() and not torch.compiler.is_exporting()
        if older_onnx or (weight is not None and weight.dtype != x.dtype):
            return _rms(x, axes.feature_dims, weight, eps)
        return F.rms_norm(x, list(shape), weight, eps)
    moving = call.running
    if moving is not None and not moved_by_torch(moving):
        running.move(moving, plain.statistics(x, None, axes))
        moving = None
    mean, var, count, momentum = (None, None, None, 0.0) if moving is None else moving[:4]
    if not axes.num_groups or mean is not None:
        weight, bias = _widened(weight, x, mean), _widened(bias, x, mean)
    if not axes.num_groups:
        if count is not None:
            count.add_(1)
        return F.batch_norm(x, mean, var, weight, bias, True, momentum or 0.0, eps)
    # torch's instance_norm refuses one position, which one group per channel may have
    if axes.num_groups == x.shape[1] and geometry.ncs(x.shape, axes)[2] > 1:
        return F.instance_norm(x, mean, var, weight, bias, True, momentum or 0.0, eps)
    return F.group_norm(x, axes.num_groups, weight, bias, eps)


def _rms(x: Tensor, dims: int, weight: Tensor | None, eps: float) -> Tensor:
    """RMSNorm in operators that torch's older ONNX exporter has: it has none for rms_norm.

    And which take a weight of another dtype than x.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    mean_square = (wide * wide).mean(list(range(-dims, 0)), keepdim=True)
    y = wide * torch.rsqrt(mean_square + eps)
    return (y if weight is None else y * weight).to(x.dtype)


def moved_by_torch(moving: Running) -> bool:
    """Whether torch's own norm moves these statistics as this layer does.

    It does not skip what is not finite, and in a trace keeps the example's 1 / count.
    """
    plain_ones = moving.momentum is not None and not moving.skip_nonfinite
    return plain_ones and moving.gathered is None


def _widened(parameter: Tensor | None, x: Tensor, statistic: Tensor | None) -> Tensor | None:
    """A parameter in the statistics' dtype, which torch's batch norm asks for.

    Half precision parameters would have it round the statistics to their dtype.
    """
    if parameter is None:
        return None
    wide = torch.promote_types(x.dtype, torch.float32) if statistic is None else statistic.dtype
    return parameter if parameter.dtype == wide else parameter.to(wide)


def _given(call: Call, mean: Tensor, var: Tensor) -> Tensor:
    """By given statistics, one per channel: BatchNorm in evaluation, and InstanceNorm too.

    torch's own exporter drops the running statistics of an InstanceNorm (pytorch#72057).
    """
    x, weight, bias, form = call[:4]
    if x.layout is not torch._mkldnn:  # type: ignore[attr-defined]
        weight, bias = _widened(weight, x, mean), _widened(bias, x, mean)
    return F.batch_norm(x, mean, var, weight, bias, False, 0.0, form.eps)
