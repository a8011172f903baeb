"""The operators with an activation and a residual: schemas, plain kernels, shape rules.

y = act(norm(x) + residual). activated.py makes them differentiable.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _axes, _plain
from .._axes import BATCH, Axes
from . import operators
from .operators import NEEDS_BIAS, NEEDS_INPUT, NEEDS_WEIGHT

# BY_OUTPUT: in the residual's place stands y, whose sign is that of what the activation took
NEEDS_RESIDUAL, BY_OUTPUT = 8, 16
# in the order of csrc/activation.h
NONE, RELU, LEAKY_RELU, HARDSWISH, ELU, SILU, GELU, GELU_TANH, RELU6 = range(9)


class Epilogue(NamedTuple):
    """What comes after the affine step."""

    act: int = NONE
    parameter: float = 0.0  # leaky_relu: the slope below zero; elu: alpha
    residual: Tensor | None = None
    inplace: bool = False


def act(z: Tensor, kind: int, parameter: float) -> Tensor:
    """One of the activations above, by torch's function."""
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
            return aten.silu_backward(grad, z)  # type: ignore[no-any-return]
        case 6:
            return aten.gelu_backward(grad, z)  # type: ignore[no-any-return]
        case 7:
            return aten.gelu_backward(grad, z, approximate="tanh")  # type: ignore[no-any-return]
        case 8:
            return aten.hardtanh_backward(grad, z, 0.0, 6.0)  # type: ignore[no-any-return]
    return grad


# ---------------------------------------------------------------- operators

_AFTER = "Tensor? residual"
_AXES = operators._AXES
_ACT = "int act, float parameter"
_SCHEMAS = {
    "forward_act": f"(Tensor x, Tensor? weight, Tensor? bias, {_AFTER}, {_AXES}, float eps, {_ACT})"
    " -> (Tensor, Tensor, Tensor)",
    "forward_act_": f"(Tensor(a!) x, Tensor? weight, Tensor? bias, {_AFTER}, {_AXES}, float eps,"
    f" {_ACT}) -> (Tensor, Tensor)",
    "apply_act": f"(Tensor x, Tensor mean, Tensor var, Tensor? weight, Tensor? bias, {_AFTER},"
    f" float eps, {_ACT}) -> Tensor",
    "apply_act_": f"(Tensor(a!) x, Tensor mean, Tensor var, Tensor? weight, Tensor? bias, {_AFTER},"
    f" float eps, {_ACT}) -> ()",
    "backward_act": "(Tensor grad, Tensor x, Tensor mean, Tensor var, Tensor? weight, Tensor? bias,"
    f" {_AFTER}, {_AXES}, float eps, bool fixed, {_ACT}, int needs)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
}


def plain_apply(
    x: Tensor,
    statistics: tuple[Tensor, Tensor],
    weight: Tensor | None,
    bias: Tensor | None,
    axes: Axes,
    eps: float,
    after: Epilogue,
) -> Tensor:
    wide = _plain._wide(x)
    z = _plain.apply(wide, *statistics, weight, bias, axes, eps)
    if after.residual is not None:
        z = z + _plain._wide(after.residual)
    return _plain._like(act(z, after.act, after.parameter), x, axes)


def _plain_forward_act(
    x: Tensor, weight: Any, bias: Any, residual: Any, g: int, f: int, c: bool, eps: float, *a: Any
) -> tuple[Tensor, Tensor, Tensor]:
    axes = Axes(g, f, c)
    mean, var = _plain.moments(x, axes)
    y = plain_apply(x, (mean, var), weight, bias, axes, eps, Epilogue(a[0], a[1], residual))
    return y, mean, var


def _plain_forward_act_(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    y, mean, var = _plain_forward_act(x, *rest)
    x.copy_(y)
    return mean, var


def _plain_apply_act(
    x: Tensor, mean: Tensor, var: Tensor, weight: Any, bias: Any, residual: Any, eps: float, *a: Any
) -> Tensor:
    return plain_apply(x, (mean, var), weight, bias, BATCH, eps, Epilogue(a[0], a[1], residual))


def _plain_apply_act_(x: Tensor, *rest: Any) -> None:
    x.copy_(_plain_apply_act(x, *rest))


def _plain_backward_act(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Any,
    bias: Any,
    residual: Any,
    num_groups: int,
    feature_dims: int,
    centred: bool,
    eps: float,
    fixed: bool,
    kind: int,
    parameter: float,
    needs: int,
) -> tuple[Tensor, ...]:
    axes = Axes(num_groups, feature_dims, centred)
    v = _plain._wide(x)
    if needs & BY_OUTPUT:
        z = _plain._wide(residual)
    else:
        z = _plain.apply(v, mean, var, weight, bias, axes, eps)
        z = z if residual is None else z + _plain._wide(residual)
    of_z = act_backward(_plain._wide(grad), z, kind, parameter)
    of_x, of_weight, of_bias = _plain.backward(of_z, v, mean, var, weight, axes, eps, fixed=fixed)
    shape, dtype = operators.parameter_like(x, weight, feature_dims)
    nothing = x.new_empty(0, dtype=dtype)
    return (
        _plain._like(of_x, x, axes) if needs & NEEDS_INPUT else x.new_empty(0),
        of_weight.view(shape).to(dtype) if needs & NEEDS_WEIGHT else nothing,
        of_bias.view(shape).to(dtype) if needs & NEEDS_BIAS else nothing.clone(),
        _plain._like(of_z, x, axes) if needs & NEEDS_RESIDUAL else x.new_empty(0),
    )


def _fake_forward_act(
    x: Tensor, weight: Any, bias: Any, residual: Any, g: int, f: int, c: bool, eps: float, *a: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return operators._fake_forward(x, weight, bias, g, f, c, eps)


def _fake_forward_act_(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    _, mean, var = _fake_forward_act(x, *rest)
    return mean, var


def _fake_apply_act(x: Tensor, *rest: Any) -> Tensor:
    return _axes.empty_result(x, BATCH)


def _fake_apply_act_(x: Tensor, *rest: Any) -> None:
    return None


def _fake_backward_act(
    grad: Tensor, x: Tensor, mean: Any, var: Any, weight: Any, bias: Any, residual: Any, *rest: Any
) -> tuple[Tensor, ...]:
    *axes, eps, fixed, _, _, needs = rest
    made = operators._fake_backward(grad, x, mean, var, weight, *(*axes, eps, fixed, needs))
    of_residual = _axes.empty_result(x, Axes(*axes)) if needs & NEEDS_RESIDUAL else x.new_empty(0)
    return *made, of_residual


_library = operators._library_def
for _name, _schema in _SCHEMAS.items():
    _library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(_name, globals()[f"_plain_{_name}"], "CompositeExplicitAutograd")
    _library.register_fake(_name, globals()[f"_fake_{_name}"])
forward_act = torch.ops.truenorm.forward_act.default
forward_act_ = torch.ops.truenorm.forward_act_.default
apply_act = torch.ops.truenorm.apply_act.default
apply_act_ = torch.ops.truenorm.apply_act_.default
backward_act = torch.ops.truenorm.backward_act.default
