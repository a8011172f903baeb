"""Plans of single operators: a sum and its norm, a norm beside a gate.

Beside the same in float64, and the operators without plans, of which they have the bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from on_triton import PRETENDS, needs_triton, on_a_cpu, plans
from test_triton_added import CUTS
from test_triton_added import as_on_a_gpu as added_on_a_gpu
from test_triton_gated_calls import RULES
from test_triton_gated_calls import as_on_a_gpu as gated_on_a_gpu
from test_triton_plans import same
from test_triton_plans_given import INPUTS, close, randn
from torch import Tensor

import truenorm
from truenorm._core import by_plan
from truenorm._core.rule import Rule
from truenorm._triton import config
from truenorm.nn import _orders

pytestmark = [
    needs_triton,
    on_a_cpu,
    pytest.mark.skipif(PRETENDS, reason="a pretended GPU's tensors are a subclass"),
]


@pytest.fixture
def made() -> Iterator[list[int]]:
    torch.manual_seed(11)
    with plans() as counts:
        yield counts


def without_plans(run: Callable[[], Any]) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(by_plan, "operator", lambda *_: None)
        return run()


def by_plans(run: Callable[[], list[Tensor]], calls: int, made: list[int]) -> list[Tensor]:
    """What the operators, a first call and a plan's call give alike; calls: by plans."""
    wanted, first = without_plans(run), run()
    made.clear()
    found = run()
    assert len(made) == calls, made
    assert None not in config.CALLS.values()
    same(first, wanted)
    same(found, wanted)
    return found


# ---------------------------------------------------------------- a sum and its norm


def _of_sum(
    layer: Any, x: Tensor, r: Tensor, grads: tuple[Tensor | None, Tensor | None]
) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in (x, r)]
    outputs = layer(leaves[0], add=leaves[1])
    asked = [(y, g.to(y.dtype)) for y, g in zip(outputs, grads, strict=True) if g is not None]
    wanted = [*leaves, *layer.parameters()]
    found = torch.autograd.grad([y for y, _ in asked], wanted, [g for _, g in asked])
    return [*(y.detach() for y in outputs), *found]


