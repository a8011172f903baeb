"""RMSNorms that take a gate: held against each library's own class, gradients of the gate too."""

from __future__ import annotations

import copy
import pickle
import re
from typing import Any

import pytest
import torch
from test_rules import BF16, F16, F32, Holder, close, drawn, of
from torch import Tensor, nn
from torch.nn import Module
from torch.nn.functional import silu

import truenorm
from truenorm._models.rules.recognise import recognise
from truenorm.nn._ruled import Ruled

SIZE = 48
HF = "transformers.models"
CLASSES: dict[str, tuple[Any, str]] = {
    "Mamba2": (
        lambda: of(f"{HF}.mamba2.modeling_mamba2.MambaRMSNormGated", SIZE, 12),
        "rms, cast_first, in groups, of x · silu(gate)",
    ),
    "Bamba": (
        lambda: of(f"{HF}.bamba.modeling_bamba.BambaRMSNormGated", SIZE, SIZE),
        "rms, cast_first, in groups, of x · silu(gate)",
    ),
    "Zamba2": (
        lambda: of(f"{HF}.zamba2.modeling_zamba2.Zamba2RMSNormGated", SIZE, 24),
        "rms, cast_first, in groups, of x · silu(gate)",
    ),
    "GraniteMoeHybrid": (
        lambda: of(
            f"{HF}.granitemoehybrid.modeling_granitemoehybrid.GraniteMoeHybridRMSNormGated",
            SIZE,
            16,
        ),
        "rms, cast_first, in groups, of x · silu(gate)",
    ),
    "FalconH1": (
        lambda: of(
            f"{HF}.falcon_h1.modeling_falcon_h1.FalconH1RMSNormGated",
            SIZE,
            n_groups=3,
            norm_before_gate=False,
        ),
        "rms, once, in groups, of x · silu(gate)",
    ),
    "FalconH1, norm first": (
        lambda: of(f"{HF}.falcon_h1.modeling_falcon_h1.FalconH1RMSNormGated", SIZE, n_groups=3),
        "rms, once, in groups, with · silu(gate)",
    ),
    "Qwen3-Next": (
        lambda: of(f"{HF}.qwen3_next.modeling_qwen3_next.Qwen3NextRMSNormGated", SIZE),
        "rms, cast_first, then · silu(gate)",
    ),
    "Kimi-Linear": (
        lambda: of(f"{HF}.kimi_linear.modeling_kimi_linear.KimiLinearRMSNormGated", SIZE),
        "rms, once, with · sigmoid(gate)",
    ),
}
PAIRS = [(F32, F32), (BF16, BF16), (BF16, F32), (F16, F16)]


@pytest.fixture(params=CLASSES)
def case(request: pytest.FixtureRequest) -> tuple[Module, str]:
    make, formula = CLASSES[request.param]
    return make(), formula


def given(dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """Inputs and gates: contiguous, strided each by itself, small."""
    generator = torch.Generator().manual_seed(3)
    x, gate = (torch.randn(6, 40, SIZE, generator=generator).to(dtype) for _ in range(2))
    made = [(x, gate), (x[0], gate[0]), (0.01 * x, 5 * gate)]
    wide = torch.randn(6, 40, 3 * SIZE, generator=generator).to(dtype)
    made += [(x.transpose(0, 1), gate.transpose(0, 1)), (x, wide[..., SIZE : 2 * SIZE])]
    made += [(wide[..., :SIZE], wide[..., SIZE : 2 * SIZE])]
    return made


@pytest.mark.parametrize(("dtype", "weights"), PAIRS)
def test_the_same_numbers(
    case: tuple[Module, str], dtype: torch.dtype, weights: torch.dtype
) -> None:
    theirs, formula = case
    theirs.to(weights)
    ours = truenorm.convert(Holder(copy.deepcopy(theirs))).norm
    assert isinstance(ours, Ruled)
    assert ours._read.words() == formula
    for x, gate in given(dtype):
        outputs, gradients = [], []
        for module in (ours, theirs):
            leaves = [each.detach().requires_grad_() for each in (x, gate)]
            outputs.append(module(*leaves))
            grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(4))
            wanted = [*leaves, *module.parameters()]
            gradients.append(torch.autograd.grad(outputs[-1], wanted, grad.to(outputs[-1].dtype)))
        if outputs[0].dtype == F32 != dtype:
            # x̂ is rounded to half precision within: float32's own rounding decides a few ties
            far = (outputs[0] - outputs[1]).abs() > 1e-6 + 1e-6 * outputs[1].abs()
            assert far.float().mean() <= 0.005
        else:
            close(*outputs)
        assert outputs[0].stride() == outputs[1].stride()
        for actual, expected in zip(*gradients, strict=True):
            bound = 2e-5 if dtype == weights == F32 else 3e-2
            error = (actual.double() - expected.double()).norm()
            assert error <= bound * expected.double().norm()


