"""Other libraries' norms: recognised, proven, swapped with their own numbers, and given back."""

from __future__ import annotations

import copy
import pickle
import re
from typing import Any

import pytest
import torch
from tolerances import FLOAT32_BETWEEN
from torch import Tensor, nn
from torch.nn import Module

import truenorm
from truenorm import Rule
from truenorm._models.rules import recognise as recognition
from truenorm._models.rules import register
from truenorm._models.rules.recognise import recognise
from truenorm.nn import _orders
from truenorm.nn._ruled import Ruled

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
SIZE = 37


class HandRMSNorm(Module):
    """Llama's; `change` makes it one that looks like it and is not."""

    def __init__(self, size: int = SIZE, eps: float = 1e-3, change: str = "") -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.variance_epsilon = eps
        self.change = change

    def forward(self, hidden_states: Tensor) -> Tensor:
        wide = hidden_states.to(F32)
        mean = wide.pow(2).mean(-1, keepdim=True)
        match self.change:
            case "eps outside":
                wide = wide / (mean.sqrt() + self.variance_epsilon)
            case "another eps":
                wide = wide * torch.rsqrt(mean + 1e-4)
            case "unbiased":
                wide = wide * torch.rsqrt(mean * SIZE / (SIZE - 1) + self.variance_epsilon)
            case "half way":
                wide = (wide * torch.rsqrt(mean + self.variance_epsilon)).to(F16).to(F32)
            case "detached":
                wide = (wide * torch.rsqrt(mean + self.variance_epsilon)).detach()
            case "half detached":
                wide = wide * torch.rsqrt(mean + self.variance_epsilon).detach()
            case "dropout":
                wide = wide * torch.rsqrt(mean + self.variance_epsilon)
                wide = nn.functional.dropout(wide, 0.1, self.training)
            case _:
                wide = wide * torch.rsqrt(mean + self.variance_epsilon)
        return self.weight * wide.to(hidden_states.dtype)


