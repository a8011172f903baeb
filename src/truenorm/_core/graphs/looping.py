"""Statistics that are given, in the compiler's own loops: a channel's scale and shift.

A norm of evaluation is a difference, a product and a sum for each value. As an operator it is a
call and a pass over memory; here Inductor makes one loop of it and of what stands around it. The
bits are the kernel's: each channel's coefficients are made in float64 first, as
csrc/coefficients.h has them, and what is left for each value are the kernel's three operations,
which Inductor does not contract.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from .. import activation
from ..call import (
    ACT,
    CONSTANT,
    FEATURES,
    GROUPS,
    KEEP,
    ONE_PLUS,
    PER_CHANNEL,
    ROUNDS,
    UNCENTRED,
)
from . import nodes
from .nodes import BIAS, BITS, EPS, MASK, MEAN, PARAMETER, RESIDUAL, VAR, WEIGHT, X

# whose bits are the same in whatever code computes them
_ACTS = activation.NONE, activation.RELU, activation.LEAKY_RELU, activation.RELU6
_DTYPES = torch.float32, torch.float64


def serves(norm: Node) -> bool:
    """Whether the compiler's loops serve this norm of a graph."""
    args: Any = norm.args
    x = nodes.value(args[X])
    if x is None or args[MEAN] is None or not _is_for_loops(args[BITS], args[MASK]):
        return False
    found = [nodes.value(each) for each in _by_channel(args) if each is not None]
    return (
        x.device.type == "cpu"
        and x.dtype in _DTYPES
        and x.dim() > 1
        and all(t is not None and t.dim() == 1 and t.is_floating_point() for t in found)
    )


def _by_channel(args: Any) -> list[Any]:
    return [args[place] for place in (MEAN, VAR, WEIGHT, BIAS)]


def _is_for_loops(bits: int, mask: Any) -> bool:
    """By what the call's number says: one statistic for each channel, no backward to come, and
    each step a plain one.
    """
    others = KEEP | ONE_PLUS | ROUNDS | UNCENTRED | PER_CHANNEL
    if mask is not None or bits & others or not bits & CONSTANT:
        return False
    if bits >> FEATURES & 0xFF or bits >> GROUPS:
        return False
    return (bits >> ACT & 0xFF) in _ACTS


def lowered(fallback: Callable[..., Any]) -> Callable[..., Any]:
    """What Inductor makes of `norm`: loops where these serve, else what `fallback` makes."""
    from torch._inductor.ir import TensorBox

    def lower(*args: Any) -> Any:
        x, bits = args[X], args[BITS]
        if (
            args[MEAN] is None
            or not isinstance(x, TensorBox)
            or not _is_for_loops(bits, args[MASK])
            or getattr(x.get_device(), "type", None) != "cpu"
            or x.get_dtype() not in _DTYPES
            or any(t is not None and len(t.get_size()) != 1 for t in _by_channel(args))
        ):
            return fallback(*args)
        return _loops(*args)

    return lower


def _loops(*args: Any) -> Any:
    """y, and a record that holds nothing."""
    from torch._inductor.ir import Pointwise
    from torch._inductor.virtualized import ops

    x, dtype, wide = args[X], args[X].get_dtype(), torch.float64
    loads: Any = (
        None if args[place] is None else args[place].make_loader()
        for place in (MEAN, VAR, WEIGHT, BIAS, RESIDUAL)
    )
    mean, var, weight, bias, residual = loads

    def in_float64(load: Any, channel: Any) -> Any:
        return ops.to_dtype(load(channel), wide)

    def high(channel: Any) -> Any:
        return ops.to_dtype(mean(channel), dtype)

    def slope(channel: Any) -> Any:
        std = ops.sqrt(ops.add(in_float64(var, channel), ops.constant(args[EPS], wide)))
        rstd = ops.truediv(ops.constant(1.0, wide), std)
        return rstd if weight is None else ops.mul(rstd, in_float64(weight, channel))

    def offset(channel: Any) -> Any:
        low = ops.sub(in_float64(mean, channel), ops.to_dtype(high(channel), wide))
        at = ops.constant(0.0, wide) if bias is None else in_float64(bias, channel)
        return ops.sub(at, ops.mul(low, slope(channel)))

    def made(of: Callable[[Any], Any]) -> Any:
        """One for each channel, in memory: a loop over values would compute it for each."""
        box = Pointwise.create(
            device=x.get_device(),
            dtype=dtype,
            inner_fn=lambda channel: ops.to_dtype(of(channel), dtype),
            ranges=args[MEAN].get_size(),
        )
        box.realize()
        return box.make_loader()

    scale, shift, values = made(slope), made(offset), x.make_loader()

    def of_value(index: Any) -> Any:
        channel = [index[1]]
        z = ops.add(ops.mul(ops.sub(values(index), high(channel)), scale(channel)), shift(channel))
        z = z if residual is None else ops.add(z, residual(index))
        return _acted(ops, z, args[BITS] >> ACT & 0xFF, args[PARAMETER], dtype)

    y = Pointwise.create(device=x.get_device(), dtype=dtype, inner_fn=of_value, ranges=x.get_size())
    nothing = Pointwise.create(
        device=x.get_device(),
        dtype=wide,
        inner_fn=lambda _: ops.constant(0.0, wide),
        ranges=[0],
    )
    return [y, nothing]


def _acted(ops: Any, z: Any, act: int, parameter: float, dtype: torch.dtype) -> Any:
    if act == activation.NONE:
        return z
    if act == activation.LEAKY_RELU:
        below = ops.mul(z, ops.constant(parameter, dtype))
        return ops.where(ops.gt(z, ops.constant(0.0, dtype)), z, below)
    z = ops.relu(z)
    return z if act == activation.RELU else ops.minimum(z, ops.constant(6.0, dtype))
