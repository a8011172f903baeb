"""norm(h) and h = x + other, in the Triton kernels: one launch, and one backward."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from on_triton import DEVICE, HAS_CUDA, needs_triton, on_a_cpu, small_tiles, taken_for_a_gpu
from tolerances import assert_gradient, assert_output, relative
from torch import Tensor
from triton_calls import EPS, KEEP, LAYER, LAYERS, ONE_PLUS, RMS, Call, Kind, call_of, place, run

import truenorm
from truenorm._core import added
from truenorm._core.call import ROUNDS

pytestmark = needs_triton

CUTS: dict[str, Any] = {"whole": nullcontext, "chunks": small_tiles}
BY_CUT = pytest.mark.parametrize("cut", CUTS)
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
MIXED = [
    (kind, DTYPES[(i + j) % 4], layout)
    for i, kind in enumerate((LAYER, LAYERS, RMS))
    for j, layout in enumerate(("contiguous", "rows", "sliced", "contiguous"))
    if kind is LAYERS or layout != "rows"
]


def ids(value: Any) -> str:
    return value.name if isinstance(value, Kind) else str(value).removeprefix("torch.")


def forward(call: Call, other: Tensor) -> Any:
    tensors = call.x, other, call.weight, call.bias
    return run("add_norm", *tensors, call.form, EPS)


def backward(call: Call, grad: Tensor, grad_h: Tensor | None, record: Tensor) -> Any:
    tensors = grad, grad_h, call.x, record, call.weight
    return run("add_norm_backward", *tensors, call.form, EPS)


@BY_CUT
@pytest.mark.parametrize(("kind", "dtype", "layout"), MIXED, ids=ids)
def test_by_the_formula(kind: Kind, dtype: torch.dtype, layout: str, cut: str) -> None:
    call = call_of(kind, dtype, layout, offset=0.5)
    call = call._replace(bits=KEEP | 7 | ONE_PLUS * (layout == "sliced"))
    values = [torch.randn(kind.shape, dtype=torch.float64).to(dtype) for _ in range(3)]
    other, grad, grad_h = (place(v, layout) for v in values)
    with CUTS[cut]():
        y, h, record = forward(call, other)
        assert torch.equal(h, call.x + other)
        of_h = call._replace(x=h)
        exact, of_record, wanted = of_h.exact(grad)
        assert_output(y.cpu(), exact)
        assert relative(record[:2].cpu(), of_record[:2]) <= 2e-6
        assert torch.equal(record[2].cpu(), of_record[2])
        found = backward(of_h, grad, grad_h, record)
        alone = backward(of_h, grad, None, record)
    assert wanted[0] is not None
    assert_gradient(found[0].cpu(), wanted[0] + grad_h.cpu().double())
    assert_gradient(alone[0].cpu(), wanted[0])
    for got, again, right in zip(found[1:], alone[1:], wanted[1:], strict=False):
        assert torch.equal(got, again)
        if right is not None:
            bound = 1e-11 if dtype == torch.float64 else 5e-6
            assert relative(got.cpu(), right) <= bound


@BY_CUT
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
def test_bits_are_those_of_two_calls(dtype: torch.dtype, cut: str) -> None:
    """Of a row among others, too."""
    call = call_of(LAYER, dtype)
    if dtype == torch.bfloat16:
        call = call._replace(bits=call.bits | ROUNDS)
    other = torch.randn(LAYER.shape).to(dtype).to(DEVICE)
    with CUTS[cut]():
        y, _, record = forward(call, other)
        right, its = call._replace(x=call.x + other).norm()
        assert torch.equal(y, right)
        assert torch.equal(record, its)
        one = forward(call._replace(x=call.x[3:4]), other[3:4])
        assert torch.equal(one[0], y[3:4])
        assert forward(call._replace(bits=0), other)[2].shape == (0,)


def test_one_rounding() -> None:
    """Of the two gradients' sum, where half precision would have two."""
    call = call_of(LAYER, torch.bfloat16)
    grad, grad_h = (torch.randn(LAYER.shape).bfloat16().to(DEVICE) for _ in range(2))
    record = call.norm()[1]
    found = backward(call, grad, grad_h, record)[0]
    wide = call._replace(x=call.x.float())
    of_norm = wide.backward(grad.float(), record)[0]
    assert torch.equal(found, (of_norm + grad_h.float()).bfloat16())


# ---------------------------------------------------------------- how a GPU's calls get there


