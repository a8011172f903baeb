"""Options of a layer, and attributes of a user's own that have an option's name."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from cases import randomize
from torch import Tensor, nn
from torch.nn import Module

import truenorm
from truenorm.nn._options import DEFAULTS, Chosen, Configurable

LAYERS = [getattr(truenorm, name) for name in truenorm.nn.__all__]
NAMES = sorted({name for layer in LAYERS for name in layer._options})
# as a value that would be in order as an option; as a number; as what a module holds
OWN: dict[str, Any] = {
    "activation": "relu",
    "leaky_relu_slope": 0.3,
    "elu_alpha": 0.3,
    "gelu_approximate": "tanh",
    "overwrite_input": True,
    "channel_axis": -1,
    "process_group": "world",
    "statistics_frozen": True,
    "on_single": "running",
    "skip_nonfinite": True,
    "virtual_batch_size": 2,
    "renorm": True,
    "rmax": 1.5,
    "dmax": 0.5,
}


def test_every_option_is_listed() -> None:
    assert set(NAMES) == set(Chosen._fields) == set(OWN)
    for layer in LAYERS:
        for name, option in layer._options.items():
            assert getattr(DEFAULTS, name) == option.default == getattr(layer, name)


def holding(name: str, how: str) -> Module:
    """A torch layer with an attribute of its user's."""
    layer = randomize(nn.BatchNorm2d(5))
    value = OWN[name]
    match how:
        case "marker":
            setattr(layer, name, value)
        case "number":
            setattr(layer, name, 3)
        case "parameter":
            setattr(layer, name, nn.Parameter(torch.ones(3)))
        case "buffer":
            layer.register_buffer(name, torch.ones(3))
        case "submodule":
            setattr(layer, name, nn.PReLU())
        case "tensor":
            setattr(layer, name, torch.ones(3))
    return layer


HOW = ["marker", "number", "parameter", "buffer", "submodule", "tensor"]


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", NAMES)
def test_a_users_attribute_means_nothing(name: str, how: str) -> None:
    theirs = holding(name, how)
    held, state = getattr(theirs, name), list(theirs.state_dict())
    layer: Any = truenorm.convert(copy.deepcopy(theirs))
    x = torch.randn(4, 5, 3, 5)
    y = layer(x)
    torch.testing.assert_close(y, theirs(x))
    assert not layer._chosen()
    assert "_truenorm_options" not in vars(layer)
    same = getattr(layer, name)
    assert torch.equal(same, held) if isinstance(held, Tensor) else type(same) is type(held)
    assert list(layer.state_dict()) == state
    # set again, it is still the user's
    setattr(layer, name, held)
    assert not layer._chosen()
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert not other._chosen()
        assert type(getattr(other, name)) is type(held)
        torch.testing.assert_close(other.eval()(x), layer.eval()(x))
    delattr(layer, name)
    assert getattr(layer, name) == getattr(DEFAULTS, name)
    layer.freeze = truenorm.freeze(truenorm.convert(theirs))  # whatever else is called so
    assert type(getattr(truenorm.revert(truenorm.unfreeze(theirs)), name)) is type(held)


@pytest.mark.parametrize("name", NAMES)
def test_a_users_attribute_does_not_hinder_the_option_of_a_function(name: str) -> None:
    layer: Any = truenorm.convert(holding(name, "number"))
    truenorm.freeze(layer)
    assert layer._truenorm_options.statistics_frozen
    truenorm.convert(nn.Sequential(truenorm.unfreeze(layer)), sync=True)
    assert layer._truenorm_options.process_group == "world"
    assert getattr(layer, name) == 3