class Holder(Module):
    def __init__(self, norm: Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


def drawn(module: Module, seed: int = 0) -> Module:
    """Random weights about 1, and never 1."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in [*module.named_parameters(), *module.named_buffers()]:
        if value.is_floating_point():
            values = torch.randn(value.shape, generator=generator) * 0.3
            values = values.abs() + 0.5 if name.endswith("var") else values
            value.data.copy_(values + (1.0 if name.endswith("weight") else 0.0))
    return module


def of(path: str, *args: Any, **kwargs: Any) -> Module:
    """A module of another library's class."""
    module, _, name = path.rpartition(".")
    library = pytest.importorskip(module)
    return drawn(getattr(library, name)(*args, **kwargs))


HF = "transformers.models"
CLASSES: dict[str, tuple[Any, str]] = {
    "Llama": (lambda: of(f"{HF}.llama.modeling_llama.LlamaRMSNorm", SIZE), "cast_first"),
    "Gemma": (lambda: of(f"{HF}.gemma.modeling_gemma.GemmaRMSNorm", SIZE), "once, 1 + weight"),
    "T5": (lambda: of(f"{HF}.t5.modeling_t5.T5LayerNorm", SIZE), "to_weight"),
    "GptOss": (lambda: of(f"{HF}.gpt_oss.modeling_gpt_oss.GptOssRMSNorm", SIZE), "rms, once"),
    "Llama4's L2": (
        lambda: of(f"{HF}.llama4.modeling_llama4.Llama4TextL2Norm", 1e-5),
        "rms, once, no weight",
    ),
    "Cohere": (lambda: of(f"{HF}.cohere.modeling_cohere.CohereLayerNorm", SIZE), "layer, once"),
    "DeBERTa": (
        lambda: of(f"{HF}.deberta.modeling_deberta.DebertaLayerNorm", SIZE),
        "layer, cast_first",
    ),
    "ConvNeXt": (
        lambda: of(
            f"{HF}.convnext.modeling_convnext.ConvNextLayerNorm", SIZE, data_format="channels_first"
        ),
        "layer, once, over channels",
    ),
    "VitDet": (
        lambda: of(f"{HF}.vitdet.modeling_vitdet.VitDetLayerNorm", SIZE),
        "layer, steps, over channels",
    ),
    "DETR": (
        lambda: of(f"{HF}.detr.modeling_detr.DetrFrozenBatchNorm2d", SIZE),
        "frozen, steps, over channels",
    ),
    "timm's BatchNormAct2d": (
        lambda: of("timm.layers.norm_act.BatchNormAct2d", SIZE, act_layer=nn.SiLU),
        "batch, once, over channels, then drop, then act",
    ),
    "timm's LayerNorm2d": (
        lambda: of("timm.layers.norm.LayerNorm2d", SIZE),
        "layer, once, over channels",
    ),
    "timm's RmsNorm": (lambda: of("timm.layers.norm.RmsNorm", SIZE), "rms, once"),
    "timm's GroupNormAct": (
        lambda: of("timm.layers.norm_act.GroupNormAct", 36, num_groups=4),
        "group, once, over channels, then drop, then act",
    ),
    "timm's RmsNormAct2d": (
        lambda: of("timm.layers.norm_act.RmsNormAct2d", SIZE),
        "rms, steps, over channels, then drop, then act",
    ),
    "diffusers' RMSNorm": (
        lambda: of("diffusers.models.normalization.RMSNorm", SIZE, 1e-5, bias=True),
        "rms, to_weight",
    ),
    "torchvision's frozen": (
        lambda: of("torchvision.ops.misc.FrozenBatchNorm2d", SIZE),
        "frozen, steps, over channels",
    ),
    "by hand": (lambda: drawn(HandRMSNorm()), "cast_first"),
}
PAIRS = [(F32, F32), (BF16, BF16), (BF16, F32), (F16, F16)]


@pytest.fixture(params=CLASSES)
def case(request: pytest.FixtureRequest) -> tuple[Module, str]:
    make, formula = CLASSES[request.param]
    return make(), formula


def inputs_of(module: Module, dtype: torch.dtype) -> list[Tensor]:
    """Odd sizes, strided, channels_last, and small."""
    found = recognise(module)
    assert found is not None
    assert found.rule is not None
    size = next((p.shape[-1] for p in module.state_dict().values() if p.dim()), SIZE)
    torch.manual_seed(3)
    if found.rule.axis == 1:
        x = torch.randn(3, size, 5, 7) + 0.2
        made = [x, x.to(memory_format=torch.channels_last), x.transpose(2, 3), 0.05 * x]
    else:
        x = torch.randn(3, 5, 7, size) + 0.2
        made = [x, x[0], x.transpose(1, 2), x[:, 1:, ::2], 0.05 * x]
    return [each.to(dtype) for each in made]


def close(actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    if actual.dtype == F32:
        scale = expected.abs().max().clamp(min=1.0)
        assert (actual - expected).abs().max() <= FLOAT32_BETWEEN * scale
        return
    # rounded alike but where float32's own rounding decides
    assert (actual != expected).float().mean() <= 0.005


@pytest.mark.parametrize(("dtype", "weights"), PAIRS)
def test_the_same_numbers(
    case: tuple[Module, str], dtype: torch.dtype, weights: torch.dtype
) -> None:
    theirs, formula = case
    theirs.to(weights).eval()
    ours = truenorm.convert(Holder(copy.deepcopy(theirs))).norm
    if not isinstance(ours, Ruled):  # made step by step in that dtype: the class's own is left
        assert "steps" in formula
        return
    assert formula in ours._read.words()
    for x in inputs_of(in_float32(theirs), dtype):
        if ours._read.kind == "batch" and not (_is_dense(x) or weights == F32):
            continue  # torch's own kernel for such a layout rounds scale and shift to half first
        try:
            leaf = x.clone().requires_grad_()
            expected = theirs(leaf)
        except RuntimeError as error:
            with pytest.raises(RuntimeError, match=re.escape(str(error))):
                ours(x)
            continue
        other = x.clone().requires_grad_()
        actual = ours(other)
        close(actual, expected)
        grad = torch.randn(expected.shape).to(expected.dtype)
        wanted = [p for p in theirs.parameters() if p.requires_grad]
        given = [p for p in ours.parameters() if p.requires_grad]
        before = torch.autograd.grad(expected, [leaf, *wanted], grad)
        after = torch.autograd.grad(actual, [other, *given], grad)
        for a, b in zip(after, before, strict=True):
            bound = 2e-5 if dtype == weights == F32 else 3e-2
            assert (a.double() - b.double()).norm() <= bound * b.double().norm()


def in_float32(module: Module) -> Module:
    """Recognised in float32, whatever the dtype that it has now."""
    return copy.deepcopy(module).float()


def _is_dense(x: Tensor) -> bool:
    return x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)


def test_layout_is_the_classes_own(case: tuple[Module, str]) -> None:
    theirs, _ = case
    ours = truenorm.convert(Holder(copy.deepcopy(theirs))).norm
    for x in inputs_of(theirs, F32):
        if ours._read.kind in ("batch", "group") and not _is_dense(x):
            continue  # as truenorm's layer has it
        assert ours(x).stride() == theirs(x).stride()


def test_what_stays(case: tuple[Module, str]) -> None:
    theirs, _ = case
    model = Holder(theirs)
    kind, keys = type(theirs), list(model.state_dict())
    tensors = [*model.parameters(), *model.buffers()]
    held, state = dict(vars(theirs)), torch.get_rng_state()
    assert truenorm.convert(model) is model
    assert torch.equal(torch.get_rng_state(), state)
    assert isinstance(model.norm, kind)
    assert type(model.norm) is not kind
    assert type(model.norm).__name__ == kind.__name__
    assert type(model.norm).__qualname__ == kind.__qualname__
    assert repr(model.norm) == repr(drawn(theirs))
    assert list(model.state_dict()) == keys
    now = [*model.parameters(), *model.buffers()]
    assert all(a is b for a, b in zip(now, tensors, strict=True))
    assert all(p.grad is None for p in model.parameters())
    with truenorm.reverted(model):
        assert type(model.norm) is kind
    assert type(model.norm) is not kind
    again = pickle.loads(pickle.dumps(model))
    assert type(again.norm) is type(model.norm)
    assert type(copy.deepcopy(model).norm) is type(model.norm)
    truenorm.revert(model)
    assert type(model.norm) is kind
    assert vars(theirs) == held


CHANGES = [
    "eps outside", "another eps", "unbiased", "half way", "detached", "half detached", "dropout"
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("told", [True, False])
def test_what_is_not_the_formula_is_left(change: str, told: bool) -> None:
    model = Holder(drawn(HandRMSNorm(change=change)))
    before = copy.deepcopy(model.state_dict())
    rule = Rule("rms", "cast_first", eps="variance_epsilon")
    truenorm.register_norm(HandRMSNorm, rule if told else None)
    try:
        row = truenorm.survey(model).norms[0]
        truenorm.convert(model)
    finally:
        truenorm.register_norm(HandRMSNorm, None)
    assert not row.swappable
    assert ("not what rms, cast_first gives" if told else "no known formula") in row.reason
    assert type(model.norm) is HandRMSNorm
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("rounding", ["once", "to_weight"])
def test_another_order_of_casts_is_refused(rounding: Any) -> None:
    truenorm.register_norm(HandRMSNorm, Rule("rms", rounding, eps="variance_epsilon"))
    try:
        found = recognise(HandRMSNorm())
    finally:
        truenorm.register_norm(HandRMSNorm, None)
    assert found is not None
    assert found.kind is None
    assert "bfloat16" in found.reason or "float16" in found.reason


def test_rounding_once() -> None:
    torch.manual_seed(0)
    theirs = drawn(HandRMSNorm(256)).to(BF16)
    x = torch.randn(50, 256).to(BF16)
    exact = copy.deepcopy(theirs).double().weight * nn.functional.rms_norm(
        x.double(), (256,), None, 1e-3
    )
    ours = truenorm.convert(Holder(copy.deepcopy(theirs)), rounding="once").norm
    assert torch.equal(ours(x), exact.to(BF16))
    assert (theirs(x) != exact.to(BF16)).float().mean() > 0.1
    ours = truenorm.convert(Holder(ours), rounding="module").norm
    close(ours(x), theirs(x))
    with pytest.raises(ValueError, match=r"`rounding` \(='twice'\) must be"):
        truenorm.convert(Holder(theirs), rounding="twice")  # type: ignore[arg-type]


def test_calls_that_the_class_serves_itself() -> None:
    theirs = drawn(HandRMSNorm())
    ours = truenorm.convert(Holder(copy.deepcopy(theirs))).norm
    x = torch.randn(5, SIZE)
    close(ours(hidden_states=x), theirs(x))
    assert torch.equal(ours(hidden_states=x), ours(x))
    assert torch.equal(ours(x.double()), theirs(x.double()))
    with torch.autocast("cpu"):
        assert torch.equal(ours(x), theirs(x))
    assert torch.equal(torch.func.vmap(ours)(x), torch.func.vmap(theirs)(x))
    for each in (x[:, :5], "x"):
        with pytest.raises(Exception) as before:  # noqa: PT011  (whatever the class raises)
            theirs(each)
        with pytest.raises(type(before.value), match=re.escape(str(before.value))):
            ours(each)


def test_compiled_exported_traced_and_scripted() -> None:
    theirs = of(f"{HF}.llama.modeling_llama.LlamaRMSNorm", SIZE)
    model = truenorm.convert(Holder(copy.deepcopy(theirs)))
    x = torch.randn(5, SIZE)
    expected = theirs(x)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), expected)
    exported = torch.export.export(model, (x,))
    assert torch.equal(exported.module()(x), expected)
    assert not [n for n in exported.graph.nodes if "truenorm" in str(n.target)]
    assert torch.equal(torch.fx.symbolic_trace(model)(x), expected)
    assert torch.equal(torch.func.functional_call(model, {}, (x,)), model(x))


