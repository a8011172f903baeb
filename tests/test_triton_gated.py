"""RMSNorm beside a gate, in the Triton kernels: one launch, and one and a sum of parts backward."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from on_triton import DEVICE, needs_triton, small_tiles
from tolerances import assert_gradient, assert_output, last_place, relative
from torch import Tensor
from torch.library import opcheck
from triton_calls import run

from truenorm._core import operators
from truenorm._core.call import (
    BEFORE,
    CONSTANT,
    FEATURES,
    GROUPS,
    KEEP,
    NEEDS_INPUT,
    NEEDS_WEIGHT,
    ROUNDS_PRODUCT,
    ROUNDS_X_HAT,
    SWISH,
    UNCENTRED,
)

pytestmark = needs_triton

EPS = 1e-3
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
ORDERS = [BEFORE | SWISH, BEFORE, SWISH, 0]
# rows, values, groups: one row, odd sizes, one value, sizes that 16 divides, more than one block
SHAPES = [(1, 5, 1), (7, 21, 3), (3, 4, 4), (9, 96, 2), (41, 40, 1)]
# as they come, a row of a tile each, so that programs go over several, and nothing on chip
CUTS: dict[str, Any] = {
    "whole": nullcontext, "rows": partial(small_tiles, tile=64), "plain": small_tiles
}  # fmt: skip


def formula(
    x: Tensor, gate: Tensor, weight: Tensor | None, groups: int, order: int, eps: float = EPS
) -> Tensor:
    act = gate * gate.sigmoid() if order & SWISH else gate.sigmoid()
    h = (x * act if order & BEFORE else x).unflatten(-1, (groups, -1))
    y = (h / (h.square().mean(-1, keepdim=True) + eps).sqrt()).flatten(-2)
    y = y if weight is None else y * weight
    return y if order & BEFORE else y * act


class Call(NamedTuple):
    """Rows, their groups, and what is asked of them."""

    x: Tensor
    gate: Tensor
    weight: Tensor | None
    grad: Tensor
    groups: int
    order: int
    bits: int = KEEP | NEEDS_INPUT | NEEDS_WEIGHT
    eps: float = EPS

    @property
    def numbers(self) -> tuple[int, float, int]:
        return self.bits | UNCENTRED | self.groups << GROUPS, self.eps, self.order

    def forward(self) -> Any:
        return run("gated_norm", self.x, self.gate, self.weight, *self.numbers)

    def backward(self, record: Tensor) -> Any:
        tensors = self.grad, self.x, self.gate, record, self.weight
        return run("gated_norm_backward", *tensors, *self.numbers)

    def all(self) -> list[Tensor]:
        y, record = self.forward()
        return [y, *self.backward(record)]

    def exact(self) -> list[Tensor]:
        given = self.x, self.gate, self.weight
        leaves = [None if t is None else t.cpu().double().requires_grad_() for t in given]
        y = formula(*leaves, self.groups, self.order, self.eps)  # type: ignore[arg-type]
        wanted = [t for t in leaves if t is not None]
        return [y.detach(), *torch.autograd.grad(y, wanted, self.grad.cpu().double())]


def call_of(
    shape: tuple[int, int, int], dtype: torch.dtype, order: int, *, weight: Any = True,
    scale: float = 1.0, gates: float = 3.0,
) -> Call:  # fmt: skip
    """weight: whether there is one; or its dtype."""
    rows, size, groups = shape
    x, gate, grad = (torch.randn(rows, size, dtype=torch.float64) for _ in range(3))
    by = torch.randn(size).to(weight if isinstance(weight, torch.dtype) else dtype)
    tensors = [t.to(dtype).to(DEVICE) for t in (x * scale, gate * gates, grad)]
    return Call(
        tensors[0], tensors[1], by.to(DEVICE) if weight else None, tensors[2], groups, order
    )


def check(call: Call) -> None:
    y, *found = (t.cpu() for t in call.all())
    exact, *wanted = call.exact()
    if y.itemsize == 2:
        # what float32's exponential adds to half a unit
        unit = last_place(exact.to(y.dtype), y.dtype)
        assert bool(((y.double() - exact).abs() <= 0.505 * unit).all())
    else:
        assert_output(y, exact)
    for name, got, right in zip(("x", "gate", "weight"), found, wanted, strict=False):
        assert got.shape == right.shape
        if name == "weight":
            assert call.weight is not None
            assert got.dtype == call.weight.dtype
        if got.itemsize > 2:
            # sums of what is computed in float32 are no better in a wider dtype
            bound = 1e-11 if call.x.dtype == torch.float64 else 5e-6
            assert relative(got, right) <= bound, name
        else:
            assert_gradient(got, right)


def ids(value: Any) -> str:
    return str(value).removeprefix("torch.")


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("shape", SHAPES, ids=ids)
def test_by_the_formula(shape: tuple[int, int, int], dtype: torch.dtype, cut: str) -> None:
    with CUTS[cut]():
        for order in ORDERS:
            check(call_of(shape, dtype, order))


@pytest.mark.parametrize("order", ORDERS)
def test_other_weights_and_none(order: int) -> None:
    """A gradient of weight's has weight's dtype; none is made for no weight."""
    for dtype, weight in (
        (torch.bfloat16, torch.float32), (torch.float16, torch.float64),
        (torch.float32, torch.bfloat16), (torch.float32, False), (torch.float16, False),
    ):  # fmt: skip
        call = call_of((7, 21, 3), dtype, order, weight=weight)
        check(call)
        assert weight or call.all()[3].shape == (0,)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("scale", [1e-18, 1e18])
def test_any_scale(scale: float, order: int) -> None:
    """Squares leave float32's range, in which the results are."""
    call = call_of((5, 34, 2), torch.float32, order, scale=scale)._replace(eps=1e-40)
    y, of_x, of_gate, of_weight = (t.cpu() for t in call.all())
    exact = call.exact()
    assert_output(y, exact[0])
    for got, right in zip((of_x, of_gate, of_weight), exact[1:], strict=True):
        # of 1e-18 some are no normal numbers
        assert relative(got.double() * 1e18, right * 1e18) <= 5e-6


