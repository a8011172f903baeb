"""RMSNorm beside a gate, of rows (N, C) in groups, in float64: the operators' plain kernels.

Whoever has another way takes that: torch's operators around a norm (gated.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .call import (
    ACT,
    BEFORE,
    CONSTANT,
    FEATURES,
    GROUPS,
    KEEP,
    NEEDS_INPUT,
    NEEDS_WEIGHT,
    ONE_PLUS,
    PER_CHANNEL,
    ROUNDS_PRODUCT,
    ROUNDS_X_HAT,
    SWISH,
    UNCENTRED,
)
from .plain import wide


def check(x: Tensor, bits: int, order: int) -> None:
    """What a gate asks of a call beyond what every call is asked."""
    if x.dim() != 2:
        raise RuntimeError(f"`x` must be rows, (N, C), but got shape {tuple(x.shape)}")
    more = bits & (CONSTANT | ONE_PLUS | PER_CHANNEL) or bits >> ACT & 0xFF
    if not bits >> GROUPS or not bits & UNCENTRED or more or bits >> FEATURES & 0xFF:
        raise RuntimeError(
            f"`form` (={bits}) must be groups of a row's values, UNCENTRED, and nothing else"
        )
    if type(order) is int and not 0 <= order < 16:
        raise RuntimeError(f"`order` (={order}) must be from 0 to 15: see _core/call.py")


def _opened(gate: Tensor, order: int) -> tuple[Tensor, Tensor]:
    """(act(gate), act'(gate))"""
    sigma = gate.sigmoid()
    slope = sigma * (-gate).sigmoid()
    return (gate * sigma, sigma + gate * slope) if order & SWISH else (sigma, slope)


def _grouped(t: Tensor, bits: int) -> Tensor:
    groups = bits >> GROUPS
    return t.reshape(t.shape[0], groups, t.shape[1] // groups)


def gated_norm(
    x: Tensor, gate: Tensor, weight: Tensor | None, bits: int, eps: float, order: int
) -> tuple[Tensor, Tensor]:
    """y, and the record."""
    act, _ = _opened(wide(gate), order)
    h = _grouped(wide(x) * act if order & BEFORE else wide(x), bits)
    var = h.square().mean(2)
    y = (h / (var + eps).sqrt()[:, :, None]).flatten(1)
    if order & ROUNDS_X_HAT:
        y = _rounded(y, x)
    y = y if weight is None else y * wide(weight)
    if order & ROUNDS_PRODUCT:
        y = _rounded(y, x)
    y = y if order & BEFORE else y * act
    flat = var.flatten()
    record = torch.stack([torch.zeros_like(flat), flat, torch.full_like(flat, h.shape[2])])
    return y.to(x.dtype).contiguous(), record if bits & KEEP else record.new_empty(0)


def _rounded(values: Tensor, x: Tensor) -> Tensor:
    """To half precision, where that is x's."""
    return wide(values.to(x.dtype)) if x.itemsize == 2 else values


def gated_norm_backward(
    grad: Tensor, x: Tensor, gate: Tensor, record: Tensor, weight: Tensor | None, bits: int,
    eps: float, order: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, gate and weight, empty where they are not wanted."""
    act, slope = _opened(wide(gate), order)
    values, g, before = wide(x), wide(grad), order & BEFORE
    rstd = 1.0 / (record[1].view(x.shape[0], bits >> GROUPS, 1) + eps).sqrt()
    x_hat = _grouped(values * act if before else values, bits) * rstd
    pulled = _grouped(g if before else g * act, bits)
    by = 1.0 if weight is None else _grouped(wide(weight)[None], bits)
    wg = pulled * by
    of_h = ((wg - x_hat * (wg * x_hat).mean(2, keepdim=True)) * rstd).flatten(1)
    if before:
        of_x, of_gate = of_h * act, of_h * values * slope
    else:
        of_x, of_gate = of_h, (x_hat * by).flatten(1) * g * slope
    of_weight = x.new_empty(0)
    if weight is not None:
        of_weight = weight.new_empty(0)
        if bits & NEEDS_WEIGHT:
            of_weight = (pulled * x_hat).sum(0).flatten().to(weight.dtype)
    if not bits & NEEDS_INPUT:
        return x.new_empty(0), x.new_empty(0), of_weight
    of_x, of_gate = (t.to(x.dtype).contiguous() for t in (of_x, of_gate))
    return of_x, of_gate, of_weight


# ---------------------------------------------------------------- shape rules


def fake_gated_norm(
    x: Tensor, gate: Tensor, weight: Tensor | None, bits: int, eps: float, order: int
) -> tuple[Tensor, Tensor]:
    groups, like = bits >> GROUPS, wide(x.new_empty(0))
    shape = (3, x.shape[0] * groups) if bits & KEEP else (0,)
    return x.new_empty(x.shape), like.new_empty(shape)


def fake_gated_norm_backward(
    grad: Tensor, x: Tensor, gate: Tensor, record: Tensor, weight: Tensor | None, bits: int,
    eps: float, order: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    of_x, of_gate = (x.new_empty(x.shape if bits & NEEDS_INPUT else (0,)) for _ in range(2))
    if weight is None:
        return of_x, of_gate, x.new_empty(0)
    return of_x, of_gate, weight.new_empty(weight.shape if bits & NEEDS_WEIGHT else (0,))