def test_options_hold_where_the_class_would_serve_itself() -> None:
    model = truenorm.convert(Holder(of("timm.layers.norm_act.BatchNormAct2d", SIZE)))
    truenorm.freeze(model)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    x = torch.randn(2, SIZE, 5, 3)
    model.train()
    model(x)
    with torch.autocast("cpu"):
        model(x)
    model.norm(x=x)
    torch.compile(model, backend="eager")(x)
    model.double()(x.double())
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name].to(buffer.dtype)), name


def test_weights_that_cannot_be_tried() -> None:
    for dtype in (torch.float64, torch.float8_e4m3fn):
        found = recognise(HandRMSNorm().to(dtype))
        assert found is not None
        assert found.kind is None
        assert str(dtype) in found.reason


def test_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = Holder(HandRMSNorm())
    truenorm.convert(model)
    assert type(model.norm) is not HandRMSNorm
    assert model.norm.weight.is_meta
    theirs = drawn(HandRMSNorm())
    model.to_empty(device="cpu").norm.load_state_dict(theirs.state_dict())
    x = torch.randn(4, SIZE)
    close(model(x), theirs(x))


def test_each_class_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []
    real = recognition.prove
    monkeypatch.setattr(recognition, "prove", lambda *a: tried.append(a) or real(*a))
    monkeypatch.setattr(recognition, "_found", {})
    truenorm.convert(nn.Sequential(*(HandRMSNorm(size) for size in (8, 8, 16, 32))))
    first = len(tried)
    truenorm.convert(nn.Sequential(*(HandRMSNorm(size) for size in (8, 64))))
    assert len(tried) == first > 0
    truenorm.convert(HandRMSNorm(8, eps=1e-2))
    assert len(tried) > first