def _exact_sum(layer: Any, x: Tensor, r: Tensor, grads: Any) -> list[Tensor]:
    theirs = getattr(torch.nn, type(layer).__name__)(layer.normalized_shape, eps=layer.eps)
    theirs = theirs.double()
    theirs.load_state_dict(layer.state_dict())

    def both(x: Tensor, *, add: Tensor) -> tuple[Tensor, Tensor]:
        return theirs(x + add), x + add

    both.parameters = theirs.parameters  # type: ignore[attr-defined]
    return _of_sum(both, x.double(), r.double(), grads)


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("of", ["both", "norm alone", "a sum"])
@pytest.mark.parametrize("kind", ["LayerNorm", "RMSNorm"])
def test_a_sum(
    kind: str, of: str, cut: str, made: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = getattr(truenorm, kind)(20, eps=1e-5)
    for p in layer.parameters():
        torch.nn.init.normal_(p)
    x, r, other = (randn(3, 7, 20) for _ in range(3))
    grads: Any = {
        "both": (randn(3, 7, 20), randn(3, 7, 20)),
        "norm alone": (randn(3, 7, 20), None),
        "a sum": (randn(1).expand(3, 7, 20), randn(3, 1, 20).expand(3, 7, 20)),
    }[of]
    with added_on_a_gpu(monkeypatch) as names, CUTS[cut]():
        found = by_plans(lambda: _of_sum(layer, x, r, grads), 2, made)
        again = _of_sum(layer, other, r, grads)
    assert names == ["add_norm", "add_norm_backward"] * 4
    close(found, _exact_sum(layer, x, r, grads))
    close(again, _exact_sum(layer, other, r, grads))


def test_what_of_a_sum_is_another_kind(made: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = truenorm.LayerNorm(20), randn(3, 7, 20)
    misaligned = INPUTS["misaligned"](randn(3, 7, 20))
    changes: list[Callable[[], Any]] = [
        lambda: None,
        lambda: setattr(layer, "eps", 0.5),
        lambda: setattr(layer, "weight", torch.nn.Parameter(randn(40)[::2])),
        lambda: layer.bias.requires_grad_(False),
        lambda: layer.register_parameter("bias", None),
    ]
    with added_on_a_gpu(monkeypatch):
        for change in changes:
            change()
            for one, other in ((x, x), (x, misaligned), (misaligned, x), (x, randn(3, 7, 20))):

                def run(one: Tensor = one, other: Tensor = other) -> list[Tensor]:
                    leaves = [t.detach().requires_grad_() for t in (one, other)]
                    wanted = [*leaves, *(p for p in layer.parameters() if p.requires_grad)]
                    y, h = layer(leaves[0], add=leaves[0] if other is one else leaves[1])
                    wanted = [t for t in wanted if other is not one or t is not leaves[1]]
                    return [y.detach(), h.detach(), *torch.autograd.grad(y * h, wanted, x)]

                wanted = without_plans(run)
                for _ in range(2):
                    same(run(), wanted)
    assert len(made) >= 30


# ---------------------------------------------------------------- a gate


def _formula(x: Tensor, gate: Tensor, weight: Tensor, rule: Rule, groups: int) -> Tensor:
    act = F.silu(gate) if rule.gate_act == "silu" else gate.sigmoid()
    h = x * act if rule.gate == "before" else x
    rows = h.unflatten(-1, (groups, -1))
    y = F.rms_norm(rows, (rows.shape[-1],), eps=1e-5).flatten(-2) * weight
    return y if rule.gate == "before" else y * act


@pytest.mark.parametrize("lies", ["rows", "halves", "a sum"])
@pytest.mark.parametrize(("rule", "groups"), RULES, ids=lambda v: getattr(v, "gate", str(v)))
def test_a_gate(
    rule: Rule, groups: int, lies: str, made: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def pulled(call: Callable[..., Tensor], *tensors: Tensor) -> list[Tensor]:
        leaves = [t.detach().requires_grad_() for t in tensors]
        y = call(*leaves, rule, groups)
        return [y.detach(), *torch.autograd.grad(y, leaves, grad.to(y.dtype))]

    def fused(x: Tensor, gate: Tensor, weight: Tensor, rule: Rule, groups: int) -> Tensor:
        return _orders.gated(x, gate, weight, 1e-5, rule, groups)

    shape = (21, 48) if lies == "rows" else (3, 7, 48)
    given = [randn(*shape), randn(*shape), randn(48)]
    if lies == "halves":
        wide = randn(3, 7, 96)
        given[:2] = wide[..., :48], wide[..., 48:]
    grad = randn(1).expand(shape) if lies == "a sum" else randn(*shape)
    with gated_on_a_gpu(monkeypatch):
        found = by_plans(lambda: pulled(fused, *given), 2, made)
        other = [t.flip(0) for t in given]
        again = pulled(fused, *other)
        with torch.no_grad():
            first = fused(*given, rule, groups)
            assert torch.equal(fused(*given, rule, groups), first)
            assert torch.equal(first, found[0])
    for values, got in ((given, found), (other, again)):
        close(got, pulled(_formula, *(t.double() for t in values)))


def test_some_gradients_of_a_gate(made: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    x, gate, weight, grad = randn(5, 8), randn(5, 8), randn(8), randn(5, 8)
    with gated_on_a_gpu(monkeypatch):
        for wanted in ("x", "gate", "weight", "x weight"):

            def run(wanted: str = wanted) -> list[Tensor]:
                leaves = [t.detach().requires_grad_() for t in (x, gate, weight)]
                names = ("x", "gate", "weight")
                for name, leaf in zip(names, leaves, strict=True):
                    leaf.requires_grad_(name in wanted.split())
                y = _orders.gated(*leaves, 1e-5, RULES[0][0], 2)
                asked = [t for t in leaves if t.requires_grad]
                return [y.detach(), *torch.autograd.grad(y, asked, grad)]

            # the inputs' gradients are one kind
            want = without_plans(run)
            for _ in range(2):
                same(run(), want)
            found = by_plans(run, 2, made)
            exact = [t.double().requires_grad_() for t in (x, gate, weight)]
            y = _formula(*exact, RULES[0][0], 2)
            every = dict(
                zip(
                    ("x", "gate", "weight"),
                    torch.autograd.grad(y, exact, grad.double()),
                    strict=True,
                )
            )
            close(found, [y, *(every[name] for name in wanted.split())])
