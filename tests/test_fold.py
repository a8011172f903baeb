"""fold: the same function with fewer layers, and every reason to keep one."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from cases import randomize
from tolerances import relative
from torch import Tensor, nn
from torch.nn import Module
from torch.nn.utils import parametrizations

import truenorm
from truenorm import fold
from truenorm._models.folding import Folding

# two float32 layers in one: the product is rounded once more than each of them
FOLDED = 2e-6

CONVOLUTIONS = [
    (nn.Conv1d, {}, "BatchNorm1d"),
    (nn.Conv2d, {"padding": 1, "bias": False}, "BatchNorm2d"),
    (nn.Conv2d, {"groups": 2, "stride": 2, "dilation": 2}, "SyncBatchNorm"),
    (nn.Conv2d, {"padding": "same", "padding_mode": "circular"}, "InstanceNorm2d"),
    (nn.Conv3d, {"groups": 3, "padding": 1}, "BatchNorm3d"),
    (nn.ConvTranspose1d, {"groups": 2, "stride": 2}, "InstanceNorm1d"),
    (nn.ConvTranspose2d, {"stride": 2, "padding": 1, "output_padding": 1}, "BatchNorm2d"),
    (nn.ConvTranspose3d, {"groups": 3, "bias": False}, "BatchNorm3d"),
]
BEFORE = [
    (nn.Conv1d, {"groups": 3}, "BatchNorm1d"),
    (nn.Conv2d, {"padding": "valid"}, "InstanceNorm2d"),
    (nn.Conv2d, {"padding": 2, "padding_mode": "reflect", "groups": 3}, "BatchNorm2d"),
    (nn.Conv3d, {"bias": False, "stride": 2}, "BatchNorm3d"),
]


def norm(name: str, channels: int, library: Any = truenorm) -> Any:
    tracking = {"affine": True, "track_running_stats": True}
    return getattr(library, name)(channels, **(tracking if "Instance" in name else {}))


def image(layer: Any, channels: int) -> Tensor:
    return torch.randn(2, channels, *[6, 7, 8][: layer.weight.dim() - 2])


def check_same(result: Folding, model: Module, x: Tensor, bound: float) -> None:
    exact = copy.deepcopy(model).double()(x.double())
    scale = exact.abs().max()
    assert ((result.model(x) - exact).abs().max() / scale).item() < bound


@pytest.mark.parametrize("library", [nn, truenorm], ids=["torch", "truenorm"])
@pytest.mark.parametrize(("kind", "kwargs", "name"), CONVOLUTIONS)
def test_after_a_convolution(library: Any, kind: Any, kwargs: Any, name: str) -> None:
    model = nn.Sequential(kind(6, 12, 3, **kwargs), norm(name, 12, library), nn.ReLU())
    randomize(model).eval()
    result = fold(model)
    assert [type(m) for m in result.model] == [kind, nn.Identity, nn.ReLU]
    assert type(model[1]) is getattr(library, name)
    (folded,) = result.folded
    assert (folded.name, folded.kind, folded.into, folded.side) == ("1", name, "0", "before")
    assert 0.0 < folded.error < FOLDED
    assert 0.0 < folded.error_before < FOLDED
    x = image(model[0], 6)
    # the output before the ReLU too, which would hide what is below zero
    check_same(result, model, x, FOLDED)
    assert relative(result.model[:2](x), model.double()[:2](x.double())) < FOLDED


@pytest.mark.parametrize(("kind", "kwargs", "name"), BEFORE)
def test_before_a_convolution(kind: Any, kwargs: Any, name: str) -> None:
    model = randomize(nn.Sequential(norm(name, 6), nn.Dropout(), kind(6, 9, 3, **kwargs))).eval()
    result = fold(model)
    assert [f.side for f in result.folded] == ["after"]
    assert not result.kept
    check_same(result, model, image(model[2], 6), FOLDED)


def test_around_one_layer() -> None:
    model = nn.Sequential(
        nn.BatchNorm1d(6), nn.Linear(6, 9, bias=False), nn.BatchNorm1d(9), nn.BatchNorm1d(9)
    )
    randomize(model).eval()
    result = fold(model, torch.randn(7, 6))
    assert [f.into for f in result.folded] == ["1", "1", "1"]
    assert result.error is not None
    assert result.error_before is not None
    assert 0.0 < result.error < FOLDED
    assert 0.0 < result.error_before < FOLDED
    check_same(result, model, torch.randn(5, 6), FOLDED)
    with pytest.raises(ValueError, match=r"expected 2D input \(got 3D.*folded into a Linear"):
        result.model(torch.randn(5, 9, 6))


class Block(Module):
    """A residual block that torch.fx can follow, called from one that it cannot."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)
        self.again = truenorm.BatchNorm2d(channels)

    def forward(self, x: Tensor, extra: Tensor | None = None) -> Tensor:
        y = self.again(self.second(self.norm(self.first(x)).relu()))
        return x + y if extra is None else x + y * extra


