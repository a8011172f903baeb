"""convert and revert with `sync`: batch statistics over all processes, and each one's own again."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from cases import randomize
from test_convert import ResNet
from torch import nn
from torch.nn import Module
from torch.nn.utils import parametrize

import truenorm
from truenorm import convert, revert


def norms(model: Module) -> list[Module]:
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]


def kinds(model: Module) -> list[type[Module]]:
    return [type(m) for m in norms(model)]


def groups(model: Module) -> list[Any]:
    return [getattr(m, "process_group", None) for m in norms(model)]


class Mixed(Module):
    """One SyncBatchNorm before any other layer, one after a Linear, one after each convolution."""

    def __init__(self, library: Any = nn) -> None:
        super().__init__()
        self.first = library.SyncBatchNorm(3)
        self.stem = nn.Sequential(nn.Conv3d(3, 4, 1), library.SyncBatchNorm(4))
        self.flat = nn.Sequential(nn.ConvTranspose2d(4, 5, 1), nn.ReLU(), library.SyncBatchNorm(5))
        self.head = nn.Sequential(nn.Linear(5, 6), library.SyncBatchNorm(6))


def test_on_and_off_and_back() -> None:
    model = randomize(ResNet())
    before, state = kinds(model), copy.deepcopy(model.state_dict())
    tensors = [*model.parameters(), *model.buffers()]
    assert convert(model, sync=True) is model
    assert [k.__name__ for k in kinds(model)] == [k.__name__ for k in before]
    assert groups(model) == ["world"] * len(before)
    convert(model)
    assert groups(model) == ["world"] * len(before)  # None leaves them
    assert [type(m).__name__ for m in norms(pickle.loads(pickle.dumps(model)))] == [
        k.__name__ for k in before
    ]
    revert(model)
    assert kinds(model) == before
    assert groups(model) == [None] * len(before)
    assert all(vars(m).keys() == vars(type(m)(3)).keys() for m in norms(model))
    convert(model, sync=False)
    assert nn.SyncBatchNorm not in map(type, norms(model))
    assert all(
        a is b for a, b in zip([*model.parameters(), *model.buffers()], tensors, strict=True)
    )
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("library", [nn, truenorm], ids=["torch", "truenorm"])
def test_sync_batch_norm_becomes_the_batch_norm_of_its_neighbour(library: Any) -> None:
    names = ["BatchNorm3d", "BatchNorm3d", "BatchNorm2d", "BatchNorm1d"]
    assert kinds(convert(Mixed(library), sync=False)) == [getattr(truenorm, n) for n in names]
    model = revert(Mixed(library), sync=False)
    assert kinds(model) == [getattr(nn, n) for n in names]
    assert all(vars(m).keys() == vars(type(m)(3)).keys() for m in norms(model))
    assert kinds(convert(Mixed(library), sync=False, dims=2)) == [truenorm.BatchNorm2d] * 4


def test_torchs_sync_batch_norm_from_truenorms_batch_norm() -> None:
    model = revert(convert(ResNet(), sync=True), sync=True)
    assert set(kinds(model)) == {nn.SyncBatchNorm}
    assert groups(model) == [None] * len(norms(model))
    assert kinds(convert(model)) == [truenorm.SyncBatchNorm] * len(norms(model))


def test_only_some_are_synchronized() -> None:
    model = convert(ResNet(), only=(nn.BatchNorm1d, nn.LayerNorm), sync=True)
    synchronized = [type(m) for m in norms(model) if getattr(m, "process_group", None) == "world"]
    assert synchronized == [truenorm.BatchNorm1d]


def test_subclasses_and_parametrized_layers() -> None:
    class Mine(nn.SyncBatchNorm):
        pass

    class Double(Module):
        def forward(self, w: torch.Tensor) -> torch.Tensor:
            return 2.0 * w

    layer = nn.SyncBatchNorm(4)
    parametrize.register_parametrization(layer, "weight", Double())
    model = nn.Sequential(nn.Conv2d(3, 4, 1), Mine(4), layer)
    with pytest.warns(
        UserWarning, match=r"convert left 1 layer.*'1' \(Mine\).*no BatchNorm stands"
    ):
        convert(model, sync=False)
    assert type(model[1]) is Mine
    assert isinstance(layer, truenorm.BatchNorm2d)
    x = torch.randn(2, 4, 3, 3)
    assert layer(x).shape == x.shape
    assert isinstance(revert(layer), nn.BatchNorm2d)


def test_lazy_layers() -> None:
    model = convert(nn.Sequential(nn.LazyBatchNorm2d()), sync=True)
    model(torch.randn(2, 5, 3, 3))
    assert type(model[0]) is truenorm.BatchNorm2d
    assert model[0].process_group == "world"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda m: convert(m, process_group="world"),
            r"`process_group` \(='world'\) goes with sync",
        ),
        (
            lambda m: convert(m, sync=False, process_group="world"),
            r"`process_group` .* goes with sync=True only: add it",
        ),
        (lambda m: convert(m, sync=True, dims=2), r"`dims` \(=2\) goes with sync=False only"),
        (lambda m: revert(m, dims=2), r"`dims` \(=2\) goes with sync=False only"),
        (lambda m: convert(m, sync=False, dims=4), r"`dims` \(=4\) of 'the model' must be 1, 2 or"),
        (lambda m: convert(m, sync=False), r"`dims` \(=None\) of '0' must be 1, 2 or 3.*dims=2"),
        (lambda m: revert(m, sync=False), r"`dims` \(=None\) of '0' must be 1, 2 or 3.*dims=2"),
    ],
)
def test_arguments_that_do_not_fit(call: Any, message: str) -> None:
    model = nn.Sequential(nn.SyncBatchNorm(3), nn.LayerNorm(3))
    with pytest.raises(ValueError, match=message):
        call(model)
    assert [type(m) for m in model] == [nn.SyncBatchNorm, nn.LayerNorm]


def test_no_group() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3))
    with pytest.raises(
        TypeError, match=r"`process_group` must be a torch.distributed.ProcessG.*int"
    ):
        convert(model, sync=True, process_group=3)
    assert type(model[0]) is nn.BatchNorm2d
    with pytest.raises(TypeError, match=r"`process_group` must be .* but got str: make one with"):
        truenorm.GroupNorm(2, 4, process_group="all")


@pytest.mark.parametrize("name", ["BatchNorm2d", "InstanceNorm2d", "GroupNorm"])
def test_a_group_of_one_process_is_no_group(name: str) -> None:
    args = (2, 6) if name == "GroupNorm" else (6,)
    alone, spanning = (
        getattr(truenorm, name)(*args, process_group=group) for group in (None, "world")
    )
    x = torch.randn(3, 6, 5, 5)
    assert torch.equal(alone(x), spanning(x))
    assert spanning.process_group == "world"
    assert "process_group" not in vars(alone)
