"""Scale and shift: norm(x) · (1 + scale) + shift, for each sample, token or position.

What differs by sample, or along the first of several leading dimensions, goes into the weight and
bias that each part of the samples has, and costs the kernels nothing. What differs by position is
applied after the norm, and so is all of it where statistics span processes, inputs are DTensors, no
kernel serves the device, or a graph is made of torch's own operators.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import activation, checks, geometry, masks, route
from .call import Call

Pair = tuple[Tensor | None, Tensor | None]  # scale and shift

# a part of fewer values takes longer than what scale and shift take after the norm, but for few
_LONG, _FEW = 4096, 16
# values, of whose time the calls of torch's operators are most
SMALL = 1 << 14


def arranged(name: str, t: Any, x: Tensor, features: int) -> Tensor | None:
    """A scale or shift against x (N, C, *positions) or (*, *features), in as many dimensions."""
    if t is not None:
        checks.check_modulation(name, t, x, features, fits)
    return shaped(t, x, features)


def shaped(t: Tensor | None, x: Tensor, features: int) -> Tensor | None:
    """The same of what fits."""
    if t is None or t.dim() == x.dim():
        return t
    # of a sample, or of all
    lead = t.shape[: t.dim() - max(features, 1)] or (1,)
    ones = (1,) * (x.dim() - max(features, 1) - 1)
    like = t.shape[-features:] if features else (t.shape[-1],)
    return t.reshape(*lead, *ones, *like) if features else t.reshape(*lead, *like, *ones)


def fits(t: Tensor, x: Tensor, features: int) -> bool:
    """Whether it is of x's sizes, or of one for each sample and channel, or 1 along some."""
    shape, sizes = t.shape, x.shape
    if shape == sizes:
        return True
    # mostly one for each sample: all else is 1 where the number of values is right
    at = -1 if features else 1
    if (
        features < 2
        and len(shape) == len(sizes) > 1
        and shape[0] == sizes[0]
        and shape[at] == sizes[at]
        and t.numel() == shape[0] * shape[at]
    ):
        return True
    like = x.shape[x.dim() - features :] if features else x.shape[1:2]
    full: Any = x.shape
    if t.dim() != x.dim():
        if not 0 <= t.dim() - len(like) <= 1:
            return False
        full = like if t.dim() == len(like) else (x.shape[0], *like)
    return all(n == m or n == 1 for n, m in zip(t.shape, full, strict=True))


class Parameters(NamedTuple):
    """A weight and a bias of each part of the samples; one_plus: 1 + weight is meant."""

    weight: Tensor
    bias: Tensor | None
    one_plus: bool


def parameters_of(
    x: Tensor, features: int, weight: Tensor | None, bias: Tensor | None, pair: Pair
) -> Parameters | None:
    """`parameters` of a scale and shift that fit, as they are given."""
    if weight is None and bias is None and features == 1:
        # without a view for autograd to know of
        found = _of_samples(x, *pair)
        if found is not None:
            return found
    scale, shift = (shaped(t, x, features) for t in pair)
    return parameters(x, features, weight, bias, (scale, shift))


def parameters(
    x: Tensor, features: int, weight: Tensor | None, bias: Tensor | None, pair: Pair
) -> Parameters | None:
    """What scale and shift, arranged against x, make of weight and bias.

    None where they differ by position, or make more parts than a pass of its own takes time.
    """
    if weight is None and bias is None and features == 1:
        found = _of_samples(x, *pair)
        if found is not None:
            return found
    split = x.dim() - features if features else 1
    given = [t for t in pair if t is not None]
    if not features and any(size != 1 for t in given for size in t.shape[2:]):
        return None
    depth = 0  # of the leading dimensions, up to the last along which one of them differs
    for t in given:
        for d in range(depth, split):
            if t.shape[d] != 1:
                depth = d + 1
    lead, rest = x.shape[:depth], x.shape[split:]
    like = rest if features else rest[:1]
    parts = geometry.product(lead)
    if parts > _FEW and x.numel() < _LONG * parts:
        return None

    def of_parts(t: Tensor | None) -> Tensor | None:
        if t is None:
            return None
        sizes = rest if features else (*like, *t.shape[2:])
        return t.expand(*lead, *t.shape[depth:split], *sizes).reshape(parts, *like)

    scale, shift = map(of_parts, pair)
    if weight is None and bias is None and scale is not None:
        return Parameters(scale, shift, True)
    wide = torch.promote_types(x.dtype, torch.float32)
    by = x.new_ones((), dtype=wide) if scale is None else 1.0 + scale.to(wide)
    of_weight = by if weight is None else weight.to(wide) * by
    if bias is not None:
        bias = (bias.to(wide) * by).expand(parts, *like)
    if shift is not None:
        bias = shift.to(wide) if bias is None else bias + shift
    return Parameters(of_weight.expand(parts, *like), bias, False)