class Untraceable(Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3)
        self.stem_norm = nn.BatchNorm2d(6)
        self.blocks = nn.ModuleList([Block(6), Block(6)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem_norm(self.stem(x))
        if x.sum() > 0:
            x = -x
        for block in self.blocks:
            x = block(x)
        return x


def test_parts_of_a_model_that_cannot_be_traced() -> None:
    model = randomize(Untraceable()).eval()
    x = torch.randn(2, 3, 8, 8)
    result = fold(model, x)
    assert [f.name for f in result.folded] == [
        f"blocks.{i}.{name}" for i in (0, 1) for name in ("norm", "again")
    ]
    (kept,) = result.kept
    assert kept.name == "stem_norm"
    assert "could not be traced" in kept.reason
    check_same(result, model, x, 5 * FOLDED)


def test_a_model_with_hooks_is_not_called() -> None:
    model = randomize(Block(6))
    outer = nn.Sequential(model, nn.ReLU()).eval()
    seen: list[Any] = []
    model.register_forward_hook(lambda *_: seen.append("called"))
    assert len(fold(outer).folded) == 2
    assert not seen


def test_a_constant_leaves_nothing() -> None:
    class WithConstant(Block):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            return self.norm(self.first(x)) + torch.arange(8.0)

    model = randomize(WithConstant(6)).eval()
    before = set(vars(model))
    result = fold(model, torch.randn(2, 6, 8, 8), inplace=True)
    assert [f.name for f in result.folded] == ["norm"]
    assert set(vars(model)) == before


class Skip(Module):
    """The convolution's output goes two ways."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return y + self.norm(y)


class Reads(Skip):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)) * self.norm.weight.mean()


class Twice(Skip):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)) + self.norm(self.conv(x).relu())


class OwnForward(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


def with_hook(layer: Module) -> Module:
    layer.register_forward_hook(lambda *_: None)
    return layer


def with_values(layer: Any, name: str, value: float) -> Any:
    getattr(layer, name).data.fill_(value)
    return layer


def tied() -> Module:
    model = nn.Sequential(nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 1))
    model[3].weight = model[0].weight
    return model


def one_in_training() -> Module:
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6)).eval()
    model[1].train()
    return model


def conv(**kwargs: Any) -> nn.Conv2d:
    return nn.Conv2d(3, 6, 3, **kwargs)


KEPT = {
    "own statistics": (lambda: nn.Sequential(conv(), nn.GroupNorm(2, 6)), "own statistics"),
    "not tracked": (lambda: nn.Sequential(conv(), nn.InstanceNorm2d(6)), "own statistics"),
    "no running": (
        lambda: nn.Sequential(conv(), nn.BatchNorm2d(6, track_running_stats=False)),
        "own statistics",
    ),
    "two ways": (Skip, "stands alone before or after"),
    "read": (Reads, "could not be traced|several"),
    "twice": (Twice, "several places"),
    "activation between": (
        lambda: nn.Sequential(conv(), nn.ReLU(), nn.BatchNorm2d(6)),
        "stands alone before or after",
    ),
    "zeros between": (
        lambda: nn.Sequential(nn.BatchNorm2d(3), conv(padding=1)),
        "zeros that pad the convolution",
    ),
    "zeros between, same": (
        lambda: nn.Sequential(nn.BatchNorm2d(3), conv(padding="same")),
        "zeros that pad the convolution",
    ),
    "transposed": (
        lambda: nn.Sequential(nn.BatchNorm2d(3), nn.ConvTranspose2d(3, 6, 2, stride=2)),
        "transposed convolution after it reaches",
    ),
    "subclass": (lambda: nn.Sequential(conv(), OwnForward(6)), "OwnForward has a forward"),
    "hook": (lambda: nn.Sequential(conv(), with_hook(nn.BatchNorm2d(6))), "it has hooks"),
    "hook before": (lambda: nn.Sequential(with_hook(conv()), nn.BatchNorm2d(6)), "0, .* has hooks"),
    "parametrized": (
        lambda: nn.Sequential(parametrizations.weight_norm(conv()), nn.BatchNorm2d(6)),
        "0, before it, is parametrized",
    ),
    "tied": (tied, "shares its weights"),
    "training": (one_in_training, "in training mode"),
    "NaN": (
        lambda: nn.Sequential(conv(), with_values(nn.BatchNorm2d(6), "running_var", float("nan"))),
        "NaN or Inf",
    ),
    "range": (
        lambda: nn.Sequential(
            conv(), with_values(with_values(nn.BatchNorm2d(6), "running_var", 1e-12), "weight", 6e4)
        ).half(),
        "leave the range of torch.float16",
    ),
    "a Linear's channels": (
        lambda: nn.Sequential(nn.Linear(6, 6), norm("InstanceNorm1d", 6)),
        "whose output has its channels elsewhere",
    ),
}


@pytest.mark.parametrize("case", KEPT)
def test_kept(case: str) -> None:
    build, reason = KEPT[case]
    model = build()
    if case not in ("NaN", "range"):
        randomize(model)  # else a shift would be zero
    if case != "training":
        model.eval()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    result = fold(model)
    assert not result.folded
    (kept,) = result.kept
    assert re.search(reason, kept.reason), kept.reason
    # bit for bit: nothing was touched
    assert all(
        torch.equal(result.model.state_dict()[n].nan_to_num(9.0), v.nan_to_num(9.0))
        for n, v in state.items()
    )


def test_a_shift_of_zero_needs_no_padding() -> None:
    layer = nn.BatchNorm2d(3)
    layer.running_var.uniform_(0.5, 2.0)
    model = nn.Sequential(layer, nn.ConvTranspose2d(3, 6, 3, stride=2, padding=1)).eval()
    result = fold(model)
    assert len(result.folded) == 1
    check_same(result, model, torch.randn(2, 3, 5, 5), FOLDED)


def test_frozen_layers_of_other_libraries() -> None:
    class FrozenBatchNorm2d(Module):
        def __init__(self, channels: int) -> None:
            super().__init__()
            self.eps = 1e-3
            for name in ("weight", "bias", "running_mean", "running_var"):
                self.register_buffer(name, torch.rand(channels) + 0.5)

        def forward(self, x: Tensor) -> Tensor:
            scale = self.weight * (self.running_var + self.eps).rsqrt()
            shift = self.bias - self.running_mean * scale
            return x * scale[:, None, None] + shift[:, None, None]

    model = nn.Sequential(conv(), FrozenBatchNorm2d(6)).eval()
    result = fold(model)
    assert [f.kind for f in result.folded] == ["FrozenBatchNorm2d"]
    check_same(result, model, torch.randn(2, 3, 5, 5), FOLDED)


def test_in_place_and_in_low_precision() -> None:
    model = randomize(nn.Sequential(conv(bias=False), truenorm.BatchNorm2d(6))).eval().bfloat16()
    model.to(memory_format=torch.channels_last)
    weight = model[0].weight
    exact = copy.deepcopy(model).double()
    result = fold(model, inplace=True)
    assert result.model is model
    assert model[0].weight is weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert model[0].bias.dtype == torch.bfloat16
    x = torch.randn(2, 3, 5, 5).bfloat16()
    # the weights are rounded to 8 bits, and so are the outputs
    assert relative(model(x), exact(x.double())) < 2**-8
    assert result.folded[0].error < 2**-7


class Misread(Skip):
    """Another path is taken by an argument than without it, as torch.fx looks."""

    def forward(self, x: Tensor, late: bool = False) -> Tensor:
        y = self.conv(x)
        return self.norm(y.relu()) if late else self.norm(y)


@pytest.mark.parametrize("inplace", [False, True])
def test_a_batch_shows_what_was_misread(inplace: bool) -> None:
    model = randomize(Misread()).eval()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    kinds = [type(m) for m in model.modules()]
    x = torch.randn(2, 3, 8, 8)
    with pytest.raises(RuntimeError, match=r"folding changed the model's output.*is unchanged"):
        fold(model, x, call=lambda m, batch: m(batch, late=True), inplace=inplace)
    assert [type(m) for m in model.modules()] == kinds
    assert all(torch.equal(model.state_dict()[n], v) for n, v in state.items())
    assert len(fold(model).folded) == 1


ACTS: dict[str, Any] = {
    "relu": {"activation": "relu"},
    "leaky_relu": {"activation": "leaky_relu", "leaky_relu_slope": 0.2},
    "elu": {"activation": "elu", "elu_alpha": 0.7},
    "gelu": {"activation": "gelu", "gelu_approximate": "tanh"},
    "silu": {"activation": "silu"},
}


@pytest.mark.parametrize("name", ACTS)
def test_an_activation_of_the_layers_own_stays(name: str) -> None:
    model = nn.Sequential(conv(), truenorm.BatchNorm2d(6, **ACTS[name]), nn.Conv2d(6, 4, 1))
    randomize(model).eval()
    x = torch.randn(2, 3, 8, 8)
    result = fold(model, x)
    (folded,) = result.folded
    assert (folded.into, folded.side) == ("0", "before")
    assert folded.error < FOLDED
    check_same(result, model, x, FOLDED)
    # before a layer it cannot be part of that one
    other = randomize(nn.Sequential(truenorm.BatchNorm2d(3, **ACTS[name]), conv())).eval()
    (kept,) = fold(other).kept
    assert "stands alone before or after" in kept.reason
    # nor is anything that follows part of what runs before it
    twice = nn.Sequential(conv(), truenorm.BatchNorm2d(6, **ACTS[name]), nn.BatchNorm2d(6))
    result = fold(randomize(twice).eval(), x)
    assert [f.name for f in result.folded] == ["1"]
    check_same(result, twice, x, FOLDED)


def _timms(features: int, **kwargs: Any) -> Module:
    norm_act = pytest.importorskip("timm.layers.norm_act")
    return norm_act.BatchNormAct2d(features, **kwargs)  # type: ignore[no-any-return]


@pytest.mark.parametrize("converted", [False, True])
def test_norms_of_timm_keep_what_follows_them(converted: bool) -> None:
    norms = _timms(6, act_layer=nn.SiLU), _timms(6, apply_act=False)
    layers = conv(bias=False), norms[0], nn.Conv2d(6, 6, 1), norms[1], nn.Conv2d(6, 4, 1)
    model = randomize(nn.Sequential(*layers)).eval()
    given = truenorm.convert(copy.deepcopy(model)) if converted else model
    x = torch.randn(2, 3, 8, 8)
    result = fold(given, x)
    assert [(f.name, f.into, f.side) for f in result.folded] == [
        ("1", "0", "before"),
        ("3", "2", "before"),
    ]
    assert all(f.error < FOLDED for f in result.folded)
    assert not result.kept
    check_same(result, model, x, FOLDED)
    # what compare finds of the two
    assert truenorm.compare(given, result.model, x).layers


def _by_catching(self: Any, x: Tensor) -> Tensor:
    y = self.conv(x)
    try:
        return y if x.sum() > -1e9 else self.norm(y)
    except torch.fx.proxy.TraceError:
        return self.norm(y)  # type: ignore[no-any-return]


# each takes another way with what stands for a tensor than with a tensor
UNSAID: dict[str, Any] = {
    "isinstance": lambda s, x: s.conv(x) if isinstance(x, Tensor) else s.norm(s.conv(x)),
    "type": lambda s, x: s.conv(x) if type(x) is Tensor else s.norm(s.conv(x)),
    "hasattr": lambda s, x: s.norm(s.conv(x)) if hasattr(x, "logits") else s.conv(x),
    "callable": lambda s, x: s.norm(s.conv(x)) if callable(x) else s.conv(x),
    "text": lambda s, x: s.conv(x) if f"{x.dim()}" == "4" else s.norm(s.conv(x)),
    "gradients": lambda s, x: s.norm(s.conv(x)) if torch.is_grad_enabled() else s.conv(x),
    "an error": _by_catching,
}


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("name", UNSAID)
def test_a_forward_that_asks_for_what_a_graph_cannot_say(name: str, deep: bool) -> None:
    kind = type("Asks", (Skip,), {"forward": UNSAID[name]})
    model = randomize(kind()).eval()
    if deep:
        model = nn.Sequential(nn.Identity(), model).eval()
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        result = fold(model)
        assert torch.equal(result.model(x), model(x))
    # isinstance() of an input is answered as by a tensor
    if name != "isinstance" or deep:
        assert not result.folded
        assert "could not be traced" in result.kept[0].reason


def test_bad_input() -> None:
    with pytest.raises(TypeError, match=r"`model` must be a torch.nn.Module, but got dict"):
        fold({})  # type: ignore[type-var]
    model = nn.Sequential(conv(), nn.BatchNorm2d(6))
    with pytest.raises(ValueError, match=r"in training mode.*call model.eval\(\)"):
        fold(model)
    model.eval()
    with pytest.raises(ValueError, match=r"\(Conv2d\) has no normalization layer"):
        fold(conv().eval())
    with pytest.raises(ValueError, match=r"failed on a batch of shape \(2, 4, 5, 5\).*channels"):
        fold(model, torch.randn(2, 4, 5, 5))
    with pytest.raises(TypeError, match=r"`batch` must be a batch .* but got list_iterator"):
        fold(model, iter([torch.randn(2, 3, 5, 5)]))
    with pytest.raises(ValueError, match=r"compiled .*fold the model first"):
        fold(torch.compile(model))
    with pytest.raises(ValueError, match=r"lazy '1.weight' has no shape"):
        fold(nn.Sequential(conv(), nn.LazyBatchNorm2d()).eval())
    assert not model.training
    assert type(model[1]) is nn.BatchNorm2d


def test_the_table() -> None:
    model = nn.Sequential(conv(), nn.BatchNorm2d(6), nn.GroupNorm(2, 6)).eval()
    text = str(fold(model, torch.randn(1, 3, 5, 5)))
    assert text.startswith("1 layer folded, 1 kept\n  1 (BatchNorm2d) into 0, which runs before it")
    assert "2 (GroupNorm) is kept: it normalizes each input by" in text
    assert "error of the output" in text
