"""What a rule says, in plain torch operators: what a module is held against."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..._core.rule import Rule
from ...nn._orders import ACTS, output_dtype, scaled_by


def _normalized(x: Tensor, dims: tuple[int, ...], eps: float, centred: bool) -> Tensor:
    """x̂ in float32."""
    x = x.float()
    if centred:
        x = x - x.mean(dims, keepdim=True)
    return x * torch.rsqrt(x.pow(2).mean(dims, keepdim=True) + eps)


def _along(t: Tensor | None, x: Tensor, axis: int) -> Tensor | None:
    """One value per channel, against x."""
    return t if t is None or axis == -1 else t.reshape(-1, *(1,) * (x.dim() - 2))


def _response(x: Tensor, weight: Tensor, bias: Tensor, eps: float, axis: int) -> Tensor:
    dims = [d for d in range(1, x.dim()) if d != axis % x.dim()]
    sizes = x.pow(2).sum(dims, keepdim=True).sqrt()
    share = sizes / (sizes.mean(axis, keepdim=True) + eps)
    weight, bias = (t.reshape(share[:1].shape) for t in (weight, bias))
    return x + weight * (x * share) + bias


def standardized(weight: Tensor, gain: Tensor | None, eps: float) -> Tensor:
    """The weights of a convolution, each output's by itself."""
    normal = _normalized(weight, (1, 2, 3), eps, True)
    return normal if gain is None else gain.reshape(-1, 1, 1, 1) * normal


def formula(
    x: Tensor,
    tensors: dict[str, Any],
    eps: float,
    rule: Rule,
    groups: int = 0,
    gate: Tensor | None = None,
) -> Tensor:
    """y of a rule, with what comes `after` left out.

    tensors: weight and bias, and of "frozen" running_mean and running_var.
    """
    weight, bias = tensors.get("weight"), tensors.get("bias")
    if rule.kind == "response":
        return _response(x, tensors["weight"], tensors["bias"], eps, rule.axis)
    if rule.axis == 1:
        weight, bias = (None if t is None else t.reshape(-1) for t in (weight, bias))
    out = output_dtype(x, weight, rule)
    if rule.kind == "frozen":
        scale = (tensors["running_var"] + eps).rsqrt()
        scale = scale if weight is None else weight * scale
        shift = -tensors["running_mean"] * scale
        shift = shift if bias is None else bias + shift
        against = (1, -1, *(1,) * (x.dim() - 2))
        return torch.addcmul(shift.reshape(against), x, scale.reshape(against))
    by, shift = _along(scaled_by(weight, rule), x, rule.axis), _along(bias, x, rule.axis)
    if rule.kind == "group":
        split = x.reshape(x.shape[0], groups, -1)
        normal = _normalized(split, (-1,), eps, True).reshape(x.shape)
    elif rule.kind == "batch":
        dims = (0, *range(2, x.dim()))
        normal = _normalized(x, dims, eps, True)
    elif rule.kind == "l2":
        size = x.pow(2).sum(rule.axis, keepdim=True).sqrt().clamp(min=eps)
        normal = x / size * x.shape[rule.axis] ** 0.5
    elif rule.gate is not None:
        assert gate is not None
        wide = x.float() * ACTS[rule.gate_act](gate.float()) if rule.gate == "before" else x
        split = wide.unflatten(-1, (groups, -1))
        normal = _normalized(split, (-1,), eps, False).flatten(-2)
    else:
        normal = _normalized(x, (rule.axis,), eps, rule.kind == "layer")
    if rule.rounding == "cast_first":
        normal = normal.to(x.dtype)
    elif rule.rounding == "to_weight" and out != torch.float32:
        normal = normal.to(out)
    else:
        by, shift = (None if t is None else t.float() for t in (by, shift))
    y = normal if by is None else by * normal
    y = y if shift is None else y + shift
    if rule.gate in ("within", "after"):
        assert gate is not None
        y = y if rule.gate == "within" else y.to(out)
        return (y * ACTS[rule.gate_act](gate.float())).to(x.dtype)
    return y.to(out)
