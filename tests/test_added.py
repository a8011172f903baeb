"""norm(h) and h = x + r: a layer's call with `add`, and the functions."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.library import opcheck

import truenorm
from truenorm import functional
from truenorm._core import added, operators
from truenorm._core.call import KEEP, UNCENTRED
from truenorm._core.eager import layer as layer_form

LARGE = (3, 130, 700)  # past the size from which one pass does both
SMALL = (3, 5, 24)


@pytest.fixture(autouse=True)
def _graphs_anew() -> Iterator[None]:
    yield
    torch.compiler.reset()


def made(kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Any, list[Tensor]]:
    torch.manual_seed(len(kind))
    layer = getattr(truenorm, kind)(shape[-1])
    for p in layer.parameters():
        nn.init.normal_(p, 0.7)
    tensors = [torch.randn(shape) * 2 + 1 for _ in range(4)]
    return layer.to(dtype), [t.to(dtype) for t in tensors]


def by_two(layer: Any, x: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    h = x + r
    return layer(h), h


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [LARGE, SMALL])
@pytest.mark.parametrize("kind", ["LayerNorm", "RMSNorm"])
def test_as_addition_and_norm(kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    layer, (x, r, grad, grad_h) = made(kind, shape, dtype)
    x.requires_grad_(), r.requires_grad_()
    y, h = layer(x, add=r)
    expected, right = by_two(layer, x, r)
    assert torch.equal(h, right)
    assert torch.equal(y, expected)
    leaves = [x, r, *layer.parameters()]
    found = torch.autograd.grad((y, h), leaves, (grad, grad_h))
    # both sums in float64, and the two of x rounded apart
    wide = copy.deepcopy(layer).double()
    inputs = [t.detach().double().requires_grad_() for t in (x, r)]
    z = h.detach().double() + (inputs[0] + inputs[1] - inputs[0].detach() - inputs[1].detach())
    of = torch.autograd.grad(
        (wide(z), z), [*inputs, *wide.parameters()], (grad.double(), grad_h.double())
    )
    unit = torch.finfo(dtype).eps
    for one, other in zip(found, of, strict=True):
        assert one.dtype == dtype
        error = (one.double() - other).norm() / other.norm()
        assert error < max(2 * unit, 1e-6 if dtype != torch.float64 else 0), float(error)
    with torch.no_grad():
        one, other = layer(x, add=r)
        assert torch.equal(one, y)
        assert torch.equal(other, h)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape", [LARGE, (1, 9, 40_000), (5000, 61)])
def test_bits_do_not_depend_on_threads(shape: tuple[int, ...], threads: int) -> None:
    layer, (x, r, grad, grad_h) = made("LayerNorm", shape, torch.float32)
    x.requires_grad_()
    found = []
    before = torch.get_num_threads()
    try:
        for count in (1, threads):
            torch.set_num_threads(count)
            outputs = layer(x, add=r)
            found.append(
                [*outputs, *torch.autograd.grad(outputs, [x, *layer.parameters()], (grad, grad_h))]
            )
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, *found))


def test_one_of_the_two_has_a_gradient_or_is_used() -> None:
    layer, (x, r, grad, grad_h) = made("LayerNorm", LARGE, torch.float32)
    for first, second in ((True, False), (False, True), (False, False)):
        x.requires_grad_(first), r.requires_grad_(second)
        leaves = [t for t in (x, r, *layer.parameters()) if t.requires_grad]
        for use in ("both", "norm", "sum"):
            if use != "norm" and not (first or second):  # the sum has none
                continue
            outputs = {"both": slice(2), "norm": slice(1), "sum": slice(1, 2)}[use]
            grads = (grad, grad_h)[outputs]
            found, right = (
                torch.autograd.grad(pair[outputs], leaves, grads, allow_unused=True)
                for pair in (layer(x, add=r), by_two(layer, x, r))
            )
            for one, other in zip(found, right, strict=True):
                assert (one is None) == (other is None)
                if one is not None:
                    torch.testing.assert_close(
                        one, other, rtol=1e-5, atol=1e-5 * float(other.abs().max())
                    )


def test_layouts_and_what_torch_promotes() -> None:
    layer, (x, r, *_) = made("LayerNorm", LARGE, torch.float32)
    turned = x.transpose(0, 1).contiguous().transpose(0, 1)
    for one, other in (
        (turned, r),
        (x, turned),
        (x, r[:1]),
        (x.bfloat16(), r),
        (x, r.double()),
        (x[..., ::2].repeat_interleave(2, -1), r),
        (x, x),
    ):
        wide = layer.double() if torch.float64 in (one.dtype, other.dtype) else layer.float()
        y, h = wide(one, add=other)
        expected, right = by_two(wide, one, other)
        assert torch.equal(h, right)
        torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)


def test_memory_lies_as_after_addition() -> None:
    shape = 4, 64, 33, 40
    x, r = (torch.randn(shape).to(memory_format=torch.channels_last) for _ in range(2))
    for layer in (truenorm.RMSNorm(40), truenorm.LayerNorm(40)):
        for found, right in zip(layer(x, add=r), by_two(layer, x, r), strict=True):
            assert found.stride() == right.stride()
            torch.testing.assert_close(found, right, rtol=1e-6, atol=1e-6)


def test_with_what_else_a_call_has() -> None:
    x, r = torch.randn(3, 6, 400, 50), torch.randn(3, 6, 400, 50)
    mask = torch.rand(3, 6, 400) < 0.7
    rows = truenorm.LayerNorm(50, activation="silu")
    assert torch.equal(rows(x, add=r, mask=mask)[0], rows(x + r, mask=mask))
    plain = truenorm.LayerNorm(50)
    scale = torch.randn(3, 50)
    assert torch.equal(plain(x, add=r, scale=scale)[0], plain(x + r, scale=scale))
    assert torch.equal(plain(x, add=r, residual=x)[0], plain(x + r, residual=x))
    for layer in (truenorm.BatchNorm2d(6), truenorm.GroupNorm(2, 6), truenorm.InstanceNorm2d(6)):
        y, h = layer(x, add=r)
        assert torch.equal(h, x + r)
        assert torch.equal(y, copy.deepcopy(layer).train()(x + r))


def test_second_derivatives() -> None:
    torch.manual_seed(0)
    layer = truenorm.LayerNorm(6).double()
    x, r = (torch.randn(2, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(added, "LARGE", 0)
        y, _ = layer(x, add=r)
        assert type(y.grad_fn).__name__ == "AddNormBackward"
        assert torch.autograd.gradcheck(lambda a, b: layer(a, add=b), (x, r))
        assert torch.autograd.gradgradcheck(lambda a, b: layer(a, add=b), (x, r))


@pytest.mark.parametrize("way", ["compile", "vmap", "fx", "export"])
def test_ways(way: str) -> None:
    layer, (x, r, *_) = made("RMSNorm", LARGE, torch.float32)
    wanted = by_two(layer, x, r)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = layer

        def forward(self, x: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
            y, h = self.norm(x, add=r)
            return y, h

    model: Any = Model()
    with torch.no_grad():
        if way == "vmap":
            found = torch.func.vmap(model)(x, r)
        elif way == "compile":
            found = torch.compile(model, fullgraph=True, backend="aot_eager")(x, r)
        elif way == "fx":
            traced = torch.fx.Tracer().trace(model)
            assert [n.target for n in traced.nodes if n.op == "call_module"] == ["norm"]
            found = torch.fx.GraphModule(model, traced)(x, r)
        else:
            found = torch.export.export(model, (x, r)).module()(x, r)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_functions() -> None:
    layer, (x, r, *_) = made("LayerNorm", LARGE, torch.float32)
    args = (700,), layer.weight, layer.bias, 1e-4
    y, h = functional.add_layer_norm(x, r, *args)
    assert torch.equal(h, x + r)
    assert torch.equal(y, functional.layer_norm(h, *args))
    for small in (slice(None), slice(1)):
        y, h = functional.add_rms_norm(x[small], r[small], (700,), layer.weight)
        assert torch.equal(y, functional.rms_norm(x[small] + r[small], (700,), layer.weight))


def test_bad_input() -> None:
    layer, (x, r, *_) = made("LayerNorm", LARGE, torch.float32)
    with pytest.raises(TypeError, match=r"`add` must be a torch\.Tensor, but got float"):
        layer(x, add=1.0)
    with pytest.raises(TypeError, match=r"`input` must be a torch\.Tensor, but got list"):
        layer([x], add=r)
    for function in (functional.add_layer_norm, functional.add_rms_norm):
        with pytest.raises(TypeError, match=r"`other` must be a torch\.Tensor, but got int"):
            function(x, 1, (700,))  # type: ignore[arg-type]
        with pytest.raises(RuntimeError, match="normalized_shape"):
            function(x, r, (699,))
        with pytest.raises(RuntimeError, match="must match the size"):
            function(x, r[:2], (700,))


def test_schemas() -> None:
    _, (x, r, grad, grad_h) = made("LayerNorm", SMALL, torch.float32)
    weight, bias, form = torch.randn(24), torch.randn(24), layer_form(1) | 7
    check: dict[str, Any] = {"test_utils": "test_schema"}
    opcheck(operators.eager_add_norm, (x, r, weight, bias, form, 1e-5), **check)
    _, h, record = operators.eager_add_norm(x, r, weight, bias, form, 1e-5)
    opcheck(operators.eager_add_norm_backward, (grad, grad_h, h, record, weight), **check)


def test_the_operators_of_a_gpu() -> None:
    """Their plain kernels, which serve what no other does, and their shape rules."""
    for dtype in (torch.float32, torch.bfloat16):
        _, (x, r, grad, grad_h) = made("LayerNorm", SMALL, dtype)
        weight, bias, form = torch.randn(24), torch.randn(24), layer_form(1) | 7 | KEEP
        utils: dict[str, Any] = {"test_utils": ("test_schema", "test_faketensor")}
        opcheck(operators.add_norm, (x, r, weight, bias, form, 1e-5), **utils)
        y, h, record = operators.add_norm(x, r, weight, bias, form, 1e-5)
        assert torch.equal(h, x + r)
        right = torch.nn.functional.layer_norm(h.double(), (24,), weight.double(), bias.double())
        torch.testing.assert_close(y.double(), right, rtol=torch.finfo(dtype).eps, atol=1e-6)
        for of_h in (grad_h, None):
            args = grad, of_h, h, record, weight, form, 1e-5
            opcheck(operators.add_norm_backward, args, **utils)
        of_norm = operators.norm_backward(
            grad, h, record, weight, *[None] * 4, form, 1e-5, 0.0
        )  # fmt: skip
        torch.testing.assert_close(operators.add_norm_backward(*args)[1], of_norm[1])
        found = operators.add_norm_backward(grad, grad_h, *args[2:])[0]
        torch.testing.assert_close(found, of_norm[0] + grad_h, rtol=0.02, atol=1e-5)


def test_the_operators_of_a_gpu_look_at_their_arguments() -> None:
    _, (x, r, grad, grad_h) = made("LayerNorm", SMALL, torch.float32)
    form, weight = layer_form(1) | 7 | KEEP, torch.ones(24)
    _, h, record = operators.add_norm(x, r, weight, None, form, 1e-5)
    refused: list[tuple[Any, tuple[Any, ...], str]] = [
        (operators.add_norm, (x, r[:2], weight, None, form, 1e-5), "`other` must have the shape"),
        (
            operators.add_norm,
            (x, r.half(), weight, None, form, 1e-5),
            "`other` must have the shape",
        ),
        (operators.add_norm, (x, r, weight[:2], None, form, 1e-5), "`weight` must have shape"),
        (operators.add_norm, (x, r, None, None, 7, 1e-5), "over trailing dimensions, without an"),
        (operators.add_norm, (x, r, None, None, form | 1 << 16, 1e-5), "without an activation"),
        (operators.add_norm, (x[:0], r[:0], weight, None, form, 1e-5), "takes no empty tensor"),
        (
            operators.add_norm_backward,
            (grad, grad_h[:2], h, record, weight, form, 1e-5),
            "`grad_h` must have the shape",
        ),
    ]
    for operator, args, words in refused:
        with pytest.raises(RuntimeError, match=words):
            operator(*args)


def test_the_operators_look_at_their_arguments() -> None:
    _, (x, r, grad, grad_h) = made("LayerNorm", LARGE, torch.float32)
    form, weight = layer_form(1) | 7, torch.ones(700)
    y, h, record = operators.eager_add_norm(x, r, weight, None, form, 1e-5)
    assert y.shape == h.shape
    refused: list[tuple[Any, tuple[Any, ...]]] = [
        (operators.eager_add_norm, (x, r[:2], weight, None, form, 1e-5)),
        (operators.eager_add_norm, (x, r.double(), weight, None, form, 1e-5)),
        (operators.eager_add_norm, (x, r, weight[:2], None, form, 1e-5)),
        (operators.eager_add_norm, (x, r, torch.ones(3, 700), None, form, 1e-5)),
        (operators.eager_add_norm, (x, r, weight, None, 7, 1e-5)),
        (operators.eager_add_norm, (x[:0], r[:0], weight, None, form, 1e-5)),
        (operators.eager_add_norm, (x.half(), r.half(), weight.double(), None, form, 1e-5)),
        (operators.eager_add_norm_backward, (grad[:2], grad_h, h, record, weight)),
        (operators.eager_add_norm_backward, (grad, grad_h[:2], h, record, weight)),
        (operators.eager_add_norm_backward, (grad, grad_h, h[:2], record, weight)),
        (operators.eager_add_norm_backward, (grad, grad_h, h, record[:-1], weight)),
        (operators.eager_add_norm_backward, (grad, grad_h, h, record, weight[:2])),
    ]
    for operator, args in refused:
        with pytest.raises(RuntimeError, match="no call for the short way"):
            operator(*args)
    uncentred = layer_form(1) | UNCENTRED
    y, _, _ = operators.eager_add_norm(x, r, None, None, uncentred, 1e-5)
    torch.testing.assert_close(y, torch.nn.functional.rms_norm(x + r, (700,), eps=1e-5))
