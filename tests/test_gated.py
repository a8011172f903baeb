"""RMSNorm beside a gate in one call: against the formula in float64, and by torch's operators."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

import truenorm
from truenorm._core import gated, operators
from truenorm._core.call import (
    BEFORE,
    CONSTANT,
    ONE_PLUS,
    ROUNDS_PRODUCT,
    ROUNDS_X_HAT,
    SWISH,
)
from truenorm._core.eager import group, rms

pytestmark = pytest.mark.skipif(truenorm.info().cpu != "native", reason="native kernels only")

EPS = 1e-5
# rows, size, groups: odd ones, of fewer values than a vector, of several blocks, of more than one
SHAPES = [((3,), 5, 1), ((2, 3), 12, 3), ((9,), 48, 1), ((70, 2), 1000, 4), ((11,), 9001, 1)]
ORDERS = list(itertools.product((BEFORE, 0), (SWISH, 0)))


def formula(x: Tensor, gate: Tensor, weight: Tensor | None, groups: int, order: int) -> Tensor:
    act = torch.nn.functional.silu(gate) if order & SWISH else torch.sigmoid(gate)
    h = x * act if order & BEFORE else x
    parts = h.unflatten(-1, (groups, -1))
    y = (parts * torch.rsqrt(parts.square().mean(-1, keepdim=True) + EPS)).flatten(-2)
    y = y if weight is None else y * weight
    return y if order & BEFORE else y * act


def inputs(lead: tuple[int, ...], size: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(size)
    x, gate, grad = (torch.randn(*lead, size, generator=generator) for _ in range(3))
    weight = torch.rand(size, generator=generator) + 0.5
    return [t.to(dtype) for t in (2.0 * x, 3.0 * gate, weight, grad)]


def at_once(x: Tensor, gate: Tensor, weight: Tensor | None, groups: int, order: int) -> Tensor:
    def composed(x: Tensor, gate: Tensor, weight: Any) -> Tensor:
        return formula(x, gate, weight, groups, order)

    y = gated.at_once(x, gate, weight, EPS, groups, order, composed)
    assert y is not None
    return y


TOLERANCES = {
    torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3,
}  # fmt: skip


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("lead", "size", "groups"), SHAPES)
def test_against_the_formula(
    lead: tuple[int, ...], size: int, groups: int, dtype: torch.dtype
) -> None:
    x, gate, weight, grad = inputs(lead, size, dtype)
    for order, by in itertools.product(map(sum, ORDERS), (weight, None)):
        made = []
        for call, given in ((at_once, (x, gate, by)), (formula, (x, gate, by))):
            wide = torch.float64 if call is formula else dtype
            leaves = [None if t is None else t.to(wide).requires_grad_() for t in given]
            y = call(leaves[0], leaves[1], leaves[2], groups, order)  # type: ignore[arg-type]
            wanted = [t for t in leaves if t is not None]
            made.append([y, *torch.autograd.grad(y, wanted, grad.to(wide))])
        for name, ours, right in zip(("y", "x", "gate", "weight"), *made, strict=False):
            assert ours.dtype == dtype
            assert ours.shape == right.shape
            error = (ours.double() - right).abs().max() / right.abs().max()
            assert error < TOLERANCES[dtype], (name, order, by is None)


def test_half_precision_is_rounded_once_unless_asked() -> None:
    """Each output next to the exact one, or, in steps, where each of the steps is rounded."""
    x, gate, weight, _ = inputs((64,), 96, torch.bfloat16)
    wide = [t.double() for t in (x, gate, weight)]
    for order in map(sum, ORDERS):
        exact = formula(*wide, 3, order)
        y = at_once(x, gate, weight, 3, order)
        # float32's own rounding decides a few ties
        assert (y != exact.to(torch.bfloat16)).double().mean() < 2e-3
        steps = order | ROUNDS_X_HAT | ROUNDS_PRODUCT
        bare = formula(wide[0], wide[1], None, 3, order)
        if order & BEFORE:
            stepwise = bare.to(torch.bfloat16) * weight
        else:
            ones = torch.full_like(wide[1], torch.inf)  # whose sigmoid is 1
            x_hat = formula(wide[0], ones, None, 3, 0).to(torch.bfloat16)
            act = (
                torch.nn.functional.silu(gate.float()) if order & SWISH else gate.float().sigmoid()
            )
            stepwise = ((x_hat * weight) * act).to(torch.bfloat16)
        made = at_once(x, gate, weight, 3, steps)
        assert (made != stepwise).double().mean() < 2e-3
        assert (made != y).any()


def test_strided_inputs_are_read_as_they_lie() -> None:
    wide = torch.randn(4, 33, 3 * 40)
    x, gate = wide[..., :40], wide[..., 40:80]
    order = BEFORE | SWISH
    assert torch.equal(
        at_once(x, gate, None, 2, order),
        at_once(x.contiguous(), gate.contiguous(), None, 2, order),
    )
    # one row, rows all the same, some of them left out, those of a matrix
    ways: list[Any] = [
        lambda t: t[:1, :1], lambda t: t[:, :1].expand(4, 33, 40), lambda t: t[:, ::2],
        lambda t: t[1], lambda t: t[::2, 3], lambda t: t[0, 0],
    ]  # fmt: skip
    for way in ways:
        given = way(x), way(gate)
        dense = (t.contiguous() for t in given)
        assert torch.equal(at_once(*given, None, 2, order), at_once(*dense, None, 2, order))
    flipped = torch.randn(33, 4, 40).transpose(0, 1)
    assert torch.equal(
        at_once(flipped, gate, None, 2, 0), at_once(flipped.contiguous(), gate, None, 2, 0)
    )
    leaves = [t.detach().requires_grad_() for t in (flipped, gate)]
    y = at_once(*leaves, None, 2, 0)
    # a gradient whose rows are one
    of_ones = torch.autograd.grad(y, leaves, torch.ones(1).expand(y.shape), retain_graph=True)
    dense = torch.autograd.grad(y, leaves, torch.ones(y.shape))
    assert all(map(torch.equal, of_ones, dense))


@pytest.mark.parametrize("order", [BEFORE | SWISH, SWISH, 0])
def test_bits_do_not_depend_on_threads_or_the_batch(order: int) -> None:
    x, gate, weight, grad = inputs((300,), 512, torch.float32)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            leaves = [t.clone().requires_grad_() for t in (x, gate, weight)]
            y = at_once(*leaves, 2, order)
            found.append([y, *torch.autograd.grad(y, leaves, grad)])
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))
    assert torch.equal(found[0][0][7:9], at_once(x[7:9], gate[7:9], weight, 2, order))


def test_second_derivatives() -> None:
    x, gate, weight, _ = inputs((3,), 6, torch.float64)
    leaves = [t.requires_grad_() for t in (x, gate, weight)]
    for order in map(sum, ORDERS):

        def call(*given: Tensor, order: int = order) -> Tensor:
            return at_once(*given, 2, order)  # type: ignore[arg-type]

        assert torch.autograd.gradcheck(call, leaves)
        assert torch.autograd.gradgradcheck(call, leaves)


def test_gradients_that_are_wanted() -> None:
    x, gate, weight, grad = inputs((5,), 8, torch.float32)
    everything = [t.clone().requires_grad_() for t in (x, gate, weight)]
    for order in (BEFORE, 0):
        right = torch.autograd.grad(at_once(*everything, 1, order), everything, grad)
        for wanted in itertools.product((True, False), repeat=3):
            leaves = [
                t.clone().requires_grad_(w) for t, w in zip((x, gate, weight), wanted, strict=True)
            ]
            y = at_once(*leaves, 1, order)
            assert y.requires_grad == any(wanted)
            if any(wanted):
                y.backward(grad)
            for leaf, of_leaf, w in zip(leaves, right, wanted, strict=True):
                assert torch.equal(leaf.grad, of_leaf) if w else leaf.grad is None  # type: ignore[arg-type]


def test_values_that_are_not_finite_stay_in_their_row() -> None:
    x, gate, _, _ = inputs((4,), 33, torch.float32)
    clean = at_once(x, gate, None, 1, BEFORE | SWISH)
    x[1, 3], gate[2, 5] = torch.nan, torch.nan
    y = at_once(x, gate, None, 1, BEFORE | SWISH)
    assert torch.equal(y[[0, 3]], clean[[0, 3]])
    assert y[1].isnan().all()
    assert y[2].isnan().all()


def test_what_is_not_for_one_call() -> None:
    x, gate, weight, _ = inputs((4,), 6, torch.float32)

    def none(*given: Any) -> bool:
        return gated.at_once(*given, EPS, 2, BEFORE, lambda *_: x) is None  # type: ignore[arg-type]

    assert none(x, gate.double(), weight)
    assert none(x, gate[:1], weight)
    assert none(x, gate, weight[:3])
    assert none(x[:0], gate[:0], weight)
    assert none(x.to("meta"), gate.to("meta"), None)
    assert none(x.long(), gate.long(), None)
    assert gated.at_once(x, gate, weight, EPS, 4, BEFORE, lambda *_: x) is None  # 4 in 6


FORM = rms(1) | group(2) | 3


def test_schemas() -> None:
    x, gate, weight, grad = inputs((4,), 6, torch.float32)
    check: dict[str, Any] = {"test_utils": "test_schema"}
    opcheck(operators.eager_gated_norm, (x, gate, weight, FORM, EPS, BEFORE), **check)
    _, record = operators.eager_gated_norm(x, gate, weight, FORM, EPS, BEFORE)
    opcheck(operators.eager_gated_norm_backward, (grad, x, gate, record, weight), **check)


def test_the_operators_look_at_their_arguments() -> None:
    x, gate, weight, grad = inputs((4,), 6, torch.float32)
    _, record = operators.eager_gated_norm(x, gate, weight, FORM, EPS, BEFORE)
    unknown = record.clone()
    unknown[-1] = torch.nan
    forward, backward = operators.eager_gated_norm, operators.eager_gated_norm_backward
    refused: list[tuple[Any, tuple[Any, ...], str]] = [
        (forward, (x, gate[:2], weight, FORM, EPS, BEFORE), "`gate` must have the shape"),
        (forward, (x, gate.double(), weight, FORM, EPS, BEFORE), "`gate` must have the shape"),
        (forward, (x, gate, weight[:2], FORM, EPS, BEFORE), "`weight`"),
        (forward, (x, gate, torch.ones(2, 6), FORM, EPS, BEFORE), "`weight`"),
        (forward, (x, gate, weight, FORM, EPS, 16), "`order` must be from 0 to 15"),
        (forward, (x, gate, weight, FORM, EPS, -1), "`order` must be from 0 to 15"),
        (forward, (x, gate, weight, group(2), EPS, 0), "`form` must be groups"),
        (forward, (x, gate, weight, FORM | CONSTANT, EPS, 0), "`form` must be groups"),
        (forward, (x, gate, weight, FORM | ONE_PLUS, EPS, 0), "`form` must be groups"),
        (forward, (x[:, None], gate, weight, FORM, EPS, 0), "`gate` must have the shape"),
        (forward, (x, gate, weight, rms(1) | group(4), EPS, 0), "`num_groups` .* must divide"),
        (forward, (x[:0], gate[:0], weight, FORM, EPS, 0), "`x` is empty"),
        (backward, (grad[:2], x, gate, record, weight), "`grad`"),
        (backward, (grad, x, gate[:2], record, weight), "`gate` must have the shape"),
        (backward, (grad, x, gate, record[:-1], weight), "`record`"),
        (backward, (grad, x, gate, unknown, weight), "`record`"),
        (backward, (grad, x, gate, record, weight[:2]), "`weight`"),
    ]
    for operator, args, words in refused:
        with pytest.raises(RuntimeError, match=words):
            operator(*args)