@pytest.mark.parametrize("order", ORDERS)
def test_gates_far_out(order: int) -> None:
    """Open, and closed as far as float32 goes."""
    call = call_of((4, 32, 2), torch.float32, order)
    call.gate[0], call.gate[1], call.gate[2] = 200.0, -60.0, 1e30
    call.gate[2, ::2] = -1e30
    y = call.forward()[0].cpu()
    exact = formula(*(t.cpu().double() for t in call[:3] if t is not None), 2, order)  # type: ignore[arg-type]
    scale = exact.abs().amax(1, keepdim=True)
    assert bool(((y.double() - exact).abs() <= 2e-6 * scale).all())
    for found in call.all():
        assert found.isfinite().all()


STEPS = ROUNDS_X_HAT | ROUNDS_PRODUCT


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=ids)
@pytest.mark.parametrize("order", ORDERS)
def test_steps_are_rounded_where_asked(order: int, dtype: torch.dtype) -> None:
    """As where each of them is an operator of half precision."""
    call = call_of((64, 96, 3), dtype, order)
    x, gate, weight = (t.cpu().double() for t in call[:3])  # type: ignore[union-attr]
    act = gate * gate.sigmoid() if order & SWISH else gate.sigmoid()
    bare = formula(x, gate, None, 3, order) if order & BEFORE else formula(x, gate, None, 3, 0)
    x_hat = bare if order & BEFORE else bare / gate.sigmoid()
    for steps in (0, ROUNDS_X_HAT, ROUNDS_PRODUCT, STEPS):
        z = x_hat.to(dtype).double() if steps & ROUNDS_X_HAT else x_hat
        z = z * weight
        z = z.to(dtype).double() if steps & ROUNDS_PRODUCT else z
        right = (z if order & BEFORE else z * act).to(dtype)
        y = call._replace(order=order | steps).forward()[0].cpu()
        # float32's own rounding decides a few ties
        assert (y != right).double().mean() < 2e-3
    assert (call._replace(order=order | STEPS).forward()[0] != call.forward()[0]).any()


