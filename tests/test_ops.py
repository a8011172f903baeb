"""torch.library.opcheck on every operator: schema, autograd, shape rule, AOT dispatch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import LAYOUTS
from torch import Tensor
from torch.library import opcheck

from truenorm._core.call import BY_OUTPUT, KEEP, Form
from truenorm._core.geometry import BATCH, Axes, group, instance, layer, rms

# opcheck of torch 2.14 looks at the .grad of its own copies
pytestmark = pytest.mark.filterwarnings(
    r"ignore:The \.grad attribute of a Tensor that is not a leaf"
)

OPS = torch.ops.truenorm
# which values share a statistic, the shape, the shape of weight and bias
AXES: dict[str, tuple[Axes, tuple[int, ...], Any]] = {
    "batch": (BATCH, (3, 4, 5, 2), 4),
    "instance": (instance(4), (3, 4, 5, 2), 4),
    "group": (group(2), (3, 4, 5, 2), 4),
    "layer": (layer(2), (3, 4, 5, 2), (5, 2)),
    "rms": (rms(1), (3, 4, 5, 2), 2),
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


def mask_of(shape: Any, axes: Axes) -> Tensor:
    if axes.feature_dims:
        return torch.rand(shape[: len(shape) - axes.feature_dims]) < 0.6
    return torch.rand(shape[0], *shape[2:]) < 0.6


def numbers(x: Tensor, axes: Axes, flags: int, act: int = 0, **form: Any) -> tuple[Any, ...]:
    """(form, eps, parameter)"""
    parameter = 0.2 if act in (2, 4) else 0.0
    return Form(axes, 1e-3, act=act, parameter=parameter, **form).numbers(x, flags)


def norm_args(x: Tensor, axes: Axes, given: Any = (None, None), **more: Any) -> tuple[Any, ...]:
    """norm's, by name what is not None or 0."""
    tensors = (more.pop(name, None) for name in ("weight", "bias", "mask", "residual"))
    return (x, *tensors, *given, *numbers(x, axes, KEEP, **more), 1.5)


def record_of(x: Tensor, axes: Axes, mask: Tensor | None = None) -> Tensor:
    record: Tensor = OPS.statistics(x.detach(), mask, Form(axes, 0.0).bits(x))
    return record


@BY_LAYOUT
@BY_AXES
def test_norm(axes: str, layout: str) -> None:
    own, shape, size = AXES[axes]
    x = placed(shape, layout)
    bias = None if axes == "rms" else tensor(size)
    opcheck(OPS.norm.default, norm_args(x, own, weight=tensor(size), bias=bias))


@BY_DTYPE
@BY_AXES
def test_norm_dtypes(axes: str, dtype: torch.dtype) -> None:
    own, shape, size = AXES[axes]
    args = norm_args(tensor(shape, dtype), own, weight=tensor(size, dtype))
    opcheck(OPS.norm.default, args, **AUTOGRAD_TOLERANCES)


@BY_LAYOUT
@BY_AXES
def test_norm_of_everything(axes: str, layout: str) -> None:
    """Mask, activation, residual, statistics of its own and given ones."""
    own, shape, size = AXES[axes]
    place = list(AXES).index(axes)
    x, residual = placed(shape, layout), placed(shape, "contiguous")
    more: dict[str, Any] = {"weight": tensor(size), "mask": mask_of(shape, own), "act": place + 1}
    if place % 2:
        more |= {"residual": residual, "bias": tensor(size)}
    opcheck(OPS.norm.default, norm_args(x, own, **more), **AUTOGRAD_TOLERANCES)
    mean, var, _ = record_of(x, own)
    args = norm_args(x, own, (mean + 0.3, var + 0.7), constant=True, **more)
    opcheck(OPS.norm.default, args, **AUTOGRAD_TOLERANCES)
    detached = [a.detach() if isinstance(a, Tensor) else a for a in args]
    opcheck(OPS.norm_.default, detached)


@BY_LAYOUT
def test_norm_by_running_statistics(layout: str) -> None:
    mean, var = tensor(4, grad=False), tensor(4, grad=False).abs() + 0.5
    for dtype, with_weight in zip(DTYPES, (True, False, True, False), strict=True):
        x = placed((3, 4, 5, 2), layout, dtype)
        weight = tensor(4) if with_weight else None
        args = norm_args(x, BATCH, (mean, var), constant=True, weight=weight, bias=tensor(4))
        opcheck(OPS.norm.default, args, **AUTOGRAD_TOLERANCES)


@pytest.mark.parametrize("of_grad", ["channels_last", "sliced"])
@BY_AXES
def test_backward(axes: str, of_grad: str) -> None:
    own, shape, size = AXES[axes]
    x, grad = placed(shape, "channels_last"), placed(shape, of_grad)
    tensors = grad, x, record_of(x, own), tensor(size), None, None, None, None
    opcheck(OPS.norm_backward.default, (*tensors, *numbers(x, own, 7)), **AUTOGRAD_TOLERANCES)


