"""Weight standardization, GRN and L2 over channels: held against each library's own class."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from norms_by_hand import (
    AnyRankNorm,
    BiaslessNorm,
    ChannelNorm,
    FixedUnitNorm,
    PermutedNorm,
    RowsNorm,
    UnitChannelNorm,
    UnitChannelNormByWidth,
    UnitNorm,
)
from test_rules import Holder, drawn, of
from tolerances import FLOAT32_BETWEEN
from torch import Tensor, nn
from torch.nn import Module

import truenorm
from truenorm._models.rules import recognise as recognition
from truenorm._models.rules.recognise import recognise
from truenorm.nn._ruled import Ruled

STD = "timm.layers.std_conv"
WAN = "diffusers.models.autoencoders.autoencoder_kl_wan.WanRMS_norm"
LAST = torch.channels_last


def _bit() -> Module:
    return of("transformers.models.bit.modeling_bit.WeightStandardizedConv2d", 96, 80, 3)


# sizes that truenorm serves: small ones are the class's own
CASES: dict[str, tuple[Any, tuple[int, ...], str]] = {
    "StdConv2d": (lambda: of(f"{STD}.StdConv2d", 96, 80, 3), (2, 96, 9, 7), "weight, steps"),
    "StdConv2dSame": (
        lambda: of(f"{STD}.StdConv2dSame", 96, 80, (3, 5), stride=2, dilation=1),
        (2, 96, 9, 8),
        "weight, steps",
    ),
    "ScaledStdConv2d": (
        lambda: of(f"{STD}.ScaledStdConv2d", 192, 80, 3, groups=2, dilation=2),
        (2, 192, 9, 7),
        "weight, steps",
    ),
    "ScaledStdConv2dSame": (
        lambda: of(f"{STD}.ScaledStdConv2dSame", 96, 80, 3, stride=(2, 3)),
        (2, 96, 10, 7),
        "weight, steps",
    ),
    "BiT's": (_bit, (2, 96, 9, 7), "weight, steps"),
    "timm's GRN": (
        lambda: of("timm.layers.grn.GlobalResponseNorm", 67), (2, 23, 25, 67), "response, steps",
    ),
    "timm's GRN, channels first": (
        lambda: of("timm.layers.grn.GlobalResponseNorm", 67, channels_last=False),
        (2, 67, 23, 25),
        "response, steps, over channels",
    ),
    "ConvNeXtV2's GRN": (
        lambda: of("transformers.models.convnextv2.modeling_convnextv2.ConvNextV2GRN", 67),
        (2, 23, 25, 67),
        "response, steps",
    ),
    "diffusers' GRN": (
        lambda: of("diffusers.models.normalization.GlobalResponseNorm", 67),
        (2, 23, 25, 67),
        "response, steps",
    ),
    "LongCat's GRN": (
        lambda: of("diffusers.models.transformers.transformer_longcat_audio_dit.AudioDiTGRN", 67),
        (2, 525, 67),
        "response, steps",
    ),
    "Wan's, images": (lambda: of(WAN, 37), (2, 37, 9, 7), "l2, steps, over channels"),
    "Wan's, with a bias": (
        lambda: of(WAN, 37, bias=True), (2, 37, 9, 7), "l2, steps, over channels",
    ),
    "Wan's, videos": (
        lambda: of(WAN, 37, images=False), (2, 37, 3, 5, 4), "l2, steps, over channels",
    ),
    "Wan's, channels last": (lambda: of(WAN, 37, channel_first=False), (2, 9, 37), "l2, steps"),
    "Kandinsky's": (
        lambda: of(
            "diffusers.models.autoencoders.autoencoder_kandinsky6_sr.Kandinsky6VAERMSNorm", 37
        ),
        (2, 37, 3, 5, 4),
        "l2, steps, over channels",
    ),
    "by hand, a weight": (lambda: drawn(UnitNorm(37)), (2, 9, 37), "l2, steps"),
    "by hand, 1 + a weight": (
        lambda: drawn(UnitNorm(37, plus=1.0)), (2, 9, 37), "l2, steps, 1 + gamma",
    ),
    "by hand, a weight per head": (
        lambda: drawn(UnitNorm(3, 1, 37)), (2, 3, 9, 37), "l2, steps",
    ),
    "by hand, images": (
        lambda: drawn(UnitChannelNorm(37)), (2, 37, 9, 7), "l2, steps, over channels",
    ),
    "by hand, centred images": (
        lambda: drawn(ChannelNorm(1, 37, 1, 1)), (2, 37, 9, 7), "layer, steps, over channels",
    ),
    "by hand, centred samples": (
        lambda: drawn(ChannelNorm(37, 1, 1, 1)), (2, 37, 3, 5, 4), "layer, steps, over channels",
    ),
    "by hand, any rank": (
        lambda: drawn(AnyRankNorm(37)), (2, 37, 9, 7), "layer, steps, over channels",
    ),
}  # fmt: skip


def test_a_convolution_of_another_size_is_not_tried_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tried = []
    real = recognition.prove
    monkeypatch.setattr(recognition, "prove", lambda *a: tried.append(a) or real(*a))
    monkeypatch.setattr(recognition, "_found", {})
    sizes = ((8, 8, 3), (16, 24, 3), (6144, 8, 1), (8, 16, 1))
    model = nn.Sequential(*(of(f"{STD}.ScaledStdConv2d", *size) for size in sizes))
    assert truenorm.survey(model).swappable == 4
    assert len(tried) == 2


def test_a_stride_that_is_changed_is_read_at_each_call() -> None:
    theirs = of(f"{STD}.StdConv2d", 96, 80, 3)
    ours = truenorm.convert(copy.deepcopy(theirs))
    for each in (theirs, ours):
        each.stride, each.padding, each.dilation = (2, 1), (0, 2), (2, 2)
    assert isinstance(ours, Ruled)
    x = torch.randn(2, 96, 9, 7)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[Module, Tensor, str]:
    make, shape, formula = CASES[request.param]
    generator = torch.Generator().manual_seed(5)
    return make(), torch.randn(shape, generator=generator), formula


def layouts(x: Tensor) -> list[Tensor]:
    if x.dim() == 4:
        return [x, x.to(memory_format=LAST), 0.01 * x]
    return [x, x.to(memory_format=torch.channels_last_3d)] if x.dim() == 5 else [x]


def test_the_same_numbers(case: tuple[Module, Tensor, str]) -> None:
    theirs, example, formula = case
    ours: Any = truenorm.convert(Holder(copy.deepcopy(theirs))).norm
    assert isinstance(ours, Ruled)
    assert ours._read.words() == formula
    served = 0
    for x in layouts(example):
        served += ours._serve(x) is not None
        outputs, gradients = [], []
        for module in (ours, theirs):
            leaf = x.detach().requires_grad_()
            outputs.append(module(leaf))
            grad = torch.randn(outputs[-1].shape, generator=torch.Generator().manual_seed(4))
            wanted = [leaf, *module.parameters()]
            gradients.append(torch.autograd.grad(outputs[-1], wanted, grad))
        assert outputs[0].stride() == outputs[1].stride()
        scale = outputs[1].abs().max().clamp(min=1.0)
        assert (outputs[0] - outputs[1]).abs().max() <= FLOAT32_BETWEEN * scale
        for actual, expected in zip(*gradients, strict=True):
            assert actual.shape == expected.shape
            # torch's gradient of a batch norm adds in float32 what nearly cancels
            assert (actual - expected).norm() <= 5e-5 * expected.norm()
    assert served
    with torch.no_grad():
        y = ours(torch.zeros_like(example))
        assert torch.equal(y, theirs(torch.zeros_like(example)))


def test_half_precision_is_the_classes_own(case: tuple[Module, Tensor, str]) -> None:
    theirs, x, _ = case
    ours = truenorm.convert(Holder(copy.deepcopy(theirs))).norm
    theirs.bfloat16()
    ours.bfloat16()
    assert torch.equal(ours(x.bfloat16()), theirs(x.bfloat16()))


def test_what_stays(case: tuple[Module, Tensor, str]) -> None:
    theirs, x, _ = case
    model = Holder(theirs)
    kind, keys, said = type(theirs), list(model.state_dict()), repr(theirs)
    truenorm.convert(model)
    assert isinstance(model.norm, kind)
    assert repr(model.norm) == said
    assert list(model.state_dict()) == keys
    again = pickle.loads(pickle.dumps(model))
    assert type(again.norm) is type(model.norm)
    assert torch.equal(again(x), model(x))
    torch._dynamo.reset()  # one frame for all of these classes
    compiled = torch.compile(model, backend="eager", fullgraph=True)(x)
    truenorm.revert(model)
    assert type(model.norm) is kind
    assert torch.equal(model(x), compiled)


@pytest.mark.parametrize("name", ["StdConv2d", "timm's GRN"])
def test_small_ones_are_the_classes_own(name: str) -> None:
    """Where the class takes less time: docs/howto/other-libraries.md."""
    theirs, x = {
        "StdConv2d": lambda: (of(f"{STD}.StdConv2d", 8, 8, 3), torch.randn(2, 8, 5, 5)),
        "timm's GRN": lambda: (
            of("timm.layers.grn.GlobalResponseNorm", 8), torch.randn(2, 5, 5, 8)
        ),
    }[name]()  # fmt: skip
    ours: Any = truenorm.convert(Holder(copy.deepcopy(theirs))).norm
    with torch.no_grad():
        assert ours._serve(x) is None
        assert torch.equal(ours(x), theirs(x))


def test_what_is_torchs_layer_norm_alone_is_its_own_in_small_sizes() -> None:
    theirs = drawn(BiaslessNorm(64))
    ours: Any = truenorm.convert(Holder(copy.deepcopy(theirs))).norm
    assert ours._serve(torch.randn(2, 4, 64)) is None
    assert ours._serve(torch.randn(200, 64)) is not None


def test_images_are_served_where_that_takes_less_time() -> None:
    x = torch.randn(2, 37, 9, 7)
    last = x.contiguous(memory_format=torch.channels_last)
    for theirs, small in ((ChannelNorm(1, 37, 1, 1), True), (UnitChannelNorm(37), False)):
        ours: Any = truenorm.convert(Holder(drawn(theirs))).norm
        for enabled in (True, False):
            with torch.set_grad_enabled(enabled):
                assert ours._serve(x).is_contiguous()
                assert (ours._serve(last) is not None) is (small or enabled)


def test_images_of_what_is_torchs_layer_norm_alone() -> None:
    """torch's copies a contiguous image first; of few values, and in channels_last, it is fast."""
    ours: Any = truenorm.convert(Holder(drawn(PermutedNorm(32)))).norm
    x = torch.randn(2, 32, 40, 40)
    last = x.contiguous(memory_format=torch.channels_last)
    y = ours._serve(x)
    expected = PermutedNorm.forward(ours, x)
    assert y.stride() == expected.stride() == last.stride()
    assert (y - expected).abs().max() < FLOAT32_BETWEEN
    assert ours._serve(last) is None
    assert ours.bfloat16()._serve(last.bfloat16()) is not None
    assert ours._serve(x[:, :, :5, :5].bfloat16().contiguous()) is None