def test_truenorm_serves_it(case: tuple[Module, str]) -> None:
    """By position and by name."""
    theirs, _ = case
    ours: Any = truenorm.convert(Holder(copy.deepcopy(theirs))).norm
    x, gate = given(F32)[0]
    served = ours._serve(x, gate)
    assert served is not None
    assert torch.equal(ours(hidden_states=x, gate=gate), served)
    assert torch.equal(ours(x, gate=gate), served)


def test_calls_that_the_class_serves_itself(case: tuple[Module, str]) -> None:
    theirs, _ = case
    ours = truenorm.convert(Holder(copy.deepcopy(theirs))).norm
    x, gate = given(F32)[0]
    for calls in [
        (x,), (x, None), (x, gate[:1]), (x, gate[0]), (x, gate.double()), (x, gate[:, :, :5]),
        (x, "gate"), (x.double(), gate.double()), (x, gate, gate),
    ]:  # fmt: skip
        try:
            expected = theirs(*calls)
        except Exception as error:
            with pytest.raises(type(error), match=re.escape(str(error))):
                ours(*calls)
        else:
            assert torch.equal(ours(*calls), expected)
    with torch.autocast("cpu"):
        assert torch.equal(ours(x, gate), theirs(x, gate))
    both = torch.func.vmap(ours)(x[:, None], gate[:, None])
    assert torch.equal(both, torch.func.vmap(theirs)(x[:, None], gate[:, None]))
    compiled = torch.compile(ours, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x, gate), theirs(x, gate))


def test_what_stays(case: tuple[Module, str]) -> None:
    theirs, _ = case
    model = Holder(theirs)
    kind, keys = type(theirs), list(model.state_dict())
    truenorm.convert(model)
    assert isinstance(model.norm, kind)
    # whoever knows torch's RMSNorm would call it with an input alone
    assert not isinstance(model.norm, nn.RMSNorm)
    assert list(model.state_dict()) == keys
    assert type(pickle.loads(pickle.dumps(model)).norm) is type(model.norm)
    assert type(copy.deepcopy(model).norm) is type(model.norm)
    truenorm.revert(model)
    assert type(model.norm) is kind


class Wrong(Module):
    def __init__(self, change: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(SIZE))
        self.eps = 1e-5
        self.change = change

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        wide, by = x.float(), silu(gate.float())
        match self.change:
            case "half":
                by = silu(gate).to(x.dtype).float()
            case "gelu":
                by = nn.functional.gelu(gate.float())
            case "detached":
                by = by.detach()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return (self.weight * wide.to(x.dtype) * by).to(x.dtype)


@pytest.mark.parametrize("change", ["", "half", "gelu", "detached"])
def test_what_is_not_the_formula_is_left(change: str) -> None:
    rule = truenorm.Rule("rms", "cast_first", gate="after")
    truenorm.register_norm(Wrong, rule)
    try:
        found = recognise(drawn(Wrong(change)))
    finally:
        truenorm.register_norm(Wrong, None)
    assert found is not None
    assert (found.kind is not None) == (change == "")
    assert change == "" or "not what rms, cast_first, then · silu(gate) gives" in found.reason


class HandNorm(Wrong):
    """Nobody named it."""


def test_by_its_formula() -> None:
    rows = truenorm.survey(nn.Sequential(HandNorm(""), HandNorm("gelu"))).norms
    assert [row.formula for row in rows] == ["rms, cast_first, then · silu(gate)", ""]
    assert "no known formula" in rows[1].reason


def test_rounding_once() -> None:
    theirs = of(f"{HF}.qwen3_next.modeling_qwen3_next.Qwen3NextRMSNormGated", SIZE).to(BF16)
    ours = truenorm.convert(Holder(copy.deepcopy(theirs)), rounding="once").norm
    x, gate = given(BF16)[0]
    wide = nn.functional.rms_norm(x.double(), (SIZE,), theirs.weight.double(), 1e-6)
    exact = (wide * silu(gate.double())).to(BF16)
    assert (ours(x, gate) != exact).float().mean() < 0.001
    assert (theirs(x, gate) != exact).float().mean() > 0.1


def test_a_model() -> None:
    transformers: Any = pytest.importorskip("transformers")
    config = transformers.Mamba2Config(
        num_heads=4, head_dim=24, vocab_size=97, hidden_size=48, state_size=8, n_groups=2,
        num_hidden_layers=2, chunk_size=8,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = transformers.Mamba2ForCausalLM(config)
    ours = truenorm.convert(copy.deepcopy(theirs))
    assert truenorm.survey(ours).left == 0
    tokens = torch.randint(97, (2, 11))
    actual, expected = (model(tokens, labels=tokens) for model in (ours, theirs))
    close(actual.logits, expected.logits)
    gradients = []
    for found, model in ((actual, ours), (expected, theirs)):
        found.loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert (gradients[0] - gradients[1]).norm() <= 1e-4 * gradients[1].norm()