@BY_DTYPE
@pytest.mark.parametrize("axes", ["batch", "rms"])
def test_backward_dtypes(axes: str, dtype: torch.dtype) -> None:
    own, shape, _ = AXES[axes]
    x = tensor(shape, dtype)
    tensors = tensor(shape, dtype), x, record_of(x, own), *[None] * 5
    opcheck(OPS.norm_backward.default, (*tensors, *numbers(x, own, 1)), rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    ("act", "flags"), [(0, 1), (0, 6), (3, 15), (4, 1), (5, 14), (2, 15 | BY_OUTPUT), (1, 25)]
)
@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_backward_of_everything(masked: bool, constant: bool, act: int, flags: int) -> None:
    own, shape, size = AXES["batch"]
    x, mask = tensor(shape), mask_of(shape, BATCH) if masked else None
    record = record_of(x, own, mask)
    if constant:
        record = record + torch.tensor([[0.3], [0.7], [0.0]])
    tensors = tensor(shape), x, record, tensor(size), tensor(size), mask, tensor(shape), None
    args = *tensors, *numbers(x, own, flags, act, constant=constant)
    opcheck(OPS.norm_backward.default, args, **AUTOGRAD_TOLERANCES)


@BY_LAYOUT
@BY_DTYPE
@pytest.mark.parametrize("axes", ["batch", "instance", "group"])
def test_a_part_of_a_batch(axes: str, dtype: torch.dtype, layout: str) -> None:
    own, shape, size = AXES[axes]
    x, grad = (placed(shape, layout, dtype, grad=False) for _ in range(2))
    weight = tensor(size, grad=False)
    record = record_of(x, own)
    opcheck(OPS.statistics.default, (x, None, Form(own, 0.0).bits(x)))
    tensors = grad, x, record, weight, None, None, None
    form = numbers(x, own, 1)
    opcheck(OPS.gradient_sums.default, (*tensors, *form))
    sums = OPS.gradient_sums(*tensors, *form).view(2, -1, 4) * weight
    means = sums.view(2, record.shape[1], -1).sum(2) / record[2]
    of_x = OPS.norm_backward(*tensors, means, *form)[0]
    whole = OPS.norm_backward(*tensors, None, *form)[0]
    # the same sums, multiplied and divided in another order
    assert of_x.stride() == whole.stride()
    torch.testing.assert_close(of_x, whole)
    opcheck(
        OPS.norm_backward.default,
        (*tensors, means, *form),
        # a second derivative needs the other parts
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


@pytest.mark.parametrize("momentum", [0.3, None])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_move(dtype: torch.dtype, momentum: float | None) -> None:
    running = [tensor(4, dtype, grad=False), tensor(4, dtype, grad=False)]
    # batch statistics, and those of each sample
    for statistics in (4, 12):
        record = tensor((3, statistics), torch.float64, grad=False).abs()
        record[2] = 30.0
        tracked = torch.tensor(3)
        for skip in (False, True):
            opcheck(OPS.move_.default, (*running, tracked, record, momentum, skip))
            opcheck(OPS.move_once_.default, (*running, tracked, record, momentum, skip))
    if momentum is not None:
        opcheck(OPS.move_.default, (*running, None, record, momentum, False))


@pytest.mark.parametrize(
    ("dtype", "layout"),
    [
        (torch.float64, "contiguous"),
        (torch.float32, "channels_last"),
        (torch.bfloat16, "sliced"),
        (torch.float16, "contiguous"),
    ],
)
def test_response(dtype: torch.dtype, layout: str) -> None:
    x, grad = placed((3, 4, 5, 2), layout, dtype), tensor((3, 4, 5, 2), dtype)
    window = (3, 0.3, 0.75, 1.0)
    opcheck(OPS.response.default, (x, *window), **AUTOGRAD_TOLERANCES)
    opcheck(OPS.response_backward.default, (grad, x, *window), rtol=0.02, atol=0.02)


def test_a_record_must_be_kept_for_a_backward() -> None:
    x = tensor((3, 4))
    form = numbers(x, BATCH, 0)
    y, record = OPS.norm(x, *[None] * 6, *form, 0.0)
    assert record.shape == (0,)
    with pytest.raises(RuntimeError, match="`form` must hold KEEP"):
        y.backward(torch.randn_like(y))


def test_a_second_derivative_of_a_part_is_refused() -> None:
    x, grad = tensor((3, 4)), tensor((3, 4))
    sums = torch.zeros(2, 4, dtype=torch.float64)
    tensors = grad, x, record_of(x, BATCH), None, None, None, None, sums
    of_x = OPS.norm_backward(*tensors, *numbers(x, BATCH, 1))[0]
    with pytest.raises(NotImplementedError, match="`sums` was given"):
        of_x.backward(torch.randn_like(of_x))


def test_every_operator_is_here() -> None:
    tested = {"norm", "norm_", "norm_backward", "statistics", "gradient_sums"}
    tested |= {"move_", "move_once_", "response", "response_backward"}
    # by test_eager.py
    tested |= {"eager_norm", "eager_norm_given", "eager_norm_more", "eager_norm_backward"}
    # by test_graphs.py
    tested |= {"norm_below", "norm_backward_below"}
    # by test_added.py
    tested |= {"eager_add_norm", "eager_add_norm_backward", "add_norm", "add_norm_backward"}
    # by test_gated.py
    tested |= {"eager_gated_norm", "eager_gated_norm_backward"}
    # by test_triton_gated.py
    tested |= {"gated_norm", "gated_norm_backward"}
    registered = {
        name.removeprefix("truenorm::").split(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("truenorm::")
    }
    assert registered == tested
