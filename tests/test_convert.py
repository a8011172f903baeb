"""convert and revert: every torch norm layer of a model, in place, and back."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from cases import CASES, IDS, Case, randomize
from tolerances import FLOAT32_BETWEEN, LOSS_AFTER_TRAINING, relative
from torch import Tensor, nn
from torch.nn import Module
from torch.nn.utils import parametrizations, parametrize

import truenorm
from truenorm import convert, revert


class Residual(Module):
    """As in a ResNet: BatchNorm after each convolution, a shortcut beside them."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels, momentum=None),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.body(x))


class ResNet(Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 9, 3, padding=1), nn.SyncBatchNorm(9), nn.ReLU())
        self.blocks = nn.ModuleList([Residual(9), Residual(9)])
        self.head = nn.Sequential(nn.LayerNorm(9), nn.Linear(9, 5), nn.BatchNorm1d(5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


class UNet(Module):
    """Instance, group and local response norms, with a skip; the middle is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1), nn.InstanceNorm2d(6, affine=True), nn.LeakyReLU(0.1)
        )
        self.middle = nn.Sequential(
            nn.Conv2d(6, 6, 3, padding=1), nn.GroupNorm(2, 6), nn.LocalResponseNorm(3), nn.SiLU()
        )
        self.up = nn.Sequential(
            nn.Conv2d(12, 5, 1), nn.InstanceNorm2d(5, track_running_stats=True), nn.RMSNorm((8, 8))
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(x)
        small = self.middle(self.middle(nn.functional.avg_pool2d(x, 2)))
        x = self.up(torch.cat([x, nn.functional.interpolate(small, scale_factor=2.0)], 1))
        return x.mean((2, 3))


def norms(model: Module) -> list[Module]:
    torch_layers = tuple(getattr(nn, name) for name in truenorm.nn.__all__)
    return [m for m in model.modules() if isinstance(m, torch_layers)]


def is_ours(module: Module) -> bool:
    return type(module).__module__ == "truenorm.nn"


NETS = pytest.mark.parametrize("net", [ResNet, UNet])


@NETS
def test_every_layer_and_back(net: Any) -> None:
    model = randomize(net())
    before = {name: type(m) for name, m in model.named_modules()}
    state, order = {k: v.clone() for k, v in model.state_dict().items()}, list(model.state_dict())
    tensors = [*model.parameters(), *model.buffers()]
    assert convert(model) is model
    assert len(norms(model)) >= 5
    assert all(is_ours(m) for m in norms(model))
    assert [type(m).__name__ for m in model.modules()] == [t.__name__ for t in before.values()]
    assert all(
        a is b for a, b in zip([*model.parameters(), *model.buffers()], tensors, strict=True)
    )
    assert revert(model) is model
    assert {name: type(m) for name, m in model.named_modules()} == before
    assert list(model.state_dict()) == order
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


@NETS
def test_twice_is_once(net: Any) -> None:
    model = convert(net())
    kinds = [type(m) for m in model.modules()]
    assert [type(m) for m in convert(model).modules()] == kinds
    kinds = [type(m) for m in revert(model).modules()]
    assert [type(m) for m in revert(model).modules()] == kinds


def train(model: Module, steps: int) -> list[float]:
    """Losses of a few steps on one task; the optimizer goes on through a conversion halfway."""
    generator = torch.Generator().manual_seed(3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for _ in range(steps):
        x = torch.randn(6, 3, 8, 8, generator=generator)
        target = torch.randint(5, (6,), generator=generator)
        loss = nn.functional.cross_entropy(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@NETS
def test_training_as_with_torch(net: Any) -> None:
    theirs = net()
    ours = convert(copy.deepcopy(theirs))
    expected, actual = train(theirs, 6), train(ours, 6)
    assert len(set(expected)) == 6
    assert actual == pytest.approx(expected, rel=LOSS_AFTER_TRAINING)
    x = torch.randn(4, 3, 8, 8)
    y, wanted = ours.eval()(x), theirs.eval()(x)
    assert relative(y, wanted) < 10 * LOSS_AFTER_TRAINING
    # the checkpoint moves both ways, and then the two agree closely
    for source, target in ((ours, net()), (theirs, convert(net()))):
        target.load_state_dict(source.state_dict(), strict=True)
        assert relative(target.eval()(x), source.eval()(x)) < FLOAT32_BETWEEN


@NETS
def test_an_optimizer_goes_on(net: Any) -> None:
    model = net()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    before = [p.detach().clone() for p in norms(model)[0].parameters()]
    for swap in (convert, revert, convert):
        swap(model)
        optimizer.zero_grad()
        y = model(torch.randn(4, 3, 8, 8))
        y.backward(torch.randn(y.shape))
        optimizer.step()
        after = [p.detach().clone() for p in norms(model)[0].parameters()]
        assert all((a != b).all() for a, b in zip(after, before, strict=True))
        before = after


def test_shared_layers_stay_shared() -> None:
    shared = nn.BatchNorm2d(5)
    model = nn.ModuleDict({"a": nn.Sequential(shared), "b": shared, "c": nn.GroupNorm(5, 5)})
    model["c"].weight = shared.weight
    convert(model)
    assert model["a"][0] is model["b"] is shared
    assert type(shared) is truenorm.BatchNorm2d
    assert model["c"].weight is shared.weight
    assert type(revert(model)["b"]) is nn.BatchNorm2d


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_the_root_itself(case: Case) -> None:
    layer, x = case.build(nn), case.input()
    expected = copy.deepcopy(layer).eval()(x)
    assert convert(layer) is layer
    assert type(layer) is getattr(truenorm, case.layer)
    assert relative(layer.eval()(x).detach(), expected.detach()) < FLOAT32_BETWEEN
    assert type(revert(layer)) is getattr(nn, case.layer)
    assert torch.equal(layer(x), expected)


def test_flags_hooks_and_attributes() -> None:
    layer = nn.BatchNorm2d(5, momentum=0.3, dtype=torch.float64)
    layer.eval()
    layer.weight.requires_grad_(False)
    layer.note, seen = "mine", []
    layer.register_forward_hook(lambda *_: seen.append("hook"))
    layer.register_load_state_dict_post_hook(lambda *_: seen.append("load"))
    model = nn.Sequential(nn.Conv2d(3, 5, 1), layer)
    model[0].train()
    for swap in (convert, revert):
        swap(model)
        seen.clear()
        assert not layer.training
        assert model[0].training
        assert not layer.weight.requires_grad
        assert layer.bias.requires_grad
        assert layer.running_var.dtype == layer.weight.dtype == torch.float64
        assert (layer.momentum, layer.note) == (0.3, "mine")
        layer(torch.randn(2, 5, 3, 3, dtype=torch.float64))
        layer.load_state_dict(layer.state_dict())
        assert seen == ["hook", "load"]


def test_layers_on_meta_and_in_half() -> None:
    model = convert(nn.Sequential(nn.BatchNorm2d(5, device="meta"), nn.BatchNorm2d(5).half()))
    assert model[0].weight.is_meta
    # what was half before the conversion stays: convert changes no tensor
    assert model[1].running_mean.dtype == torch.float16
    assert model[1](torch.randn(2, 5, 3, 3).half()).dtype == torch.float16


def test_half_precision_and_back() -> None:
    model = convert(nn.Sequential(nn.BatchNorm1d(5), nn.BatchNorm1d(5, affine=False))).bfloat16()
    x = torch.randn(7, 5, dtype=torch.bfloat16)
    model(x)
    assert [layer.running_var.dtype for layer in model] == [torch.float32, torch.float32]
    expected = model[0].running_var.bfloat16()
    revert(model)
    assert torch.equal(model[0].running_var, expected)
    model(x)  # torch takes statistics of the parameters' dtype only


def test_subclasses_are_left_alone() -> None:
    class Mine(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1.0

    model = nn.Sequential(Mine(5), nn.BatchNorm2d(5))
    convert(model)
    assert type(model[0]) is Mine
    assert is_ours(model[1])

    class Ours(truenorm.BatchNorm2d):
        pass

    kept = nn.Sequential(Ours(5))
    assert type(revert(kept)[0]) is Ours


def test_lazy_layers() -> None:
    model = convert(nn.Sequential(nn.LazyBatchNorm2d(), nn.LazyInstanceNorm2d(affine=True)))
    assert type(model[0]) is truenorm.LazyBatchNorm2d
    model(torch.randn(2, 5, 3, 3))
    assert type(model[0]) is truenorm.BatchNorm2d
    assert type(model[1]) is truenorm.InstanceNorm2d
    assert type(revert(model)[1]) is nn.InstanceNorm2d


def test_parametrized_layers() -> None:
    class Double(Module):
        def forward(self, w: Tensor) -> Tensor:
            return 2.0 * w

    layer = randomize(nn.GroupNorm(2, 6))
    parametrize.register_parametrization(layer, "weight", Double())
    model = nn.Sequential(layer, parametrizations.weight_norm(nn.LayerNorm(7), dim=None))
    x = torch.randn(3, 6, 7)
    expected, original = model(x), layer.parametrizations.weight.original
    for swap, ours in ((convert, True), (revert, False), (convert, True)):
        swap(model)
        assert isinstance(layer, truenorm.GroupNorm) == ours
        assert isinstance(model[1], truenorm.LayerNorm) == ours
        assert layer.parametrizations.weight.original is original
        assert relative(model(x).detach(), expected.detach()) < FLOAT32_BETWEEN
    parametrize.remove_parametrizations(layer, "weight")
    assert type(layer) is truenorm.GroupNorm
    assert relative(model(x).detach(), expected.detach()) < FLOAT32_BETWEEN


def test_only_some() -> None:
    model = convert(ResNet(), only=(nn.LayerNorm, nn.BatchNorm1d))
    found = {type(m).__name__ for m in norms(model) if is_ours(m)}
    assert found == {"LayerNorm", "BatchNorm1d"}


def test_deepcopy_of_a_converted_model() -> None:
    model = convert(ResNet()).eval()
    other, x = copy.deepcopy(model), torch.randn(2, 3, 8, 8)
    assert all(is_ours(m) for m in norms(other))
    assert torch.equal(other(x), model(x))


@pytest.mark.parametrize("swap", [convert, revert])
@pytest.mark.parametrize("bad", [{"a": 1}, None, torch.zeros(2), nn.BatchNorm2d])
def test_not_a_model(swap: Any, bad: Any) -> None:
    with pytest.raises(TypeError, match=r"`model` must be a torch.nn.Module, but got .*: pass the"):
        swap(bad)


def test_only_names_no_norm_layer() -> None:
    model = ResNet()
    with pytest.raises(ValueError, match=r"`only` names 'Linear', .*: choose from BatchNorm1d"):
        convert(model, only=(nn.LayerNorm, nn.Linear))
    assert not any(is_ours(m) for m in norms(model))


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_forward_that_somebody_put_into_torchs_class(
    wrapped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Named(nn.LayerNorm):
        pass

    own = nn.LayerNorm.forward

    def doubled(self: nn.LayerNorm, input: Tensor) -> Tensor:
        return 2 * own(self, input)

    theirs = nn.Sequential(nn.LayerNorm(6), nn.RMSNorm(6), Named(6))
    x = torch.randn(3, 6)
    with monkeypatch.context() as patch:
        patch.setattr(
            nn.LayerNorm, "forward", functools.wraps(own)(doubled) if wrapped else doubled
        )
        with pytest.warns(UserWarning, match=r"left 2 layer.*given the forward of test_convert"):
            ours = convert(copy.deepcopy(theirs))
        torch.testing.assert_close(ours(x), theirs(x))
    assert [isinstance(each, truenorm.RMSNorm) for each in ours] == [False, True, False]
    assert isinstance(convert(ours)[0], truenorm.LayerNorm)
