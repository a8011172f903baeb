"""The activations that a layer can end with, by number, as torch's functions."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# in the order of csrc/activation.h
NONE, RELU, LEAKY_RELU, HARDSWISH, ELU, SILU, GELU, GELU_TANH, RELU6 = range(9)

# kind and parameter
Act = tuple[int, float]


def act(z: Tensor, kind: int, parameter: float) -> Tensor:
    """parameter: leaky_relu's slope below zero, elu's alpha."""
    match kind:
        case 0:
            return z
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
    raise ValueError(f"there is no activation of number {kind}")


def act_backward(grad: Tensor, z: Tensor, kind: int, parameter: float) -> Tensor:
    """grad · act'(z), by torch's operator."""
    aten: Any = torch.ops.aten
    match kind:
        case 0:
            return grad
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
    raise ValueError(f"there is no activation of number {kind}")


# ---------------------------------------------------------------- read off a graph's nodes


def leaky(negative_slope: Any = 0.01, inplace: Any = False) -> Act | None:
    return _with_number(LEAKY_RELU, negative_slope)


def elu(alpha: Any = 1.0, inplace: Any = False) -> Act | None:
    return _with_number(ELU, alpha)


def _scaled_elu(alpha: Any = 1.0, scale: Any = 1, input_scale: Any = 1) -> Act | None:
    return _with_number(ELU, alpha) if scale == 1 and input_scale == 1 else None


def gelu(*, approximate: Any = "none") -> Act | None:
    kinds = {"none": GELU, "tanh": GELU_TANH}
    return (kinds[approximate], 0.0) if approximate in kinds else None


def _clamped(min_val: Any = -1.0, max_val: Any = 1.0, inplace: Any = False) -> Act | None:
    return (RELU6, 0.0) if (min_val, max_val) == (0, 6) else None


def _with_number(kind: int, number: Any) -> Act | None:
    return (kind, float(number)) if isinstance(number, (int, float)) else None


def _simple(kind: int) -> Callable[..., Act]:
    def of(inplace: Any = False) -> Act:
        return kind, 0.0

    return of


_aten: Any = torch.ops.aten
# what takes a tensor, and reads the rest of its arguments
_FUNCTIONS: dict[Any, Callable[..., Act | None]] = {
    F.relu: _simple(RELU),
    F.relu_: _simple(RELU),
    torch.relu: _simple(RELU),
    torch.relu_: _simple(RELU),
    _aten.relu.default: _simple(RELU),
    F.relu6: _simple(RELU6),
    F.hardtanh: _clamped,
    F.hardtanh_: _clamped,
    _aten.hardtanh.default: _clamped,
    F.silu: _simple(SILU),
    _aten.silu.default: _simple(SILU),
    F.hardswish: _simple(HARDSWISH),
    _aten.hardswish.default: _simple(HARDSWISH),
    F.leaky_relu: leaky,
    F.leaky_relu_: leaky,
    _aten.leaky_relu.default: leaky,
    F.elu: elu,
    F.elu_: elu,
    _aten.elu.default: _scaled_elu,
    F.gelu: gelu,
    _aten.gelu.default: gelu,
}


def of_call(op: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Act | None:
    """The activation that a graph's node applies to its first argument."""
    if op == "call_method":
        alone = len(args) == 1 and not kwargs
        return (RELU, 0.0) if target in ("relu", "relu_") and alone else None
    if op != "call_function" or not args or target not in _FUNCTIONS:
        return None
    try:
        return _FUNCTIONS[target](*args[1:], **kwargs)
    except TypeError:  # arguments that these know nothing of
        return None


@cache
def _place(function: Any, name: str) -> int | None:
    if not callable(function):
        return None
    try:
        names = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return None
    return names.index(name) if name in names else None


def argument(function: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A function's argument by name, however it is passed; None where it is not."""
    place = _place(function, name)
    return args[place] if place is not None and place < len(args) else kwargs.get(name)
