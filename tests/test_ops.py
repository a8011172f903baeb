"""torch.library.opcheck on every operator: schema, autograd, shape rule, AOT dispatch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import LAYOUTS
from torch import Tensor
from torch.library import opcheck

import truenorm  # noqa: F401  (registers the operators)

OPS = torch.ops.truenorm
# (num_groups, feature_dims, centred), the shape, the number of parameters
AXES = {
    "batch": ((0, 0, True), (3, 4, 5, 2), 4),
    "instance": ((4, 0, True), (3, 4, 5, 2), 4),
    "group": ((2, 0, True), (3, 4, 5, 2), 4),
    "layer": ((1, 2, True), (3, 4, 5, 2), (5, 2)),
    "rms": ((1, 1, False), (3, 4, 5, 2), 2),
}
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
BY_AXES = pytest.mark.parametrize("axes", AXES)
# opcheck takes a second: a dense layout of each view in memory, and one that is copied
BY_LAYOUT = pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
BY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=[str(d).split(".")[1] for d in DTYPES])
# the double derivatives are float64 formulas in torch ops: half precision rounds them differently
AUTOGRAD_TOLERANCES: dict[str, Any] = {"rtol": 1e-3, "atol": 1e-3}


def tensor(shape: Any, dtype: torch.dtype = torch.float32, grad: bool = True) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_(grad)


def placed(
    shape: Any, layout: str, dtype: torch.dtype = torch.float32, grad: bool = True
) -> Tensor:
    return LAYOUTS[layout](tensor(shape, dtype, grad=False)).requires_grad_(grad)


def statistics(x: Tensor, spec: tuple[int, int, bool]) -> tuple[Tensor, Tensor]:
    _, mean, var = OPS.forward.default(x.detach(), None, None, *spec, 1e-5)
    return mean, var


@BY_LAYOUT
@BY_AXES
def test_forward(axes: str, layout: str) -> None:
    spec, shape, size = AXES[axes]
    x = placed(shape, layout)
    bias = None if axes == "rms" else tensor(size)
    opcheck(OPS.forward.default, (x, tensor(size), bias, *spec, 1e-5))


@BY_DTYPE
@BY_AXES
def test_forward_dtypes(axes: str, dtype: torch.dtype) -> None:
    spec, shape, size = AXES[axes]
    x = tensor(shape, dtype)
    weight = tensor(size, dtype)
    opcheck(OPS.forward.default, (x, weight, None, *spec, 1e-3), **AUTOGRAD_TOLERANCES)


@BY_LAYOUT
def test_apply(layout: str) -> None:
    mean, var = tensor(4, grad=False), tensor(4, grad=False).abs() + 0.5
    for dtype, with_weight in zip(DTYPES, (True, False, True, False), strict=True):
        x = placed((3, 4, 5, 2), layout, dtype)
        weight = tensor(4) if with_weight else None
        arguments = (x, mean, var, weight, tensor(4), 1e-5)
        opcheck(OPS.apply.default, arguments, **AUTOGRAD_TOLERANCES)


@pytest.mark.parametrize("needs", [1, 6])
@pytest.mark.parametrize("fixed", [False, True])
def test_backward_in_part(fixed: bool, needs: int) -> None:
    spec, shape, size = AXES["batch"]
    x = tensor(shape)
    mean, var = statistics(x, spec)
    if fixed:
        mean, var = mean + 0.3, var + 0.7
    arguments = (tensor(shape), x, mean, var, tensor(size), *spec, 1e-5, fixed, needs)
    opcheck(OPS.backward.default, arguments, **AUTOGRAD_TOLERANCES)


@pytest.mark.parametrize("of_grad", ["channels_last", "sliced"])
@BY_AXES
def test_backward(axes: str, of_grad: str) -> None:
    spec, shape, size = AXES[axes]
    x = placed(shape, "channels_last")
    grad = placed(shape, of_grad)
    arguments = (grad, x, *statistics(x, spec), tensor(size), *spec, 1e-5, False, 7)
    opcheck(OPS.backward.default, arguments, **AUTOGRAD_TOLERANCES)


@BY_DTYPE
@pytest.mark.parametrize("axes", ["batch", "rms"])
def test_backward_dtypes(axes: str, dtype: torch.dtype) -> None:
    spec, shape, _ = AXES[axes]
    x = tensor(shape, dtype)
    arguments = (tensor(shape, dtype), x, *statistics(x, spec), None, *spec, 1e-5, False, 1)
    opcheck(OPS.backward.default, arguments, rtol=0.02, atol=0.02)


@BY_LAYOUT
@BY_DTYPE
def test_a_part_of_a_batch(dtype: torch.dtype, layout: str) -> None:
    spec, shape, size = AXES["batch"]
    x, grad = (placed(shape, layout, dtype, grad=False) for _ in range(2))
    weight = tensor(size, grad=False)
    mean, var = statistics(x, spec)
    assert all(torch.equal(a, b) for a, b in zip(OPS.moments(x), (mean, var), strict=True))
    opcheck(OPS.moments.default, (x,))
    arguments = (grad, x, mean, var, None, *spec, 1e-5, True, 6)
    _, of_weight, of_bias = OPS.backward(*arguments[:4], torch.ones(4).double(), *arguments[5:])
    means = of_bias * weight / 30, of_weight * weight / 30
    of_x = OPS.backward_of_part(grad, x, mean, var, weight, *means, 1e-5)
    whole = OPS.backward(grad, x, mean, var, weight, *spec, 1e-5, False, 1)[0]
    # the same sums, multiplied and divided in another order
    assert of_x.stride() == whole.stride()
    torch.testing.assert_close(of_x, whole)
    opcheck(OPS.backward_of_part.default, (grad, x, mean, var, weight, *means, 1e-5))


@pytest.mark.parametrize("momentum", [0.3, None])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_update_running(dtype: torch.dtype, momentum: float | None) -> None:
    running = [tensor(4, dtype, grad=False), tensor(4, dtype, grad=False)]
    x = torch.randn(3, 4, 10)
    # batch statistics, and those of each sample
    for statistic in (4, 12):
        mean, var = (tensor(statistic, torch.float64, grad=False) for _ in range(2))
        tracked = torch.tensor(3)
        opcheck(OPS.update_running_.default, (*running, tracked, x, mean, var, momentum))
    if momentum is not None:
        opcheck(OPS.update_running_.default, (*running, None, x, mean, var, momentum))
    mean, var = (tensor(4, torch.float64, grad=False) for _ in range(2))
    for count, skip in ((None, False), (None, True), (torch.tensor([30.0]), True)):
        opcheck(OPS.track_.default, (*running, tracked, x, mean, var, count, momentum, skip))


@pytest.mark.parametrize(
    ("dtype", "layout"),
    [
        (torch.float64, "contiguous"),
        (torch.float32, "channels_last"),
        (torch.bfloat16, "sliced"),
        (torch.float16, "contiguous"),
    ],
)
def test_local_response_norm(dtype: torch.dtype, layout: str) -> None:
    x, grad = placed((3, 4, 5, 2), layout, dtype), tensor((3, 4, 5, 2), dtype)
    spec = (3, 0.3, 0.75, 1.0)
    opcheck(OPS.local_response_norm.default, (x, *spec), **AUTOGRAD_TOLERANCES)
    opcheck(OPS.local_response_norm_backward.default, (grad, x, *spec), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("axes", AXES)
def test_forward_with_an_activation(axes: str) -> None:
    spec, shape, size = AXES[axes]
    place = list(AXES).index(axes)
    x, residual = placed(shape, "channels_last"), placed(shape, "contiguous")
    after = place + 1, 0.2
    args = (x, tensor(size), tensor(size), None if place % 2 else residual, *spec, 1e-5, *after)
    opcheck(OPS.forward_act.default, args, **AUTOGRAD_TOLERANCES)
    detached = [a.detach() if isinstance(a, Tensor) else a for a in args]
    opcheck(OPS.forward_act_.default, detached)


@pytest.mark.parametrize("act", [0, 2, 6])
def test_apply_with_an_activation(act: int) -> None:
    mean, var = tensor(4, grad=False), tensor(4, grad=False).abs() + 0.5
    x, residual = placed((3, 4, 5, 2), "sliced"), tensor((3, 4, 5, 2))
    args = (x, mean, var, tensor(4), tensor(4), residual, 1e-5, act, 0.2)
    opcheck(OPS.apply_act.default, args, **AUTOGRAD_TOLERANCES)
    detached = [a.detach() if isinstance(a, Tensor) else a for a in args]
    opcheck(OPS.apply_act_.default, detached)


@pytest.mark.parametrize(("act", "needs"), [(3, 15), (4, 1), (5, 14), (2, 31), (1, 25)])
@pytest.mark.parametrize("fixed", [False, True])
def test_backward_with_an_activation(fixed: bool, act: int, needs: int) -> None:
    spec, shape, size = AXES["batch"]
    x = tensor(shape)
    mean, var = statistics(x, spec)
    tensors = (tensor(shape), x, mean, var, tensor(size), tensor(size), tensor(shape))
    args = (*tensors, *spec, 1e-5, fixed, act, 0.2 if act == 2 else 0.0, needs)
    opcheck(OPS.backward_act.default, args, **AUTOGRAD_TOLERANCES)


def test_every_operator_is_here() -> None:
    tested = {"forward", "apply", "backward", "update_running_", "track_"}
    tested |= {"moments", "backward_of_part"}
    # by test_mask.py
    tested |= {"masked_forward", "masked_backward"}
    tested |= {"local_response_norm", "local_response_norm_backward"}
    tested |= {"forward_act", "forward_act_", "apply_act", "apply_act_", "backward_act"}
    # by test_eager.py
    tested |= {"eager_forward", "eager_forward_running", "eager_apply", "eager_backward"}
    registered = {
        name.removeprefix("truenorm::").split(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("truenorm::")
    }
    assert registered == tested
