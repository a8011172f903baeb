"""Memory that is turned: channels outside of the positions where a kernel reads them inside, and
results that keep it."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch
from norms_by_hand import ChannelNorm
from tolerances import FLOAT32_BETWEEN, assert_gradient, assert_output, relative
from torch import Tensor
from torch.library import opcheck

import truenorm
from truenorm import reference
from truenorm._core import geometry
from truenorm._core.call import AS_GIVEN, KEEP, ONE_PLUS, ROUNDS, Form
from truenorm._core.geometry import Axes

OPS = torch.ops.truenorm
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# squares of vectors, less than one, parts of them, more channels than one tile holds, one position
SHAPES = [
    (2, 32, 16, 16), (2, 5, 3, 7), (3, 33, 65), (1, 96, 7, 7), (4, 3, 40, 41), (1, 20_000, 2, 3),
    (2, 1, 8, 8), (2, 17, 1, 1), (1, 1500, 5, 5),
]  # fmt: skip


def made(shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(len(shape) + shape[1])
    sizes = shape, shape, shape[1:2], shape[1:2]
    return [(torch.randn(s) * 2 + 3 * (i == 0)).to(dtype) for i, s in enumerate(sizes)]


def normalized(x: Tensor, weight: Tensor, bias: Tensor, *, flags: int = 0) -> Tensor:
    """LayerNorm over the channels of x (N, C, *positions), by the operator."""
    form = Form(Axes(1, 1, True), 1e-5).bits(x) | KEEP | flags
    given = x.movedim(1, -1), weight, bias, None, None, None, None
    y: Tensor = OPS.norm(*given, form, 1e-5, 0.0, 0.0)[0]
    return y.movedim(-1, 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("flags", [0, AS_GIVEN], ids=["rows", "as given"])
def test_by_formula(flags: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, grad, weight, bias = made(shape, dtype)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    y = normalized(*leaves, flags=flags)
    last, of = (t.detach().movedim(1, -1) for t in (x, grad))
    exact = reference.layer_norm(last, shape[1:2], weight, bias)
    assert_output(y, exact.movedim(-1, 1))
    of_x, *of_parameters = reference.layer_norm_backward(of, last, shape[1:2], weight, bias)
    assert of_x is not None
    found = torch.autograd.grad(y, leaves, grad)
    for actual, right in zip(found, (of_x.movedim(-1, 1), *of_parameters), strict=True):
        assert_gradient(actual, right)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_bits_are_those_of_rows(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, grad, weight, bias = made(shape, dtype)
    inside = x.movedim(1, -1).contiguous().movedim(-1, 1)
    right = None
    for t, of, flags in itertools.product(
        (inside, x), (grad, grad.movedim(1, -1).contiguous().movedim(-1, 1)), (0, AS_GIVEN)
    ):
        leaf = t.detach().requires_grad_()
        y = normalized(leaf, weight, bias, flags=flags)
        (of_x,) = torch.autograd.grad(y, leaf, of)
        right = right or (y, of_x)
        assert torch.equal(y, right[0])
        assert torch.equal(of_x, right[1])
        kept = t.stride() if flags else inside.stride()
        sizes = [d for d, size in enumerate(shape) if size != 1]
        for each in (y, of_x):
            assert [each.stride(d) for d in sizes] == [kept[d] for d in sizes]


@pytest.mark.parametrize("flags", [ROUNDS, ONE_PLUS], ids=["rounds", "one plus"])
def test_with_other_flags(flags: int) -> None:
    x, _, weight, bias = made((2, 24, 9, 9), torch.bfloat16)
    y = normalized(x, weight, bias, flags=flags | AS_GIVEN)
    inside = x.movedim(1, -1).contiguous().movedim(-1, 1)
    assert y.is_contiguous()
    assert torch.equal(y, normalized(inside, weight, bias, flags=flags))


def test_float64_weights_beside_half_precision() -> None:
    x, grad, weight, bias = made((2, 24, 9, 9), torch.float16)
    x.requires_grad_()
    y = normalized(x, weight.double(), bias.double(), flags=AS_GIVEN)
    inside = x.movedim(1, -1).contiguous().movedim(-1, 1)
    right = normalized(inside, weight.double(), bias.double())
    assert y.is_contiguous()
    assert torch.equal(y, right)
    ours, theirs = (torch.autograd.grad(t, x, grad)[0] for t in (y, right))
    assert torch.equal(ours, theirs)


def test_two_derivatives() -> None:
    x, _, weight, bias = made((2, 3, 2, 2), torch.float64)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    by = [lambda *t: normalized(*t, flags=AS_GIVEN)]
    assert torch.autograd.gradcheck(by[0], leaves)
    assert torch.autograd.gradgradcheck(by[0], leaves)


def test_operator_is_in_order() -> None:
    x, grad, weight, bias = made((2, 6, 5, 5), torch.float32)
    form = Form(Axes(1, 1, True), 1e-5).bits(x) | KEEP | AS_GIVEN
    leaves = [t.requires_grad_() for t in (x.movedim(1, -1), weight, bias)]
    call = (*leaves, None, None, None, None, form, 1e-5, 0.0, 0.0)
    opcheck(OPS.norm.default, call)
    record = OPS.norm(*call)[1]
    tensors = grad.movedim(1, -1), leaves[0].detach(), record, weight.detach(), None, None, None
    opcheck(OPS.norm_backward.default, (*tensors, None, form | 7, 1e-5, 0.0))


def test_in_place_and_statistics() -> None:
    x, _, weight, bias = made((2, 6, 5, 7), torch.float32)
    right = normalized(x, weight, bias)
    form = Form(Axes(1, 1, True), 1e-5).bits(x) | KEEP | AS_GIVEN
    found = OPS.statistics(x.movedim(1, -1), None, form)
    assert torch.equal(found[2], torch.full((70,), 6.0, dtype=torch.float64))
    torch.testing.assert_close(found[0], x.double().mean(1).flatten(), rtol=0, atol=1e-12)
    storage = x.data_ptr()
    OPS.norm_(x.movedim(1, -1), weight, bias, None, None, None, None, form, 1e-5, 0.0, 0.0)
    assert x.data_ptr() == storage
    assert torch.equal(x, right)


def test_rows_that_do_not_count() -> None:
    x, grad, weight, bias = made((3, 8, 4, 5), torch.float32)
    mask = torch.rand(3, 4, 5) < 0.6
    form = Form(Axes(1, 1, True), 1e-5).bits(x) | KEEP
    results = []
    for t, flags in ((x, AS_GIVEN), (x, 0), (x.movedim(1, -1).contiguous().movedim(-1, 1), 0)):
        leaf = t.detach().requires_grad_()
        call = leaf.movedim(1, -1), weight, bias, mask, None, None, None
        y = OPS.norm(*call, form | flags, 1e-5, 0.0, 7.0)[0]
        results.append((y, *torch.autograd.grad(y, leaf, grad.movedim(1, -1))))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))
    assert bool((results[0][0][~mask] == 7.0).all())


def test_shape_rule_is_the_kernels() -> None:
    draw = random.Random(3)
    kept = 0
    for _ in range(300):
        shape = [draw.choice((1, 2, 3, 5, 8)) for _ in range(draw.randint(2, 5))]
        order = draw.sample(range(len(shape)), len(shape))
        if draw.random() < 0.5:  # [N, C, positions…], seen with the channels last
            order = [0, *range(2, len(shape)), 1]
        x = torch.randn(shape).permute(order)
        if draw.random() < 0.2:
            x = x[..., ::2]
        axes = Axes(1, draw.randint(1, x.dim()), True, True)
        form = Form(axes, 1e-5).bits(x)
        y = OPS.norm(x, *[None] * 6, form, 1e-5, 0.0, 0.0)[0]
        assert y.stride() == tuple(geometry.kept_strides(x, axes)), (x.shape, x.stride())
        alike = OPS.norm(x.contiguous(), *[None] * 6, form & ~AS_GIVEN, 1e-5, 0.0, 0.0)[0]
        assert torch.equal(y, alike)
        kept += y.stride() == x.stride() and not y.is_contiguous()
    assert kept > 30


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"form": AS_GIVEN}, "has AS_GIVEN without `feature_dims`"),
    ({"form": AS_GIVEN | 1 << 24 | 1 << 16}, "has AS_GIVEN beside an activation, a residual"),
    ({"residual": torch.randn(2, 5, 6)}, "has AS_GIVEN beside an activation, a residual"),
    ({"weight": torch.randn(2, 6)}, "or weights for parts of the samples: pass a norm alone"),
]


@pytest.mark.parametrize(("changed", "words"), WRONG, ids=["groups", "act", "residual", "parts"])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_what_it_does_not_go_with(device: str, changed: dict[str, Any], words: str) -> None:
    usual = {"weight": None, "residual": None, "form": AS_GIVEN | 1 << 24} | changed
    weight, residual = (
        t.to(device) if isinstance(t, Tensor) else t for t in (usual["weight"], usual["residual"])
    )
    x = torch.randn(2, 5, 6, device=device)
    with pytest.raises(RuntimeError, match=words):
        OPS.norm(x, weight, None, None, residual, None, None, usual["form"], 1e-5, 0.0, 0.0)


# ---------------------------------------------------------------- one layout against another


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(2, 32, 16, 16), (3, 5, 3, 7), (1, 40, 6, 5, 4), (2, 3, 129, 64)]
)
@pytest.mark.parametrize("kind", ["BatchNorm", "InstanceNorm", "GroupNorm"])
def test_a_gradient_in_the_other_layout(
    kind: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    x, grad, _, _ = made(shape, dtype)
    if kind == "GroupNorm":
        layer: Any = truenorm.GroupNorm(1, shape[1])
    else:
        layer = getattr(truenorm, f"{kind}{len(shape) - 2}d")(shape[1], affine=True)
    layer = layer.to(dtype)
    last = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    torch.nn.init.normal_(layer.weight)
    for at in (x, x.contiguous(memory_format=last)):
        leaves = [at.detach().requires_grad_(), *layer.parameters()]
        y = layer(leaves[0])
        right = torch.autograd.grad(y, leaves, grad.contiguous(), retain_graph=True)
        found = torch.autograd.grad(y, leaves, grad.contiguous(memory_format=last))
        assert all(map(torch.equal, found, right))


def test_a_class_that_normalizes_channels() -> None:
    theirs = ChannelNorm(1, 24, 1, 1)
    torch.nn.init.normal_(theirs.g)
    ours = truenorm.convert(torch.nn.Sequential(theirs))[0]
    assert isinstance(ours, ChannelNorm)
    x, grad, _, _ = made((2, 24, 30, 31), torch.float32)
    x.requires_grad_()
    served = ours._serve(x)
    assert served is not None
    expected = ChannelNorm.forward(ours, x)
    assert served.stride() == expected.stride() == x.stride()
    pair = [torch.autograd.grad(y, [x, *ours.parameters()], grad) for y in (served, expected)]
    assert relative(served, expected) < FLOAT32_BETWEEN
    for actual, other in zip(*pair, strict=True):
        assert relative(actual, other) < FLOAT32_BETWEEN
