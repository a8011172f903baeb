"""convert and revert of users' classes, sharded layers, and forwards that an instance holds."""

from __future__ import annotations

import copy
import functools
import pickle
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import randomize
from processes import processes
from tolerances import FLOAT32_BETWEEN, relative
from torch import Tensor, nn
from torch.nn import Module
from torch.nn.utils import parametrize

import truenorm
from truenorm import convert, revert
from truenorm._models import swap
from truenorm._models.converting import left_alone


class Named(nn.RMSNorm):
    """As torchtitan has it."""


class OneGroup(nn.GroupNorm):
    """As PoolFormer has it: an __init__, an attribute and methods of its own."""

    def __init__(self, channels: int, note: str = "pool") -> None:
        super().__init__(1, channels)
        self.note = note

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.was_reset = True

    def extra_repr(self) -> str:
        return f"note={self.note}, {super().extra_repr()}"

    def halved(self) -> Tensor:
        return self.weight / 2


class Mixin:
    def describe(self) -> str:
        return f"{type(self).__name__} of {self.num_features}"  # type: ignore[attr-defined]


class Mixed(Mixin, nn.BatchNorm2d):
    pass


class Shifted(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1.0


class AnyRank(nn.BatchNorm2d):
    def _check_input_dim(self, input: Tensor) -> None:
        pass


class Scaled(nn.LayerNorm):
    @property
    def weight(self) -> Tensor:
        return torch.full((7,), 2.0)

    @weight.setter
    def weight(self, value: Any) -> None:
        pass

    def register_parameter(self, name: str, param: Any) -> None:
        if name != "weight":
            super().register_parameter(name, param)


class Active(nn.LayerNorm):
    activation = "none of truenorm's business"


INHERITING: dict[type[Module], Callable[[], Any]] = {
    Named: lambda: Named(7),
    OneGroup: lambda: OneGroup(6),
    Mixed: lambda: Mixed(5),
}


def own(kind: type[Module]) -> tuple[Any, Tensor]:
    shape = {Named: (3, 7), OneGroup: (3, 6, 4), Mixed: (3, 5, 4, 2)}[kind]  # type: ignore[index]
    return randomize(INHERITING[kind]()), torch.randn(shape)


@pytest.mark.parametrize("kind", INHERITING)
def test_a_class_that_only_inherits_is_swapped(kind: type[Module]) -> None:
    layer, x = own(kind)
    theirs = copy.deepcopy(layer)
    held, expected = vars(layer).copy(), theirs(x)
    assert convert(layer) is layer
    ours = {Named: truenorm.RMSNorm, OneGroup: truenorm.GroupNorm, Mixed: truenorm.BatchNorm2d}[
        kind
    ]
    assert isinstance(layer, kind)
    assert isinstance(layer, ours)
    assert (type(layer).__name__, type(layer).__qualname__) == (kind.__name__, kind.__qualname__)
    assert repr(layer) == repr(theirs)
    assert vars(layer) == held
    assert type(layer).forward is ours.forward  # type: ignore[attr-defined]
    assert relative(layer(x).detach(), expected.detach()) < FLOAT32_BETWEEN
    assert type(convert(INHERITING[kind]())) is type(layer)
    for other in (pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer), copy.copy(layer)):
        assert type(other) is type(layer)
        assert torch.equal(other.eval()(x), layer.eval()(x))
        assert type(revert(other)) is kind
    assert type(revert(layer)) is kind
    assert vars(layer).keys() == vars(theirs).keys()


def test_what_a_class_has_of_its_own_stays() -> None:
    layer, _ = own(OneGroup)
    convert(layer)
    assert layer.note == "pool"
    assert "note=pool" in repr(layer)
    assert torch.equal(layer.halved(), layer.weight / 2)
    layer.was_reset = False
    layer.reset_parameters()
    assert layer.was_reset
    assert type(layer)(4, note="new").num_groups == 1
    mixed, _ = own(Mixed)
    assert convert(mixed).describe() == "Mixed of 5"
    mixed.activation = "relu"
    assert (mixed(torch.randn(3, 5, 4, 2)) >= 0).all()
    loaded = pickle.loads(pickle.dumps(mixed))
    assert loaded.activation == "relu"


def test_the_short_way_serves_it(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = own(Mixed)
    convert(layer)
    calls = []
    real = truenorm._core.eager.call
    monkeypatch.setattr(
        truenorm._core.eager, "call", lambda *args: calls.append(args) or real(*args)
    )
    layer(x)
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: Shifted(5), "forward"),
        (lambda: AnyRank(5), "_check_input_dim"),
        (lambda: Scaled(7, elementwise_affine=False), "weight"),
        (lambda: Active(7), "activation"),
    ],
)
def test_a_class_with_a_say_in_the_result_is_left(make: Callable[[], Any], name: str) -> None:
    layer = make()
    kind = type(layer)
    convert(layer)
    assert type(layer) is kind
    assert [e[2] for e in left_alone(layer)] == [f"its class has {name!r} of its own"]