@pytest.mark.parametrize("how", ["parameter", "buffer", "submodule", "tensor"])
@pytest.mark.parametrize("name", NAMES)
def test_what_is_registered_afterwards_is_the_users(name: str, how: str) -> None:
    layer: Any = truenorm.BatchNorm2d(5)
    theirs = nn.BatchNorm2d(5)
    for each in (layer, theirs):
        match how:
            case "parameter":
                each.register_parameter(name, nn.Parameter(torch.ones(3)))
            case "buffer":
                each.register_buffer(name, torch.ones(3))
            case "submodule":
                each.add_module(name, nn.PReLU())
            case "tensor":
                setattr(each, name, torch.ones(3))
    assert list(layer.state_dict()) == list(theirs.state_dict())
    assert not layer._chosen()
    assert isinstance(getattr(layer, name), (Tensor, Module))
    if how == "buffer":
        with pytest.raises(TypeError, match="cannot assign 'int' object to buffer"):
            truenorm.BatchNorm2d(5).register_buffer(name, 3)
        fresh = truenorm.BatchNorm2d(5)
        with pytest.raises(TypeError, match="cannot assign"):
            fresh.register_buffer(name, 3)
        assert name not in fresh._buffers


@pytest.mark.parametrize("name", ["inplace", "alpha", "negative_slope", "approximate", "frozen"])
def test_loops_over_modules_do_not_find_what_is_not_there(name: str) -> None:
    model = truenorm.convert(nn.Sequential(nn.Conv2d(3, 5, 1), nn.BatchNorm2d(5), nn.ReLU()))
    assert not hasattr(model[1], name)
    value = {"inplace": True, "frozen": True, "approximate": "tanh"}.get(name, 0.7)
    for module in model.modules():
        setattr(module, name, value)
    assert not model[1]._chosen()


def test_inplace_on_every_module_leaves_a_preactivation_network_alone() -> None:
    body = nn.Sequential(nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 5, 1))
    model: Any = truenorm.convert(body).eval()
    x = torch.randn(2, 5, 3, 5)
    kept = x.clone()
    for module in model.modules():
        if hasattr(module, "inplace"):
            module.inplace = True
    with torch.no_grad():
        model(x)
    assert torch.equal(x, kept)


OPTIONS: list[tuple[Any, dict[str, Any]]] = [
    (truenorm.BatchNorm1d, {"activation": "leaky_relu", "leaky_relu_slope": 0.3}),
    (truenorm.BatchNorm1d, {"statistics_frozen": True}),
    (truenorm.BatchNorm1d, {"renorm": True, "rmax": 1.5, "dmax": 0.2}),
    (truenorm.LayerNorm, {"activation": "elu", "elu_alpha": 0.3}),
    (truenorm.LayerNorm, {"activation": "gelu", "gelu_approximate": "tanh"}),
    (truenorm.InstanceNorm1d, {"channel_axis": -1}),
    (truenorm.GroupNorm, {"process_group": "world"}),
]


def built(kind: Any, options: dict[str, Any]) -> Any:
    args = {truenorm.GroupNorm: (1, 5)}.get(kind, (5,))
    return randomize(kind(*args, **options))


@pytest.mark.parametrize(("kind", "options"), OPTIONS)
def test_set_read_delete_copy(kind: Any, options: dict[str, Any]) -> None:
    layer, plain = built(kind, options), built(kind, {})
    assert layer._chosen() == options
    assert vars(layer).keys() - vars(plain).keys() <= {"_truenorm_options", "_direct"}
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), copy.copy(layer)):
        assert other._chosen() == options
        assert repr(other) == repr(layer)
        assert vars(other).keys() == vars(layer).keys()
    for name, value in options.items():
        assert getattr(layer, name) == value
        delattr(layer, name)
        assert getattr(layer, name) == getattr(plain, name)
        with pytest.raises(AttributeError, match=name):
            delattr(layer, name)
    assert vars(layer).keys() == vars(plain).keys()
    for name, value in options.items():
        setattr(plain, name, value)
    assert plain._chosen() == options