def test_a_subclass_that_inherits_the_forward() -> None:
    class Mine(HandRMSNorm):
        def extra_repr(self) -> str:
            return "mine"

    norm = truenorm.convert(Holder(Mine())).norm
    assert isinstance(norm, Mine)
    assert isinstance(norm, truenorm.RMSNorm)
    assert repr(norm) == "Mine(mine)"
    assert norm.normalized_shape == (SIZE,)
    assert norm.eps == norm.variance_epsilon == 1e-3
    assert not hasattr(norm, "reset_parameters")


def test_only() -> None:
    model = nn.Sequential(HandRMSNorm(), nn.LayerNorm(SIZE))
    truenorm.convert(model, only=(HandRMSNorm,))
    assert type(model[0]) is not HandRMSNorm
    assert type(model[1]) is nn.LayerNorm
    with pytest.raises(ValueError, match="`only` names 'Linear'"):
        truenorm.convert(model, only=(nn.Linear,))


class Tripled(Module):
    """No formula that anybody knows: y = 3 · x̂, say."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(SIZE))

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()
        return (self.scale * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-4)).to(x.dtype)


def test_told_by_name_and_taken_back() -> None:
    name = f"{Tripled.__module__}.{Tripled.__qualname__}"
    assert recognise(Tripled()) is None  # nothing in its name says that it is a norm
    truenorm.register_norm(name, lambda m: Rule("rms", weight="scale", eps=1e-4, wide_output=True))
    found = recognise(Tripled())
    assert found is not None
    truenorm.register_norm(name, None)
    assert found.kind is not None or "not what" in found.reason
    assert recognise(Tripled()) is None


def test_a_reader_that_fails_leaves_the_class() -> None:
    truenorm.register_norm(HandRMSNorm, lambda module: module.no_such_thing)
    try:
        row = truenorm.survey(Holder(HandRMSNorm())).norms[0]
    finally:
        truenorm.register_norm(HandRMSNorm, None)
    assert "no_such_thing" in row.reason


def test_register_norm_of_something_else() -> None:
    with pytest.raises(TypeError, match=r"`norm` \(=3\) must be a torch.nn.Module class"):
        truenorm.register_norm(3, Rule("rms"))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"`norm` \(='RMSNorm'\) must be .* qualified name"):
        truenorm.register_norm("RMSNorm", Rule("rms"))
    with pytest.raises(TypeError, match=r"`read` \(='rms'\) must be a truenorm.Rule"):
        truenorm.register_norm(HandRMSNorm, "rms")  # type: ignore[arg-type]


class FrozenBatchNorm2d(Module):
    """detectron2's: torch's operator where no gradient is wanted."""

    def __init__(self) -> None:
        super().__init__()
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0)):
            self.register_buffer(name, torch.full((SIZE,), value))
        self.register_buffer("running_var", torch.ones(SIZE) - 1e-5)
        self.eps = 1e-5

    def forward(self, x: Tensor) -> Tensor:
        if not x.requires_grad:
            stats = self.running_mean, self.running_var
            return nn.functional.batch_norm(x, *stats, self.weight, self.bias, eps=self.eps)
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale.reshape(1, -1, 1, 1) + shift.reshape(1, -1, 1, 1)


def test_a_frozen_batch_norm_is_no_batch_norm() -> None:
    theirs = drawn(FrozenBatchNorm2d())
    ours = truenorm.convert(Holder(copy.deepcopy(theirs))).norm
    assert isinstance(ours, Ruled)
    # whoever moves or synchronizes running statistics looks for that class
    assert not isinstance(ours, nn.modules.batchnorm._BatchNorm)
    x = torch.randn(2, SIZE, 5, 3)
    close(ours(x), theirs(x))


class Point:
    name = "somebody's"

    def load(self) -> Any:
        raise ImportError("not today")


def test_an_entry_point_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(register, "_loaded", False)
    monkeypatch.setattr(register, "entry_points", lambda group: [Point()])
    monkeypatch.setattr(recognition, "_found", {})
    with pytest.warns(RuntimeWarning, match="somebody's.* failed.*not today"):
        model = truenorm.convert(Holder(HandRMSNorm()))
    assert isinstance(model.norm, Ruled)
    truenorm.convert(Holder(HandRMSNorm()))  # said once


def test_an_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    point = Point()
    monkeypatch.setattr(point, "load", lambda: lambda: called.append("here"), raising=False)
    monkeypatch.setattr(register, "_loaded", False)
    monkeypatch.setattr(register, "entry_points", lambda group: [point])
    truenorm.convert(Holder(HandRMSNorm()))
    truenorm.convert(Holder(HandRMSNorm()))
    assert called == ["here"]


def test_without_the_rule_the_kernels_would_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    """What truenorm computes is held against the class too, not only the formula."""
    monkeypatch.setattr(recognition, "_found", {})
    real = _orders._kernel
    monkeypatch.setattr(_orders, "_kernel", lambda *args: real(*args) * (1 + 1e-4))
    found = recognise(HandRMSNorm())
    assert found is not None
    assert found.kind is None
    monkeypatch.setattr(recognition, "_found", {})
    row = truenorm.survey(of(f"{HF}.llama.modeling_llama.LlamaRMSNorm", SIZE)).norms[0]
    assert "truenorm's kernels differ" in row.reason or "not what" in row.reason


class Scaled(Module):
    """An RMSNorm whose forward goes by attributes that are no part of a rule."""

    def __init__(self, size: int = SIZE, scale: float = 1.0, over: str = "last") -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = 1e-5
        self.scale = scale
        self.over = over
        self.tag = "unread"

    def forward(self, x: Tensor) -> Tensor:
        dim = -1 if self.over == "last" else 0
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(dim, keepdim=True) + self.eps)
        return (self.scale * wide * self.weight).to(x.dtype)


class ScaledRMSNorm(Scaled):
    pass


@pytest.mark.parametrize(("name", "value"), [("scale", 3.0), ("over", "first"), ("scale", 2)])
def test_an_attribute_that_the_forward_goes_by_is_changed(name: str, value: Any) -> None:
    theirs = drawn(ScaledRMSNorm())
    ours = truenorm.convert(copy.deepcopy(theirs))
    assert isinstance(ours, Ruled)
    x = torch.randn(64, SIZE)
    for each in (theirs, ours):
        each.eps, each.tag = 0.5, "another"  # which truenorm's reads, and which nobody reads
    assert isinstance(ours, Ruled)
    torch.testing.assert_close(ours(x), theirs(x))
    for each in (theirs, ours):
        setattr(each, name, value)
    torch.testing.assert_close(ours(x), theirs(x))
    assert type(ours) is ScaledRMSNorm
    setattr(ours, name, {"scale": 1.0, "over": "last"}[name])
    assert isinstance(truenorm.convert(ours), Ruled)


def test_one_more_of_a_swapped_norms_class() -> None:
    ours = truenorm.convert(ScaledRMSNorm())
    x = torch.randn(64, 24)
    assert isinstance(type(ours)(24), Ruled)
    torch.testing.assert_close(type(ours)(24, scale=2.0)(x), ScaledRMSNorm(24, scale=2.0)(x))


class CountingRMSNorm(HandRMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        self.calls = getattr(self, "calls", 0) + 1
        return super().forward(x)


class RememberingRMSNorm(HandRMSNorm):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x)
        return super().forward(x)


@pytest.mark.parametrize("told", [False, True])
def test_a_forward_that_leaves_something_on_its_module(told: bool) -> None:
    rule = Rule("rms", "cast_first", eps="variance_epsilon")
    model = nn.ModuleList([CountingRMSNorm(), RememberingRMSNorm()])
    for norm in model if told else ():
        truenorm.register_norm(type(norm), rule)
    try:
        truenorm.convert(model)
        reasons = [norm.reason for norm in truenorm.survey(model).norms]
    finally:
        for norm in model:
            truenorm.register_norm(type(norm), None)
    said = ["'calls'", "'seen'"] if told else ["no known formula"] * 2
    assert all(each in reason for each, reason in zip(said, reasons, strict=True)), reasons
    for norm in model:
        norm(torch.randn(200, SIZE))
    counting, remembering = model
    assert counting.calls == 1
    assert len(remembering.seen) == 1


class UnlikeFarOutRMSNorm(HandRMSNorm):
    """The formula, but for values that are large or not finite, or without gradients."""

    def forward(self, x: Tensor) -> Tensor:
        match self.change:
            case "clamps":
                x = x.clamp(-1e4, 1e4)
            case "refuses":
                assert x.isfinite().all()
        y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon) * self.weight
        match self.change:
            case "clamps outputs":
                return y.clamp(-50, 50)
            case "replaces":
                return y.nan_to_num()
            case "rounds":
                return y if torch.is_grad_enabled() else y.round(decimals=1)
        return y


@pytest.mark.parametrize("change", ["clamps", "clamps outputs", "refuses", "replaces", "rounds"])
def test_a_class_that_is_unlike_its_formula_far_out(change: str) -> None:
    assert isinstance(truenorm.convert(UnlikeFarOutRMSNorm()), Ruled)
    theirs = drawn(UnlikeFarOutRMSNorm(change=change))
    assert type(truenorm.convert(theirs)) is UnlikeFarOutRMSNorm
