"""Forms that round each step to the input's dtype, and those whose weight is 1 + weight."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from on_triton import HAS_CUDA, HAS_TRITON
from tolerances import relative
from torch import Tensor
from torch.library import opcheck

from truenorm._core import library, operators
from truenorm._core.activation import HARDSWISH, LEAKY_RELU, RELU, SILU
from truenorm._core.call import (
    ACT,
    FEATURES,
    GROUPS,
    KEEP,
    ONE_PLUS,
    PER_CHANNEL,
    ROUNDS,
    UNCENTRED,
)

SERVED = [
    pytest.param("plain"),
    pytest.param("native", marks=pytest.mark.skipif(library.NATIVE is None, reason="no library")),
    pytest.param(
        "triton", marks=pytest.mark.skipif(HAS_CUDA or not HAS_TRITON, reason="no interpreter")
    ),
]
BY_SERVER = pytest.mark.parametrize("server", SERVED)
HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
EPS = 1e-3
ALL = 15


def serve(server: str, name: str, *args: Any) -> Any:
    if server == "plain":
        return operators.PLAIN[name](*args)
    if server == "triton":
        from triton_calls import run

        return run(name, *args)
    with torch._C._AutoDispatchBelowAutograd():
        return getattr(torch.ops.truenorm, name).default(*args)


def norm(server: str, x: Tensor, w: Any, b: Any, residual: Any, form: int) -> Any:
    tensors = x, w, b, None, residual, None, None
    return serve(server, "norm", *tensors, form | KEEP, EPS, 0.0, 0.0)


def x_hat(x: Tensor, centred: bool) -> Tensor:
    """In float64."""
    v = x.double()
    d = v - v.mean(-1, keepdim=True) * centred
    return d / (d.square().mean(-1, keepdim=True) + EPS).sqrt()


def drawn(dtype: torch.dtype, rows: int = 37, features: int = 133) -> tuple[Tensor, ...]:
    x = torch.randn(rows, features).mul(3.0).add(1.0)
    weight, bias = torch.randn(features).mul(0.3).add(1.0), torch.randn(features)
    return tuple(t.to(dtype) for t in (x, weight, bias, torch.randn(rows, features)))


@pytest.mark.parametrize(
    ("server", "features"),
    # the interpreter takes its time
    [pytest.param(*s.values, f, marks=s.marks) for s in SERVED[:2] for f in (3, 133, 1024)]
    + [pytest.param("triton", 19, marks=SERVED[2].marks)],
)
@HALF
@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize(
    ("has_bias", "has_residual"), [*itertools.product([False, True], repeat=2)]
)
def test_each_step_is_an_operator_of_the_dtype(
    server: str, features: int, dtype: torch.dtype, centred: bool, has_bias: bool,
    has_residual: bool,
) -> None:  # fmt: skip
    x, weight, bias, residual = drawn(dtype, features=features)
    form = 1 << FEATURES | ROUNDS | (0 if centred else UNCENTRED)
    b, r = bias if has_bias else None, residual if has_residual else None
    y, _ = norm(server, x, weight, b, r, form)
    expected = x_hat(x, centred).float().to(dtype) * weight
    expected = expected if b is None else expected + b
    expected = expected if r is None else expected + r
    assert y.dtype == dtype
    # float32's rounding error decides a tie now and then, at x̂
    assert (y != expected).double().mean() < 2e-3
    torch.testing.assert_close(y, expected, rtol=2**-6, atol=2**-5)
    once, _ = norm(server, x, weight, b, r, form & ~ROUNDS)
    assert (once != expected).double().mean() > 0.1


@BY_SERVER
@HALF
@pytest.mark.parametrize("act", [RELU, SILU])
def test_an_activation_behind_it(server: str, dtype: torch.dtype, act: int) -> None:
    x, weight, bias, residual = drawn(dtype)
    form = 1 << FEATURES | ROUNDS
    z, _ = norm(server, x, weight, bias, residual, form)
    y, record = norm(server, x, weight, bias, residual, form | act << ACT)
    expected = torch.relu(z) if act == RELU else torch.nn.functional.silu(z.float()).to(dtype)
    torch.testing.assert_close(y, expected, rtol=2**-7, atol=2**-9)
    # by z as it was rounded: its gradient is that of the residual
    grad = torch.randn(x.shape).to(dtype)
    numbers = form | act << ACT | ALL, EPS, 0.0
    tensors = grad, x, record, weight, bias, None, residual, None
    found = serve(server, "norm_backward", *tensors, *numbers)[3]
    leaf = z.double().requires_grad_()
    of_act = torch.relu(leaf) if act == RELU else torch.nn.functional.silu(leaf)
    (exact,) = torch.autograd.grad(of_act, leaf, grad.double())
    assert relative(found, exact) < 4e-3


@BY_SERVER
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("rounds", [0, ROUNDS])
@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("of_weight", ["same", "float32"])
def test_one_plus_the_weight(
    server: str, dtype: torch.dtype, rounds: int, centred: bool, of_weight: str
) -> None:
    x, weight, bias, grad = drawn(dtype)
    weight = (weight - 1).to(torch.float32 if of_weight == "float32" else dtype)
    wide = torch.promote_types(dtype, torch.float32)
    form = 1 << FEATURES | rounds | (0 if centred else UNCENTRED)
    meant = 1 + weight.to(wide)
    y, record = norm(server, x, weight, bias, None, form | ONE_PLUS)
    other, _ = norm(server, x, meant, bias, None, form)
    assert torch.equal(y, other)
    tensors = grad, x, record, weight, bias, None, None, None
    found = serve(server, "norm_backward", *tensors, form | ONE_PLUS | 7, EPS, 0.0)
    tensors = grad, x, record, meant, bias, None, None, None
    others = serve(server, "norm_backward", *tensors, form | 7, EPS, 0.0)
    assert found[1].dtype == weight.dtype
    assert torch.equal(found[0], others[0])
    # from float64 at once, or by way of float32
    torch.testing.assert_close(found[1], others[1].to(weight.dtype), rtol=2**-7, atol=0.0)


@BY_SERVER
@HALF
def test_gradients_are_those_of_the_formula(server: str, dtype: torch.dtype) -> None:
    """As if nothing were rounded on the way; a module's own are rounded at each of its steps."""
    x, weight, _, grad = drawn(dtype)
    form = 1 << FEATURES | UNCENTRED | ROUNDS | ONE_PLUS
    _, record = norm(server, x, weight, None, None, form)
    tensors = grad, x, record, weight, None, None, None, None
    of_x, of_weight, *_ = serve(server, "norm_backward", *tensors, form | 3, EPS, 0.0)
    leaves = x.double().requires_grad_(), weight.double().requires_grad_()
    exact = torch.autograd.grad(x_hat(leaves[0], False) * (1 + leaves[1]), leaves, grad.double())
    half = 2.0 ** -(8 if dtype == torch.bfloat16 else 11)
    assert relative(of_x, exact[0]) < half
    assert relative(of_weight, exact[1]) < half


