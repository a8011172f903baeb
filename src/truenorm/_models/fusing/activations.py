"""Activations that a layer can end with, as modules, functions and methods of torch."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Node
from torch.nn import Module

from ..._core import activation
from .memory import is_plain, module_of

Act = tuple[int, float]
_FUNCTIONS = {
    F.relu: activation.RELU,
    torch.relu: activation.RELU,
    torch.relu_: activation.RELU,
    F.relu_: activation.RELU,
    F.relu6: activation.RELU6,
    F.silu: activation.SILU,
    F.hardswish: activation.HARDSWISH,
}
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


def _leaky(negative_slope: Any = 0.01, inplace: Any = False) -> Act | None:
    number = isinstance(negative_slope, (int, float))
    return (activation.LEAKY_RELU, float(negative_slope)) if number else None


def _elu(alpha: Any = 1.0, inplace: Any = False) -> Act | None:
    return (activation.ELU, float(alpha)) if isinstance(alpha, (int, float)) else None


def _gelu(*, approximate: Any = "none") -> Act | None:
    kinds = {"none": activation.GELU, "tanh": activation.GELU_TANH}
    return (kinds[approximate], 0.0) if approximate in kinds else None


def _of_module(module: Any) -> Act | None:
    # a subclass may do more
    kind = type(module)
    if not is_plain(module):
        return None
    if kind in _PLAIN:
        return _PLAIN[kind], 0.0
    if kind is torch.nn.LeakyReLU:
        return _leaky(module.negative_slope)
    if kind is torch.nn.ELU:
        return _elu(module.alpha)
    return _gelu(approximate=module.approximate) if kind is torch.nn.GELU else None


def activation_of(root: Module, node: Node) -> Act | None:
    """The activation that a node applies to its only tensor."""
    if (module := module_of(root, node)) is not None:
        return _of_module(module) if len(node.args) == 1 and not node.kwargs else None
    if node.op == "call_method" and node.target in ("relu", "relu_") and len(node.args) == 1:
        return activation.RELU, 0.0
    if node.op != "call_function" or not node.args:
        return None
    rest, named = node.args[1:], dict(node.kwargs)
    try:
        if node.target is F.leaky_relu:
            return _leaky(*rest, **named)
        if node.target is F.elu:
            return _elu(*rest, **named)
        if node.target is F.gelu:
            return _gelu(*rest, **named)
    except TypeError:  # arguments that these know nothing of
        return None
    if node.target in _FUNCTIONS and set(named) <= {"inplace"} and len(rest) <= 1:
        return _FUNCTIONS[node.target], 0.0
    return None