@contextmanager
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    with (
        taken_for_a_gpu(monkeypatch, "add_norm", "add_norm_backward") as called,
        monkeypatch.context() as patch,
    ):
        patch.setattr(added, "_on_gpu", lambda x: True)
        patch.setattr(added, "LARGE", 0)
        yield called


@on_a_cpu
@pytest.mark.parametrize("kind", ["LayerNorm", "RMSNorm"])
def test_layers(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = getattr(truenorm, kind)(20)
    for p in layer.parameters():
        torch.nn.init.normal_(p)
    x, r, grad, grad_h = (torch.randn(3, 7, 20) for _ in range(4))
    wide, leaves = copy.deepcopy(layer).double(), (x.requires_grad_(), r.requires_grad_())
    inputs = [t.detach().double().requires_grad_() for t in leaves]
    sums = inputs[0] + inputs[1]
    exact = wide(sums), sums
    right = torch.autograd.grad(
        exact, [*inputs, *wide.parameters()], (grad.double(), grad_h.double())
    )
    with as_on_a_gpu(monkeypatch) as names:
        y, h = layer(x, add=r)
        found = torch.autograd.grad((y, h), [*leaves, *layer.parameters()], (grad, grad_h))
        assert names == ["add_norm", "add_norm_backward"]
        with torch.no_grad():
            assert torch.equal(layer(x, add=r)[0], y)
        args = x, r, (20,), layer.weight, *([layer.bias] if kind == "LayerNorm" else [])
        function = truenorm.functional.add_layer_norm
        if kind == "RMSNorm":
            function = truenorm.functional.add_rms_norm
        assert torch.equal(function(*args)[0], y)
        assert names[2:] == ["add_norm", "add_norm"]
    torch.testing.assert_close(y.double(), exact[0], rtol=1e-6, atol=2e-6)
    assert torch.equal(h, x + r)
    for one, other in zip(found, right, strict=True):
        bound = 1e-5 * float(other.abs().max())
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=bound)


@on_a_cpu
def test_one_of_the_two_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = truenorm.LayerNorm(20, elementwise_affine=False)
    x, r, grad = torch.randn(3, 20, requires_grad=True), torch.randn(3, 20), torch.randn(3, 20)
    wanted = torch.autograd.grad(layer(x + r), x, grad)
    with as_on_a_gpu(monkeypatch):
        y, h = layer(x, add=r)
        torch.testing.assert_close(torch.autograd.grad(y, x, grad, retain_graph=True), wanted)
        assert torch.equal(torch.autograd.grad(h, x, grad)[0], grad)


@on_a_cpu
def test_second_derivatives(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = truenorm.LayerNorm(6).double()
    x, r = (torch.randn(2, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    with as_on_a_gpu(monkeypatch) as names:
        assert torch.autograd.gradcheck(lambda a, b: layer(a, add=b), (x, r))
        assert torch.autograd.gradgradcheck(lambda a, b: layer(a, add=b), (x, r))
        assert names


@on_a_cpu
def test_what_goes_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler's calls, function transforms, dispatch modes, subclasses, other layouts."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):  # type: ignore[no-untyped-def]
            return func(*args, **(kwargs or {}))

    class Kind(Tensor):
        pass

    layer, x, r = truenorm.RMSNorm(20), torch.randn(3, 7, 20), torch.randn(3, 7, 20)
    wanted = layer(x + r)
    turned = x.transpose(0, 1).contiguous().transpose(0, 1)
    with torch.no_grad(), as_on_a_gpu(monkeypatch) as names:
        with Mode():
            found = [layer(x, add=r)[0]]
        found.append(torch.func.vmap(lambda a, b: layer(a, add=b)[0])(x, r))
        found.append(layer(x.as_subclass(Kind), add=r)[0].as_subclass(Tensor))
        found.append(layer(turned, add=r)[0])
        compiled = torch.compile(lambda a, b: layer(a, add=b)[0], backend="eager", fullgraph=True)
        found.append(compiled(x, r))
        assert names == []
    for each in found:
        torch.testing.assert_close(each, wanted, rtol=1e-6, atol=1e-6)
    torch.compiler.reset()


def test_which_tensors_are_a_gpus() -> None:
    x = torch.randn(3, 4)
    assert not added._on_gpu(x)
    if HAS_CUDA:
        assert added._on_gpu(x.cuda())
        assert added.is_large(x.cuda(), x.cuda())