def test_wider_types_have_no_steps() -> None:
    for dtype, order in itertools.product((torch.float32, torch.float64), ORDERS):
        call = call_of((5, 24, 2), dtype, order)
        assert torch.equal(call.forward()[0], call._replace(order=order | STEPS).forward()[0])


@pytest.mark.parametrize("order", [BEFORE | SWISH, 0])
def test_strided_inputs(order: int) -> None:
    """Read as they lie, or copied: the same bits."""
    call = call_of((6, 32, 2), torch.float32, order)
    right = call.all()

    def within(t: Tensor, before: int, after: int) -> Tensor:
        wide = torch.nn.functional.pad(t, (before, after))
        return wide[:, before : wide.shape[1] - after]

    placed: list[Callable[[Tensor], Tensor]] = [
        lambda t: within(t, 16, 16), lambda t: within(t, 0, 3), lambda t: within(t, 1, 15),
        lambda t: t.T.contiguous().T, lambda t: torch.stack([t, t], 1)[:, 1],
        lambda t: torch.stack([t, t], 2)[..., 0],
    ]  # fmt: skip
    for place, other in itertools.product(placed, (lambda t: t, placed[0], placed[1])):
        moved = call._replace(x=place(call.x), gate=other(call.gate), grad=place(call.grad))
        assert moved.x.stride() != call.x.stride()
        for got, wanted in zip(moved.all(), right, strict=True):
            assert got.is_contiguous()
            assert torch.equal(got, wanted)
    one = call._replace(x=call.x[:1].expand(6, 32), grad=call.grad[:1].expand(6, 32))
    dense = one._replace(x=one.x.contiguous(), grad=one.grad.contiguous())
    assert all(map(torch.equal, one.all(), dense.all()))


@pytest.mark.parametrize("cut", ["whole", "rows"])
@pytest.mark.parametrize("order", ORDERS)
def test_bits_of_a_row_do_not_depend_on_the_others(order: int, cut: str) -> None:
    call = call_of((13, 48, 3), torch.float32, order)
    with CUTS[cut]():
        first, again = call.all(), call.all()
        assert all(map(torch.equal, first, again))
        some = [t[7:9] for t in (call.x, call.gate, call.grad)]
        part = call._replace(x=some[0], gate=some[1], grad=some[2]).all()
    for got, wanted in zip(part[:3], first[:3], strict=True):
        assert torch.equal(got, wanted[7:9])


@pytest.mark.parametrize("order", [BEFORE | SWISH, SWISH])
def test_what_is_not_finite_stays_in_its_group(order: int) -> None:
    call = call_of((6, 32, 2), torch.float32, order)
    clean = call.forward()[0].cpu()
    call.x[1, 3], call.gate[4, 20] = torch.nan, torch.nan
    y = call.forward()[0].cpu()
    wrong = torch.zeros(6, 32, dtype=torch.bool)
    wrong[1, :16] = True
    if order & BEFORE:
        wrong[4, 16:] = True
    else:
        wrong[4, 20] = True
    assert torch.equal(y.isnan(), wrong)
    assert torch.equal(y[~wrong], clean[~wrong])


@pytest.mark.parametrize("cut", CUTS)
def test_what_is_not_wanted_is_empty(cut: str) -> None:
    for order in (BEFORE | SWISH, 0):
        call = call_of((7, 24, 2), torch.float32, order)
        with CUTS[cut]():
            y, record = call.forward()
            assert record.shape == (3, 14)
            h = formula(call.x.cpu().double(), call.gate.cpu().double(), None, 2, order)
            assert record.dtype == torch.float64
            assert h.shape == y.shape
            assert not record[0].any()
            assert bool((record[2] == 12).all())
            bare, none = call._replace(bits=0).forward()
            assert torch.equal(bare, y)
            assert none.shape == (0,)
            of_x, of_gate, of_weight = call.backward(record)
            for bits in range(4):
                found = call._replace(bits=bits).backward(record)
                for got, right, flag in zip(
                    found, (of_x, of_gate, of_weight), (1, 1, 2), strict=True
                ):
                    assert torch.equal(got, right) if bits & flag else got.shape == (0,)