def test_only_and_a_local_class() -> None:
    class Local(nn.LayerNorm):
        pass

    model = convert(nn.Sequential(Local(5), Named(5)), only=(nn.RMSNorm,))
    assert type(model[0]) is Local
    assert isinstance(model[1], truenorm.RMSNorm)
    assert isinstance(convert(model)[0], truenorm.LayerNorm)
    assert type(revert(model)[0]) is Local


def test_a_class_nothing_can_be_derived_from_is_said() -> None:
    class Final(type):
        def __new__(cls, name: str, bases: Any, members: Any) -> Any:
            if any(isinstance(base, Final) for base in bases):
                raise TypeError("no subclasses, please")
            return super().__new__(cls, name, bases, members)

    class Strict(nn.LayerNorm, metaclass=Final):
        pass

    model = nn.Sequential(Strict(5), nn.LayerNorm(5))
    with pytest.warns(UserWarning, match=r"left 1 layer.*'0' \(Strict\).*no subclasses"):
        convert(model)
    assert type(model[0]) is Strict
    assert type(model[1]) is truenorm.LayerNorm


@pytest.mark.parametrize("how", ["plain", "buffer", "submodule"])
def test_an_attribute_that_truenorms_class_needs_is_said(how: str) -> None:
    layer = nn.BatchNorm2d(5)
    if how == "plain":
        layer._act = "mine"  # type: ignore[assignment]
    elif how == "buffer":
        layer.register_buffer("_act", torch.ones(3))
    else:
        layer._act = nn.PReLU()
    held = layer._act
    with pytest.warns(UserWarning, match=r"left 1 layer.*an attribute '_act' of its"):
        convert(layer)
    assert type(layer) is nn.BatchNorm2d
    assert layer._act is held
    del layer._act
    assert type(convert(layer)) is truenorm.BatchNorm2d


def test_a_lazy_layer_of_a_users_class() -> None:
    class MyLazy(nn.LazyBatchNorm1d):
        pass

    layer = convert(MyLazy())
    assert isinstance(layer, MyLazy)
    layer(torch.randn(4, 5))
    assert type(layer) is truenorm.BatchNorm1d  # type: ignore[comparison-overlap]


class Double(Module):
    def forward(self, w: Tensor) -> Tensor:
        return 2.0 * w


def test_copies_of_a_parametrized_layer_are_apart() -> None:
    layer = nn.LayerNorm(5)
    parametrize.register_parametrization(layer, "weight", Double())
    other = copy.deepcopy(layer)
    kind = type(layer)
    convert(layer)
    assert isinstance(layer, truenorm.LayerNorm)
    assert not isinstance(other, truenorm.LayerNorm)
    assert type(revert(layer)) is kind


def test_a_parametrized_layer_of_a_users_class() -> None:
    layer, x = own(Mixed)
    parametrize.register_parametrization(layer, "weight", Double())
    expected = layer.eval()(x)
    convert(layer)
    assert isinstance(layer, truenorm.BatchNorm2d)
    assert isinstance(layer, Mixed)
    assert relative(layer(x).detach(), expected.detach()) < FLOAT32_BETWEEN
    parametrize.remove_parametrizations(layer, "weight")
    assert isinstance(layer, truenorm.BatchNorm2d)
    assert type(revert(layer)) is Mixed


# --- forwards that an instance holds


def hooked(module: Any) -> Any:
    """What accelerate's add_hook_to_module does to a module."""
    module._old_forward = module.forward
    module.seen = 0

    def new_forward(module: Any, *args: Any, **kwargs: Any) -> Any:
        module.seen += 1
        return module._old_forward(*args, **kwargs)

    module.forward = functools.update_wrapper(
        functools.partial(new_forward, module), module._old_forward
    )
    return module


def unhooked(module: Any) -> Any:
    module.forward = module._old_forward
    del module._old_forward
    return module


def test_accelerates_hooks() -> None:
    layer = hooked(randomize(nn.BatchNorm2d(5)))
    x = torch.randn(3, 5, 4, 2)
    expected = copy.deepcopy(unhooked(copy.deepcopy(layer)))(x)
    for swapped, kind in ((convert, truenorm.BatchNorm2d), (revert, nn.BatchNorm2d)) * 2:
        swapped(layer)
        assert type(layer) is kind
        assert layer._old_forward.__func__ is kind.forward
        assert layer.forward.__wrapped__ == layer._old_forward
        before = layer.seen
        assert relative(layer(x).detach(), expected.detach()) < FLOAT32_BETWEEN
        assert layer.seen == before + 1
    convert(layer)
    unhooked(layer)
    assert layer.forward.__func__ is truenorm.BatchNorm2d.forward
    assert type(revert(layer)) is nn.BatchNorm2d
    assert layer.forward.__func__ is nn.BatchNorm2d.forward
    layer(x)