@pytest.mark.parametrize("server", SERVED[1:2])
def test_second_derivatives_and_the_compiler(server: str) -> None:
    x, weight, bias, _ = drawn(torch.float32, 5, 7)
    form = 1 << FEATURES | ROUNDS | ONE_PLUS | KEEP
    leaves = [t.double().requires_grad_() for t in (x, weight, bias)]
    torch.autograd.gradgradcheck(
        lambda *t: torch.ops.truenorm.norm(*t, None, None, None, None, form, EPS, 0.0, 0.0)[0],
        leaves,
    )
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    args = *leaves, None, None, None, None, form, EPS, 0.0, 0.0
    opcheck(torch.ops.truenorm.norm.default, args)


OF_CHANNELS = {"batch": 0, "instance": PER_CHANNEL, "group": 2 << GROUPS}
ACTS = {
    RELU: torch.relu,
    LEAKY_RELU: lambda z: torch.nn.functional.leaky_relu(z, 0.1),
    HARDSWISH: torch.nn.functional.hardswish,
    SILU: torch.nn.functional.silu,
}


@pytest.mark.parametrize("server", SERVED[:2])
@HALF
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("kind", OF_CHANNELS)
@pytest.mark.parametrize("has_residual", [False, True])
def test_a_norm_of_channels_is_one_operator_before_its_activation(
    server: str, dtype: torch.dtype, act: int, kind: str, has_residual: bool
) -> None:
    weight, bias = torch.randn(6).mul(0.3).add(1.0).to(dtype), torch.randn(6).to(dtype)
    shapes = [(5, 6, 7, 9), (2, 6, 40, 40), (3, 6, 1, 2)]
    for shape, last in itertools.product(shapes, (False, True)):
        layout = torch.channels_last if last else torch.contiguous_format
        x, r, grad = (
            torch.randn(shape).to(dtype, memory_format=layout).contiguous(memory_format=layout)
            for _ in range(3)
        )
        residual = r if has_residual else None
        form = OF_CHANNELS[kind]
        of_norm, record = norm(server, x, weight, bias, None, form)
        z = of_norm if residual is None else of_norm + residual
        numbers = form | ROUNDS | act << ACT
        tensors = x, weight, bias, None, residual, None, None
        y, _ = serve(server, "norm", *tensors, numbers | KEEP, EPS, 0.1, 0.0)
        leaf = z.clone().requires_grad_()
        expected = ACTS[act](leaf)
        torch.testing.assert_close(y, expected, rtol=2**-7, atol=2**-9)
        share = 5e-3 if act in (HARDSWISH, SILU) else 0.0
        assert (y != expected).double().mean() <= share
        (inner,) = torch.autograd.grad(expected, leaf, grad)
        pulled = grad, x, record, weight, bias, None, residual, None
        found = serve(server, "norm_backward", *pulled, numbers | ALL, EPS, 0.1)
        same = inner, x, record, weight, bias, None, None, None
        wanted = serve(server, "norm_backward", *same, form | 7, EPS, 0.0)
        # a kernel keeps the gradient before the activation in x's dtype, the formula in float64
        bound = 1e-2 if share or server == "plain" else 1e-6
        for a, b in zip(found[:3], wanted[:3], strict=True):
            assert relative(a, b.double()) < bound
        assert relative(found[3], inner.double()) < 4e-3


@pytest.mark.parametrize("server", SERVED[1:2])
def test_what_is_refused(server: str) -> None:
    x, weight, *_ = drawn(torch.bfloat16, 4, 6)
    with pytest.raises(RuntimeError, match=r"`form` \(=\d+\) has ROUNDS without `feature_dims` or"):
        norm(server, x, None, None, None, ROUNDS)
    with pytest.raises(RuntimeError, match=r"has ROUNDS, and `weight` or `bias` has dtype"):
        norm(server, x, weight.double(), None, None, 1 << FEATURES | ROUNDS)
