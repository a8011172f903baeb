"""Activations that a layer can end with, as modules, functions and methods of torch."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node
from torch.nn import Module

from ..._core import activation
from ..._core.activation import Act
from .memory import is_plain, module_of

_PLAIN = {
    torch.nn.ReLU: activation.RELU,
    torch.nn.ReLU6: activation.RELU6,
    torch.nn.SiLU: activation.SILU,
    torch.nn.Hardswish: activation.HARDSWISH,
}
# the attributes that say what else an activation does
PARAMETERS: dict[type, str] = {
    torch.nn.LeakyReLU: "negative_slope",
    torch.nn.ELU: "alpha",
    torch.nn.GELU: "approximate",
}


def _of_module(module: Any) -> Act | None:
    # a subclass may do more
    kind = type(module)
    if not is_plain(module):
        return None
    if kind in _PLAIN:
        return _PLAIN[kind], 0.0
    if kind is torch.nn.LeakyReLU:
        return activation.leaky(module.negative_slope)
    if kind is torch.nn.ELU:
        return activation.elu(module.alpha)
    return activation.gelu(approximate=module.approximate) if kind is torch.nn.GELU else None


def activation_of(root: Module, node: Node) -> Act | None:
    """The activation that a node applies to its only tensor."""
    if (module := module_of(root, node)) is not None:
        return _of_module(module) if len(node.args) == 1 and not node.kwargs else None
    return activation.of_call(node.op, node.target, node.args, dict(node.kwargs))