def test_what_fits() -> None:
    """8,192 values of what is computed in float32, half as many of float64."""
    from truenorm._triton import host_gated

    for dtype in DTYPES:
        most = 4096 if dtype == torch.float64 else 8192
        for groups in (1, 3):
            x = torch.empty(2, most * groups, dtype=dtype)
            assert host_gated.fits(x, groups)
            longer = torch.empty(2, (most + 1) * groups, dtype=dtype)
            assert not host_gated.fits(longer, groups)
            for backward in (False, True):
                assert host_gated.launch_of(x, groups, backward=backward) is not None
                assert host_gated.launch_of(longer, groups, backward=backward) is None


# ---------------------------------------------------------------- the operators


def test_what_the_operators_are() -> None:
    """In a schema's words, and to a compiler that meets them."""
    for dtype, by, bits in itertools.product(
        (torch.float32, torch.float16), (True, torch.float64, False), (0, 3, KEEP | 3)
    ):
        call = call_of((4, 6, 2), dtype, BEFORE, weight=by)
        x, gate, weight, grad = (None if t is None else t.cpu() for t in call[:4])
        numbers = call._replace(bits=bits).numbers
        which: dict[str, Any] = {"test_utils": ("test_schema", "test_faketensor")}
        opcheck(operators.gated_norm, (x, gate, weight, *numbers), **which)
        _, record = operators.gated_norm(x, gate, weight, *call.numbers)
        args = grad, x, gate, record, weight, *numbers
        opcheck(operators.gated_norm_backward, args, **which)
        turned = (t.T.contiguous().T for t in (x, gate))  # type: ignore[union-attr]
        opcheck(operators.gated_norm, (*turned, weight, *numbers), **which)


def test_the_operators_look_at_their_arguments() -> None:
    call = call_of((4, 6, 2), torch.float32, BEFORE)
    x, gate, weight, grad = (t.cpu() for t in call[:4])  # type: ignore[union-attr]
    bits, eps, order = call.numbers
    _, record = operators.gated_norm(x, gate, weight, bits, eps, order)
    forward, backward = operators.gated_norm, operators.gated_norm_backward
    more = eps, order
    refused: list[tuple[Any, tuple[Any, ...], str]] = [
        (forward, (x, gate[:2], weight, bits, *more), "`gate` must have the shape"),
        (forward, (x, gate.double(), weight, bits, *more), "`gate` must have the shape"),
        (forward, (x, gate, weight[:2], bits, *more), "`weight` must have shape"),
        (forward, (x, gate, torch.ones(4, 6), bits, *more), "`weight` must have shape"),
        (forward, (x, gate, weight, bits, eps, 16), "`order` .=16. must be from 0 to 15"),
        (forward, (x, gate, weight, bits, eps, -1), "`order` .=-1. must be from 0 to 15"),
        (forward, (x, gate, weight, bits & ~UNCENTRED, *more), "`form` .* must be groups"),
        (forward, (x, gate, weight, bits | CONSTANT, *more), "`form` .* must be groups"),
        (forward, (x, gate, weight, UNCENTRED | 1 << FEATURES, *more), "`form` .* must be groups"),
        (forward, (x, gate, weight, UNCENTRED | 4 << GROUPS, *more), "`num_groups` .=4. must"),
        (forward, (x[..., None], gate[..., None], weight, bits, *more), "`x` must be rows"),
        (forward, (x[:0], gate[:0], weight, bits, *more), "no empty tensor"),
        (backward, (grad[:2], x, gate, record, weight, bits, *more), "`grad` must have"),
        (backward, (grad, x, gate[:2], record, weight, bits, *more), "`gate` must have"),
        (backward, (grad, x, gate, record[:, :3], weight, bits, *more), "`record` must be"),
        (backward, (grad, x, gate, record, weight[:2], bits, *more), "`weight` must have"),
    ]
    for call_it, args, words in refused:
        with pytest.raises(RuntimeError, match=words):
            call_it(*args)