@pytest.mark.parametrize(("kind", "options"), OPTIONS)
def test_compiled_is_eager_and_an_option_recompiles(kind: Any, options: dict[str, Any]) -> None:
    torch.compiler.reset()
    layer = built(kind, {})
    if options.get("channel_axis"):
        x = torch.randn(4, 5, 5)
    else:
        x = torch.randn(4, 5) if kind is not truenorm.InstanceNorm1d else torch.randn(4, 5, 3)
    call = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for chosen in ({}, options, {}):
        for name in options:
            setattr(layer, name, chosen.get(name, getattr(DEFAULTS, name)))
        twin = copy.deepcopy(layer)
        torch.testing.assert_close(call(x), twin(x))
        # a batch moves the statistics of both alike
        for one, other in zip(layer.buffers(), twin.buffers(), strict=True):
            torch.testing.assert_close(one, other)


def test_an_option_can_be_read_in_a_graph() -> None:
    class Reads(Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = truenorm.LayerNorm(5, activation="relu")

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(x)
            return -y if self.norm.activation == "relu" else y

    torch.compiler.reset()
    model, x = Reads(), torch.randn(4, 5)
    call = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(call(x), model(x))


# --- what 0.1 has written: each option as an attribute of its own


def pickled_by_0_1(kind: Any, held: dict[str, Any]) -> bytes:
    args = {truenorm.GroupNorm: (1, 5)}.get(kind, (5,))
    layer = kind(*args)
    state = {**vars(layer), **held}
    original = Configurable.__getstate__
    try:
        Configurable.__getstate__ = lambda self: state  # type: ignore[method-assign]
        return pickle.dumps(layer)
    finally:
        Configurable.__getstate__ = original  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("kind", "held", "options"),
    [
        (truenorm.BatchNorm1d, {"frozen": True}, {"statistics_frozen": True}),
        (truenorm.BatchNorm1d, {}, {}),
        (
            truenorm.LayerNorm,
            {"activation": "elu", "alpha": 0.3, "inplace": True, "_direct": False},
            {"activation": "elu", "elu_alpha": 0.3, "overwrite_input": True},
        ),
        (
            truenorm.BatchNorm1d,
            {"activation": "gelu", "approximate": "tanh", "renorm": True, "_direct": False},
            {"activation": "gelu", "gelu_approximate": "tanh", "renorm": True},
        ),
        (truenorm.GroupNorm, {"negative_slope": 0.3}, {"leaky_relu_slope": 0.3}),
        # torch's own, and what cannot have been an option
        (truenorm.LocalResponseNorm, {"alpha": 0.5, "channel_axis": -1}, {"channel_axis": -1}),
        (truenorm.SyncBatchNorm, {"process_group": None}, {}),
        (truenorm.LayerNorm, {"activation": torch.ones(3), "alpha": "mine"}, {}),
    ],
)
def test_layers_pickled_by_0_1(kind: Any, held: dict[str, Any], options: dict[str, Any]) -> None:
    layer = pickle.loads(pickled_by_0_1(kind, held))
    assert layer._chosen() == options
    fresh = built(kind, options)
    assert vars(layer).keys() - held.keys() <= vars(fresh).keys()
    if kind is truenorm.LocalResponseNorm:
        assert layer.alpha == 0.5
    if "alpha" in held and not options:
        assert layer.alpha == "mine"
        assert torch.equal(layer.activation, torch.ones(3))


def test_a_state_written_by_0_1_freezes() -> None:
    state = nn.BatchNorm2d(5).state_dict()
    state._metadata[""]["truenorm"] = {"frozen": True}
    layer = truenorm.BatchNorm2d(5)
    layer.load_state_dict(state)
    assert layer.statistics_frozen


def test_a_process_group_is_shared_by_copies() -> None:
    class Group:
        def __deepcopy__(self, memo: Any) -> Any:
            raise TypeError("cannot pickle 'ProcessGroup' object")

    group: Any = Group()
    layer = truenorm.BatchNorm2d(5)
    layer._take_options(DEFAULTS._replace(process_group=group))
    assert copy.deepcopy(layer).process_group is group
