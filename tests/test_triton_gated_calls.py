"""How calls of a norm beside a gate reach the Triton kernels, and which go another way."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from on_triton import HAS_CUDA, needs_triton, on_a_cpu, small_tiles, taken_for_a_gpu
from test_triton_gated import DTYPES, EPS, ORDERS, formula, ids
from tolerances import relative
from torch import Tensor

from truenorm import _triton
from truenorm._core import gated
from truenorm._core.call import BEFORE, SWISH
from truenorm._core.rule import Rule
from truenorm.nn import _orders

pytestmark = needs_triton


@contextmanager
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    with (
        taken_for_a_gpu(monkeypatch, "gated_norm", "gated_norm_backward") as called,
        monkeypatch.context() as patch,
    ):
        patch.setattr(gated, "_on_gpu", _triton.serves_gate)
        yield called


RULES = [
    (Rule("rms", "cast_first", gate="before"), 2), (Rule("rms", gate="before"), 1),
    (Rule("rms", "cast_first", gate="after"), 1), (Rule("rms", gate="after"), 3),
    (Rule("rms", gate="within", gate_act="sigmoid"), 1),
]  # fmt: skip


@on_a_cpu
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=ids)
@pytest.mark.parametrize(("rule", "groups"), RULES, ids=lambda v: getattr(v, "gate", str(v)))
def test_rules(
    rule: Rule, groups: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside the same by torch's operators around a norm: a few values of half precision differ."""
    wide = torch.randn(3, 7, 2 * 48).to(dtype)
    leaves = [wide[..., :48], wide[..., 48:], torch.randn(48).to(dtype)]
    leaves = [t.detach().requires_grad_() for t in leaves]
    grad = torch.randn(3, 7, 48).to(dtype)
    right = _orders._gated_by_steps(*leaves, 1e-5, rule, groups)
    wanted = torch.autograd.grad(right, leaves, grad)
    with as_on_a_gpu(monkeypatch) as names:
        y = _orders.gated(*leaves, 1e-5, rule, groups)
        found = torch.autograd.grad(y, leaves, grad)
        assert names == ["gated_norm", "gated_norm_backward"]
        with torch.no_grad():
            assert torch.equal(_orders.gated(*leaves, 1e-5, rule, groups), y)
    assert y.shape == right.shape
    if dtype == torch.bfloat16:
        assert (y != right).double().mean() < 5e-3
    bound = 5e-6 if dtype == torch.float32 else 2e-2
    for got, exact in zip((y, *found), (right, *wanted), strict=True):
        assert got.dtype == exact.dtype
        assert relative(got, exact) <= bound


def _at_once(x: Tensor, gate: Tensor, weight: Any, groups: int, order: int) -> Tensor | None:
    def composed(x: Tensor, gate: Tensor, weight: Any) -> Tensor:
        return formula(x, gate, weight, groups, order)

    return gated.at_once(x, gate, weight, EPS, groups, order, composed)


@on_a_cpu
def test_gradients_that_are_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    given = [torch.randn(5, 8), torch.randn(5, 8), torch.randn(8)]
    grad = torch.randn(5, 8)
    with as_on_a_gpu(monkeypatch):
        for order in (BEFORE | SWISH, 0):
            leaves = [t.clone().requires_grad_() for t in given]
            y = _at_once(*leaves, 2, order)
            assert y is not None
            right = torch.autograd.grad(y, leaves, grad)
            for wanted in itertools.product((True, False), repeat=3):
                leaves = [t.clone().requires_grad_(w) for t, w in zip(given, wanted, strict=True)]
                y = _at_once(*leaves, 2, order)
                assert y is not None
                assert y.requires_grad == any(wanted)
                if any(wanted):
                    y.backward(grad)
                for leaf, of_leaf, w in zip(leaves, right, wanted, strict=True):
                    assert leaf.grad is None or w
                    assert not w or torch.equal(leaf.grad, of_leaf)  # type: ignore[arg-type]


@on_a_cpu
def test_second_derivatives(monkeypatch: pytest.MonkeyPatch) -> None:
    leaves = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2, 4), (2, 4), 4)]
    with as_on_a_gpu(monkeypatch) as names:
        for order in ORDERS:
            call = partial(_at_once, groups=2, order=order)
            assert torch.autograd.gradcheck(call, leaves)
            assert torch.autograd.gradgradcheck(call, leaves)
        assert {"gated_norm", "gated_norm_backward"} == set(names)


@on_a_cpu
def test_what_goes_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows too long for a chip, function transforms, dispatch modes, subclasses, a compiler."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):  # type: ignore[no-untyped-def]
            return func(*args, **(kwargs or {}))

    class Kind(Tensor):
        pass

    x, gate, weight = torch.randn(3, 7, 24), torch.randn(3, 7, 24), torch.randn(24)
    rule = Rule("rms", "cast_first", gate="before")

    def call(x: Tensor, gate: Tensor) -> Tensor:
        return _orders.gated(x, gate, weight, EPS, rule, 2)

    wanted = call(x, gate)
    with torch.no_grad(), as_on_a_gpu(monkeypatch) as names:
        with Mode():
            found = [call(x, gate)]
        found.append(torch.func.vmap(call)(x, gate))
        found.append(call(x.as_subclass(Kind), gate).as_subclass(Tensor))
        with small_tiles():
            found.append(call(x, gate))
        compiled = torch.compile(
            lambda x, gate: (
                formula(x, gate, weight, 2, BEFORE | SWISH)
                if _at_once(x, gate, weight, 2, BEFORE | SWISH) is None
                else x
            ),
            backend="eager",
            fullgraph=True,
        )
        found.append(compiled(x, gate))
        assert names == []
        found.append(call(x, gate))
        assert names == ["gated_norm"]
        assert _at_once(x[:0], gate[:0], weight, 2, BEFORE) is None
        assert _at_once(x, gate.double(), weight, 2, BEFORE) is None
        assert _at_once(x, gate[:1], weight, 2, BEFORE) is None
        assert _at_once(x, gate, weight[:3], 2, BEFORE) is None
        assert _at_once(x, gate, weight, 5, BEFORE) is None
    for each in found:
        torch.testing.assert_close(each, wanted, rtol=1e-5, atol=1e-5)
    torch.compiler.reset()


def test_which_tensors_are_a_gpus() -> None:
    x = torch.randn(3, 4)
    assert not gated._on_gpu(x, 1)
    if HAS_CUDA:
        assert gated._on_gpu(x.cuda(), 1)
        assert not gated._on_gpu(torch.empty(2, 10_000, device="cuda"), 1)
