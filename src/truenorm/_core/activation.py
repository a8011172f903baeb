"""The activations that a layer can end with, by number, as torch's functions."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# in the order of csrc/activation.h
NONE, RELU, LEAKY_RELU, HARDSWISH, ELU, SILU, GELU, GELU_TANH, RELU6 = range(9)


def act(z: Tensor, kind: int, parameter: float) -> Tensor:
    """parameter: leaky_relu's slope below zero, elu's alpha."""
    match kind:
        case 1:
            return F.relu(z)
        case 2:
            return F.leaky_relu(z, parameter)
        case 3:
            return F.hardswish(z)
        case 4:
            return F.elu(z, parameter)
        case 5:
            return F.silu(z)
        case 6:
            return F.gelu(z)
        case 7:
            return F.gelu(z, approximate="tanh")
        case 8:
            return F.relu6(z)
    return z


def act_backward(grad: Tensor, z: Tensor, kind: int, parameter: float) -> Tensor:
    """grad · act'(z), by torch's operator."""
    aten: Any = torch.ops.aten
    match kind:
        case 1:
            return aten.threshold_backward(grad, z, 0.0)  # type: ignore[no-any-return]
        case 2:
            return aten.leaky_relu_backward(grad, z, parameter, False)  # type: ignore[no-any-return]
        case 3:
            return aten.hardswish_backward(grad, z)  # type: ignore[no-any-return]
        case 4:
            return aten.elu_backward(grad, parameter, 1.0, 1.0, False, z)  # type: ignore[no-any-return]
        case 5:
            # torch's own has no derivative
            sigmoid = torch.sigmoid(z)
            return grad * sigmoid * (1.0 + z * (1.0 - sigmoid))
        case 6:
            return aten.gelu_backward(grad, z)  # type: ignore[no-any-return]
        case 7:
            return aten.gelu_backward(grad, z, approximate="tanh")  # type: ignore[no-any-return]
        case 8:
            return aten.hardtanh_backward(grad, z, 0.0, 6.0)  # type: ignore[no-any-return]
    return grad