def test_convert_then_hook_then_revert() -> None:
    layer = hooked(convert(nn.BatchNorm2d(5)))
    revert(layer)
    x = torch.randn(3, 5, 4, 2)
    torch.testing.assert_close(layer(x), nn.BatchNorm2d(5)(x))


def _liger(self: Any, x: Tensor) -> Tensor:
    return x * 0.0


def _closed(layer: Any) -> Any:
    original = layer.forward
    layer._old_forward = original

    @functools.wraps(original)
    def forward(x: Tensor) -> Any:
        return original(x)

    return forward


@pytest.mark.parametrize("how", ["liger", "function", "closure", "another's"])
def test_another_forward_is_left_and_said(how: str) -> None:
    layer: Any = nn.RMSNorm(5)
    layer.forward = {
        "liger": lambda: types.MethodType(_liger, layer),
        "function": lambda: functools.partial(_liger, layer),
        "closure": lambda: _closed(layer),
        "another's": lambda: nn.RMSNorm(5).forward,
    }[how]()
    model = nn.Sequential(layer, nn.RMSNorm(5))
    forward, x = layer.forward, torch.randn(3, 5)
    expected = layer(x)
    with pytest.warns(UserWarning, match=r"convert left 1 layer\(s\) as they are: '0' \(RMSNorm\)"):
        convert(model)
    assert type(layer) is nn.RMSNorm
    assert layer.forward is forward
    assert torch.equal(layer(x), expected)
    assert type(model[1]) is truenorm.RMSNorm
    del layer.forward
    assert type(convert(model)[0]) is truenorm.RMSNorm


def test_revert_leaves_another_forward_and_says_so() -> None:
    layer: Any = truenorm.RMSNorm(5)
    layer.forward = types.MethodType(_liger, layer)
    with pytest.warns(UserWarning, match=r"revert left 1 layer.*'the model itself' \(RMSNorm\)"):
        revert(layer)
    assert type(layer) is truenorm.RMSNorm
    with (
        pytest.raises(
            ValueError, match=r"1 layer\(s\) that cannot be torch's, the first 'the model itself'"
        ),
        truenorm.reverted(layer),
    ):
        pass


def test_a_compiled_layer_runs_what_it_has_become() -> None:
    torch.compiler.reset()
    model = nn.Sequential(randomize(nn.LayerNorm(7)), nn.Identity())
    model.compile(backend="eager")
    x = torch.randn(3, 7) * 1e-3 + 1e4
    theirs = model(x)
    convert(model)
    expected = truenorm.functional.layer_norm(x, (7,), model[0].weight, model[0].bias)
    assert torch.equal(model(x), expected)
    assert not torch.equal(theirs, expected)
    revert(model)
    assert torch.equal(model(x), theirs)


# --- layers that were themselves sharded


def test_sharded_layers() -> None:
    assert processes(2).run(_sharded) == [None, None]


def _sharded(rank: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    mesh = init_device_mesh("cpu", (2,))
    model: Any = nn.Sequential(nn.BatchNorm2d(6), Mixed(6), nn.LayerNorm((6, 4, 2)))
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    before = [type(layer) for layer in model]
    torch.manual_seed(rank)
    x = torch.randn(3, 6, 4, 2)
    expected = model(x)
    convert(model)
    kinds = [truenorm.BatchNorm2d, truenorm.BatchNorm2d, truenorm.LayerNorm]
    for layer, kind in zip(model, kinds, strict=True):
        assert isinstance(layer, FSDPModule)
        assert isinstance(layer, kind)
        assert type(layer).__name__.startswith("FSDP")
    assert isinstance(model[1], Mixed)
    y = model(x)
    torch.testing.assert_close(y, expected)
    y.backward(torch.randn(y.shape))
    assert all(p.grad is not None for p in model.parameters())
    convert(model, sync=True)
    assert model[0].process_group == "world"
    assert relative(model(x).detach(), y.detach()) > 1e-3
    convert(model, sync=False)
    with truenorm.reverted(model):
        assert [type(layer) for layer in model] == before
    assert isinstance(model[0], truenorm.BatchNorm2d)
    revert(model)
    assert [type(layer) for layer in model] == before
    torch.testing.assert_close(model(x), expected)
    fresh: Any = convert(nn.Sequential(nn.BatchNorm2d(6)))
    fully_shard(fresh[0], mesh=mesh)
    revert(fresh)
    assert isinstance(fresh[0], FSDPModule)
    assert not isinstance(fresh[0], truenorm.BatchNorm2d)
    fresh(x)


def test_core() -> None:
    layer = nn.LayerNorm(5)
    assert swap.core(layer) is nn.LayerNorm
    parametrize.register_parametrization(layer, "weight", Double())
    assert swap.core(layer) is nn.LayerNorm
    assert swap.core(Named(5)) is Named
