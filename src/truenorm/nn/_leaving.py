"""When another library's class serves a call itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._core import route
from .._core.rule import Rule

# values, of which a call's time is what calls cost
_SMALL = 4096
_SMALL_UNLIKE = 65_536


def is_faster_there(layer: Any, x: Tensor, rule: Rule) -> bool:
    """Whether torch takes less time: its layer_norm, or a class's own steps in small sizes."""
    if not x.is_cpu:
        return False
    if rule.axis == 1 and rule.kind in ("l2", "rms"):
        # two copies, to have the channels inside and back, take longer than what is saved
        return layer._keeps and x.is_contiguous() and not torch.is_grad_enabled()
    if rule.kind == "l2":
        return False
    if rule.kind == "weight":
        return bool(layer.weight.numel() < _SMALL_UNLIKE)
    if rule.kind == "response":
        return x.numel() < _SMALL_UNLIKE
    if not layer._is_torchs:
        return False
    return x.numel() < _SMALL or (rule.axis == 1 and x.dtype == torch.float32)


def is_watched(*tensors: Tensor | None) -> bool:
    """Whether somebody records, transforms or recasts the operators of this call."""
    x = tensors[0]
    assert x is not None
    return (
        torch._C._len_torch_dispatch_stack() > 0 or route.standard() or route.transformed(*tensors)
    )