class Standardized(nn.Conv2d):
    """Not timm's: by the unbiased variance."""

    def forward(self, x: Tensor) -> Tensor:
        rows = self.weight.flatten(1)
        rows = (rows - rows.mean(1, keepdim=True)) / (rows.var(1, keepdim=True) + 1e-6).sqrt()
        return nn.functional.conv2d(x, rows.reshape(self.weight.shape), self.bias)


class Response(Module):
    def __init__(self, eps: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(1, 1, 1, 8))
        self.beta = nn.Parameter(torch.zeros(1, 1, 1, 8))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        size = x.norm(dim=(1, 2), keepdim=True)
        return self.gamma * (x * size / (size.mean(-1, keepdim=True) + 0.1)) + self.beta + x


def test_what_is_not_the_formula_is_left() -> None:
    rules = {
        Standardized: truenorm.Rule("weight", "steps", weight=None, eps=1e-6),
        Response: truenorm.Rule("response", "steps", "gamma", "beta"),
    }
    modules = [drawn(Standardized(8, 8, 3)), drawn(Response(0.1)), drawn(Response(0.2))]
    for kind, rule in rules.items():
        truenorm.register_norm(kind, rule)
    try:
        found = [recognise(module) for module in modules]
    finally:
        for kind in rules:
            truenorm.register_norm(kind, None)
    assert [each is not None and each.kind is not None for each in found] == [False, True, False]
    assert found[0] is not None
    assert "not what weight, steps gives" in found[0].reason