def _of_samples(x: Tensor, scale: Tensor | None, shift: Tensor | None) -> Parameters | None:
    """AdaLN's: both of them for each sample, in as few steps as can be."""
    if scale is None or shift is None or scale.shape != shift.shape:
        return None
    samples, size = x.shape[0], x.shape[-1]
    if scale.shape[0] != samples or scale.numel() != samples * size:
        return None
    if samples > _FEW and x.numel() < _LONG * samples:
        return None
    if scale.dim() != 2:
        scale, shift = scale.reshape(samples, size), shift.reshape(samples, size)
    return Parameters(scale, shift, True)


def by_part(call: Call) -> Call | None:
    """The call with scale and shift in weight and bias; None where no parts have one each."""
    x = call.x
    if call.group is not None or route.lacks_kernel(x) or x.is_complex():
        return None
    if route.way_to_output(call) not in (route.KERNEL, route.GRAPH, route.PLAIN):
        return None
    given = call.weight, call.bias, (call.scale, call.shift)
    found = parameters(x, call.form.axes.feature_dims, *given)
    if found is None:
        return None
    weight, bias, one_plus = found
    form = call.form._replace(one_plus=one_plus)
    return call._replace(weight=weight, bias=bias, form=form, scale=None, shift=None)


def bare(call: Call) -> Call:
    """The norm alone, in what is applied after it."""
    form = call.form._replace(act=activation.NONE, parameter=0.0, padding=0.0)
    x = call.x.to(_between(call))
    return call._replace(x=x, form=form, residual=None, scale=None, shift=None, inplace=False)


def _between(call: Call) -> torch.dtype:
    """What x̂ is rounded to.

    In half precision x's own dtype where scale and shift are of x's size, as by torch's operators:
    wider ones take more than twice the time.
    """
    x = call.x
    large = any(t is not None and 2 * t.numel() > x.numel() for t in (call.scale, call.shift))
    return x.dtype if large else torch.promote_types(x.dtype, torch.float32)


def finished(y: Tensor, call: Call) -> Tensor:
    """What is made of the bare norm: act(y · (1 + scale) + shift + residual), and padding."""
    scale, shift, residual = call.scale, call.shift, call.residual
    valid = _valid(call)
    if valid is not None:
        # what is padded may be NaN, whose gradient would be too
        scale, shift, residual = (
            None if t is None else torch.where(valid, t, 0.0) for t in (scale, shift, residual)
        )
    y = applied(y, scale, shift, residual, call.form.act, call.form.parameter)
    if valid is not None:
        y = torch.where(valid, y, call.form.padding)
    return y.to(call.x.dtype)


def applied(y: Tensor, scale: Any, shift: Any, residual: Any, act: int, parameter: float) -> Tensor:
    """act(y · (1 + scale) + shift + residual)."""
    dtype = y.dtype
    # a call that changes nothing is noticed too
    if scale is not None and scale.dtype != dtype:
        scale = scale.to(dtype)
    if shift is not None and shift.dtype != dtype:
        shift = shift.to(dtype)
    strides = y.stride()
    if scale is None:
        y = y + shift
    elif shift is None:
        y = y * (1.0 + scale)
    elif dtype.itemsize > 2 and y.numel() < SMALL:
        # y + y · scale + shift: a sum with a number and an expanded view take as long as all of it
        y = torch.addcmul(y, y, scale) + shift
    else:
        # one pass and one rounding; sizes of 1 have no say in how the result lies
        shift = shift if shift.shape == y.shape else shift.expand(y.shape)
        y = torch.addcmul(shift, y, 1.0 + scale)
    if residual is not None:
        y = y + residual
    if act:
        y = activation.act(y, act, parameter)
    # as the norm's output lies, not as what it meets
    return geometry.laid_out(y, strides)


def _valid(call: Call) -> Tensor | None:
    mask, features = call.mask, call.form.axes.feature_dims
    if mask is None or not features:
        return None if mask is None else masks.against(mask, call.x)
    return mask if mask.dim() == call.x.dim() else mask.reshape(*mask.shape, *(1,) * features)
