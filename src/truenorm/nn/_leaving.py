"""When another library's class serves a call itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._core import route
from .._core.rule import Rule

# values, of which a call's time is what calls cost
SMALL = 4096
_SMALL_UNIT = 16_384
_SMALL_UNLIKE = 65_536


def is_faster_there(layer: Any, x: Tensor, rule: Rule) -> bool:
    """Whether torch takes less time: its layer_norm, or a class's own steps in small sizes."""
    if not x.is_cpu:
        return False
    if rule.kind == "l2":
        inside = rule.axis == 1 and not x.is_contiguous()
        return inside and x.numel() < _SMALL_UNIT and not torch.is_grad_enabled()
    if rule.kind == "weight":
        return bool(layer.weight.numel() < _SMALL_UNLIKE)
    if rule.kind == "response":
        return x.numel() < _SMALL_UNLIKE
    if not layer._is_torchs:
        return False
    if rule.axis == 1:
        # with the channels inside torch's takes as long; else it copies, which takes longer
        return x.numel() < _SMALL_UNLIKE or (x.dtype == torch.float32 and not x.is_contiguous())
    return x.numel() < SMALL


def small_of(rule: Rule, is_torchs: bool) -> int:
    """How many values a class's own forward serves sooner, whatever else holds; 0 for none."""
    if rule.kind in ("weight", "response"):
        return _SMALL_UNLIKE
    if not is_torchs or rule.kind not in ("layer", "rms"):
        return 0
    return _SMALL_UNLIKE if rule.axis == 1 else SMALL


def is_watched(*tensors: Tensor | None) -> bool:
    """Whether somebody records, transforms or recasts the operators of this call."""
    x = tensors[0]
    assert x is not None
    return (
        torch._C._len_torch_dispatch_stack() > 0 or route.standard() or route.transformed(*tensors)
    )