def test_of_rows_alone_the_first_rule_that_is_proven() -> None:
    ours: Any = truenorm.convert(Holder(drawn(RowsNorm(64)))).norm
    assert ours._read.words() == "rms, cast_first"
    assert ours._ranks == {2}
    assert (torch.bfloat16, torch.bfloat16) in ours._pairs


def test_a_bias_that_is_a_buffer() -> None:
    theirs = drawn(BiaslessNorm(768))
    ours: Any = truenorm.convert(Holder(copy.deepcopy(theirs))).norm
    assert ours._read.words() == "layer, once"
    assert list(ours.state_dict()) == list(theirs.state_dict())
    x = torch.randn(2, 9, 768)
    assert ours._serve(x) is not None
    outputs, gradients = [], []
    for module in (ours, theirs):
        leaf = x.clone().requires_grad_()
        outputs.append(module(leaf))
        wanted = [leaf, *module.parameters()]
        grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(4))
        gradients.append(torch.autograd.grad(outputs[-1], wanted, grad))
    assert (outputs[0] - outputs[1]).abs().max() <= FLOAT32_BETWEEN * outputs[1].abs().max()
    for actual, expected in zip(*gradients, strict=True):
        assert (actual - expected).norm() <= 5e-5 * expected.norm()


def test_a_root_of_another_size_is_noticed() -> None:
    model = nn.ModuleList(map(drawn, (UnitChannelNormByWidth(8), FixedUnitNorm())))
    said = truenorm.survey(model)
    assert [norm.swappable for norm in said.norms] == [False, False]
    assert all("matches no known formula" in norm.reason for norm in said.norms)


def test_an_input_that_is_broadcast_to_the_weight() -> None:
    """Which is the class's own matter: its root is of the weight's size."""
    theirs = drawn(UnitNorm(37))
    ours: Any = truenorm.convert(Holder(copy.deepcopy(theirs))).norm
    for x in (torch.randn(2, 9, 1), torch.randn(3, 37).expand(2, 3, 37)):
        assert torch.equal(ours(x), theirs(x)) or (ours(x) - theirs(x)).abs().max() <= 1e-5
    assert ours._serve(torch.randn(2, 9, 1)) is None
    of_channels: Any = truenorm.convert(Holder(drawn(UnitChannelNorm(37)))).norm
    assert of_channels._serve(torch.randn(2, 1, 9, 1)) is None


def test_a_weight_that_is_computed() -> None:
    theirs = of(f"{STD}.StdConv2d", 96, 80, 3)
    ours = truenorm.convert(Holder(copy.deepcopy(theirs))).norm
    x = torch.randn(2, 96, 9, 7)
    for module in (ours, theirs):
        torch.nn.utils.parametrizations.weight_norm(module)
    assert (ours(x) - theirs(x)).abs().max() <= FLOAT32_BETWEEN * theirs(x).abs().max()
