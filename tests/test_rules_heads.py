"""Norms of heads whose weights have a row for each, (H, D): held against the classes' own."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from test_rules import HF, PAIRS, Holder, close, drawn, of
from torch import Tensor, nn
from torch.nn import Module

import truenorm
from truenorm import Rule
from truenorm._core.geometry import Axes
from truenorm._models.rules import recognise as recognition
from truenorm._models.rules.recognise import recognise
from truenorm.nn import _orders
from truenorm.nn._ruled import Ruled

F32, BF16 = torch.float32, torch.bfloat16
HEADS, SIZE = 5, 37


class HandHeadNorm(Module):
    """A LayerNorm with a bias, which casts last or, as `first`, before the affine step."""

    def __init__(self, *shape: int, first: bool = False, bias: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(shape))
        self.bias = nn.Parameter(torch.zeros(bias or shape))
        self.eps, self.first = 1e-4, first

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide - wide.mean(-1, keepdim=True)
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        if self.first:
            return self.weight * wide.to(x.dtype) + self.bias
        return (self.weight.float() * wide + self.bias.float()).to(x.dtype)


COHERE = f"{HF}.cohere.modeling_cohere.CohereLayerNorm"
CLASSES: dict[str, tuple[Any, str]] = {
    "Cohere": (lambda: of(COHERE, (HEADS, SIZE)), "layer, once, a row per head"),
    "Llama": (
        lambda: of(f"{HF}.llama.modeling_llama.LlamaRMSNorm", (HEADS, SIZE)),
        "rms, cast_first, a row per head",
    ),
    "Gemma": (
        lambda: of(f"{HF}.gemma.modeling_gemma.GemmaRMSNorm", (HEADS, SIZE)),
        "rms, once, 1 + weight, a row per head",
    ),
    "T5": (
        lambda: of(f"{HF}.t5.modeling_t5.T5LayerNorm", (HEADS, SIZE)),
        "rms, to_weight, a row per head",
    ),
    "by hand": (lambda: drawn(HandHeadNorm(HEADS, SIZE)), "layer, once, a row per head"),
    "by hand, cast first": (
        lambda: drawn(HandHeadNorm(HEADS, SIZE, first=True)),
        "layer, cast_first, a row per head",
    ),
    "one head": (lambda: drawn(HandHeadNorm(1, SIZE)), "layer, once, a row per head"),
}


@pytest.fixture(params=CLASSES)
def case(request: pytest.FixtureRequest) -> tuple[Module, str]:
    make, formula = CLASSES[request.param]
    return make(), formula


def converted(theirs: Module, **options: Any) -> Any:
    return truenorm.convert(Holder(copy.deepcopy(theirs)), **options).norm


def inputs_of(theirs: Any, dtype: torch.dtype = F32) -> list[Tensor]:
    """Few and many values, as queries are cut from a packed projection, permuted, and strided."""
    torch.manual_seed(3)
    heads, size = theirs.weight.shape
    few, many = torch.randn(3, 7, heads, size) + 0.2, torch.randn(2, 1000 // heads, heads, size)
    packed = torch.randn(3, 9, 2 * heads * size)[..., : heads * size].view(3, 9, heads, size)
    swapped = torch.randn(3, heads, 7, size).transpose(1, 2)
    made = [few, few[1], many - 0.3, packed, swapped, few.transpose(0, 1), few[:, ::2], 0.05 * few]
    # .to() gives what is not dense another layout: cut again
    return [t.to(dtype) if t is not packed else _packed(t, dtype) for t in made]


def _packed(x: Tensor, dtype: torch.dtype) -> Tensor:
    wide = torch.cat([x.flatten(-2), x.flatten(-2)], -1).to(dtype)
    return wide[..., : wide.shape[-1] // 2].view(x.shape)


@pytest.mark.parametrize(("dtype", "weights"), PAIRS)
def test_the_same_numbers(
    case: tuple[Module, str], dtype: torch.dtype, weights: torch.dtype
) -> None:
    theirs, formula = case
    ours = converted(theirs.to(weights))
    assert ours._read.words() == formula
    for x in inputs_of(theirs, dtype):
        leaf, other = (x.detach().requires_grad_() for _ in range(2))
        expected, actual = theirs(leaf), ours(other)
        if dtype != F32 and expected.dtype == F32:
            # x̂ was rounded before: a tie there is decided by float32's own rounding
            assert (~torch.isclose(actual, expected, 1e-5, 1e-5)).double().mean() <= 0.005
        else:
            close(actual, expected)
        assert actual.stride() == expected.stride()
        grad = torch.randn(expected.shape).to(expected.dtype)
        before = torch.autograd.grad(expected, [leaf, *theirs.parameters()], grad)
        after = torch.autograd.grad(actual, [other, *ours.parameters()], grad)
        for a, b in zip(after, before, strict=True):
            assert a.shape == b.shape
            assert a.dtype == b.dtype
            # half precision adds the weights' gradients up in half precision
            bound = 2e-5 if dtype == weights == F32 else 3e-2
            assert (a.double() - b.double()).norm() <= bound * b.double().norm()


def test_which_calls_are_served(case: tuple[Module, str]) -> None:
    theirs, _ = case
    ours = converted(theirs)
    few, of_one, many, packed, swapped, *_ = inputs_of(theirs)
    for x in (few, of_one, many, packed):
        assert ours._serve(x) is not None
    if ours._keeps and theirs.weight.shape[0] > 1:
        # heads outside of positions: a group norm would copy twice
        assert ours._serve(swapped) is None
    if theirs.weight.shape[0] == 1:
        # one row, which every position has
        assert ours._serve(many[:, :, 0]) is not None
        close(ours(many[:, :, 0]), theirs(many[:, :, 0]))
    assert ours.of_sum(few, few) is None


def test_second_derivatives(case: tuple[Module, str]) -> None:
    theirs, _ = case
    ours = converted(theirs)
    for x in inputs_of(theirs)[:3]:
        found = []
        for module in (ours, theirs):
            torch.manual_seed(4)
            leaf = x.clone().requires_grad_()
            wanted = [leaf, *module.parameters()]
            y = module(leaf)
            first = torch.autograd.grad(y, wanted, torch.randn_like(y), create_graph=True)
            by = [torch.randn_like(g) for g in first if g.requires_grad]
            of_these = [g for g in first if g.requires_grad]
            found.append(torch.autograd.grad(of_these, wanted, by, allow_unused=True))
        for a, b in zip(*found, strict=True):
            # of a bias, which nothing depends on twice, there is none or zero
            if a is None or b is None:
                assert a is b or not (b if a is None else a).any()
            else:
                assert (a - b).norm() <= 5e-5 * b.norm()


def test_what_stays(case: tuple[Module, str]) -> None:
    theirs, _ = case
    model = Holder(theirs)
    kind, state = type(theirs), model.state_dict()
    truenorm.convert(model)
    assert type(model.norm) is not kind
    assert type(model.norm).__qualname__ == kind.__qualname__
    assert isinstance(model.norm, kind)
    # whose weight (H, D) would mean one statistic of both dimensions
    assert not isinstance(model.norm, (nn.LayerNorm, nn.RMSNorm))
    assert repr(model.norm) == repr(theirs)
    now = model.state_dict()
    assert list(now) == list(state)
    assert all(torch.equal(now[name], value) for name, value in state.items())
    x = inputs_of(theirs)[2]
    for again in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert type(again.norm) is type(model.norm)
        assert torch.equal(again(x), model(x))
    with truenorm.reverted(model):
        assert type(model.norm) is kind
    truenorm.revert(model)
    assert type(model.norm) is kind


@pytest.mark.parametrize("name", ["Llama", "by hand, cast first"])
def test_rounding_once(name: str) -> None:
    theirs = CLASSES[name][0]().to(BF16)
    exact: Any = copy.deepcopy(theirs).double()
    ours = converted(theirs, rounding="once")
    x = inputs_of(theirs, BF16)[2]
    wide = x.double()
    if name != "Llama":
        wide = wide - wide.mean(-1, keepdim=True)
    eps = getattr(theirs, "variance_epsilon", None) or theirs.eps
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * exact.weight
    expected = wide + exact.bias if hasattr(exact, "bias") else wide
    assert (ours(x) != expected.to(BF16)).double().mean() <= 1e-3
    assert (theirs(x) != expected.to(BF16)).double().mean() > 0.1


def test_a_weight_with_heads_is_tried_beside_one_without() -> None:
    kinds = [of(COHERE, shape) for shape in (SIZE, (HEADS, SIZE), (3, 8), (1, 8))]
    model = truenorm.convert(nn.Sequential(*kinds))
    assert [isinstance(norm, nn.LayerNorm) for norm in model] == [True, False, False, False]
    assert all(isinstance(norm, Ruled) for norm in model)
    for norm, plain in zip(model, kinds, strict=True):
        x = torch.randn(40, 11, *plain.weight.shape)
        close(norm(x), type(plain).forward(plain, x))


def test_inputs_that_do_not_fit_are_the_classes_own() -> None:
    theirs = CLASSES["by hand"][0]()
    ours = converted(theirs)
    broadcast = torch.randn(3, 2, 1, SIZE)
    assert torch.equal(ours(broadcast), theirs(broadcast))
    with pytest.raises(RuntimeError, match=r"size of tensor a \(5\) must match"):
        ours(torch.randn(3, 7, 4, SIZE))


def test_why_some_are_left() -> None:
    chameleon = of(f"{HF}.chameleon.modeling_chameleon.ChameleonLayerNorm", (HEADS, SIZE))
    (row,) = truenorm.survey(Holder(chameleon)).norms
    assert not row.swappable
    assert row.reason.startswith("a row of weights per head after torch's layer_norm")


@pytest.mark.parametrize(
    ("weight", "bias", "said"),
    [
        ((4, 8), (8,), r"it has 'weight' \(4, 8\) and 'bias' \(8,\), which truenorm serves where"),
        ((4, 8), (1, 8), r"it has 'weight' \(4, 8\) and 'bias' \(1, 8\), which"),
        ((2, 4, 8), (2, 4, 8), "its 'weight' has 3 dimensions, not 1"),
    ],
)
def test_shapes_that_no_rule_has(
    weight: tuple[int, ...], bias: tuple[int, ...], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recognition, "_found", {})
    truenorm.register_norm(HandHeadNorm, Rule("layer", bias="bias"))
    try:
        found = recognise(HandHeadNorm(*weight, bias=bias))
    finally:
        truenorm.register_norm(HandHeadNorm, None)
    assert found is not None
    assert found.kind is None
    with pytest.raises(ValueError, match=said):
        raise ValueError(found.reason)


def test_a_bias_of_another_shape_beside_one_that_was_tried() -> None:
    model = Holder(drawn(HandHeadNorm(4, 8)))
    truenorm.convert(model)
    other = drawn(HandHeadNorm(4, 8, bias=(1, 8)))
    ours = converted(other)
    x = torch.randn(1100, 4, 8)
    assert torch.equal(ours(x), other(x))


def test_a_wrong_number_of_groups_would_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recognition, "_found", {})
    monkeypatch.setattr(_orders, "Axes", lambda heads, *rest: Axes(1, *rest))
    truenorm.register_norm(HandHeadNorm, Rule("layer", bias="bias"))
    try:
        found = recognise(HandHeadNorm(HEADS, SIZE))
    finally:
        truenorm.register_norm(HandHeadNorm, None)
    assert found is not None
    assert found.kind is None
    assert "truenorm's kernels differ" in found.reason
