"""`with reverted(model)`: torch's layers for any tool, and truenorm's again after it."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from cases import randomize
from torch import nn
from torch.nn import Module
from torch.nn.utils import parametrize

import truenorm
from truenorm import reverted


class Mine(nn.LayerNorm):
    pass


class Double(Module):
    def forward(self, w: torch.Tensor) -> torch.Tensor:
        return 2.0 * w


def network() -> Any:
    """Options, half precision, a group, a user's class, a parametrized layer, a shared one."""
    shared = nn.BatchNorm2d(5)
    model = nn.Sequential(
        nn.Conv2d(3, 5, 1), shared, nn.ReLU(), nn.Conv2d(5, 5, 1), shared,
        nn.SyncBatchNorm(5), nn.GroupNorm(1, 5), nn.InstanceNorm2d(5, track_running_stats=True),
        Mine((4, 4)), nn.BatchNorm2d(5),
    )  # fmt: skip
    parametrize.register_parametrization(model[6], "weight", Double())
    truenorm.convert(randomize(model))
    shared.renorm = True  # type: ignore[assignment]
    model[9].process_group = "world"
    return model


def held(model: Module) -> list[Any]:
    """Classes and all that the modules hold, tensors by their values."""
    found: list[Any] = []
    for module in model.modules():
        found.append(type(module))
        for name, value in sorted(vars(module).items()):
            found.append(name)
            for key, entry in value.items() if isinstance(value, dict) else [(None, value)]:
                found.append((key, entry.clone() if isinstance(entry, torch.Tensor) else entry))
    return found


def assert_as_before(model: Module, before: list[Any]) -> None:
    for now, then in zip(held(model), before, strict=True):
        if isinstance(then, tuple) and isinstance(then[1], torch.Tensor):
            assert now[1].dtype == then[1].dtype
            assert torch.equal(now[1], then[1]), now[0]
        else:
            assert now == then


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fails", [False, True])
def test_everything_is_as_it_was(fails: bool, dtype: torch.dtype) -> None:
    model = network().to(dtype).eval()
    before, buffers = held(model), dict(model.named_buffers())
    x = torch.randn(2, 3, 4, 4, dtype=dtype)
    expected = model(x)

    class Failure(Exception):
        pass

    def block() -> None:
        with reverted(model) as same:
            assert same is model
            assert not any(
                isinstance(m, truenorm.nn._options.Configurable) for m in model.modules()
            )
            kinds = [nn.BatchNorm2d, nn.SyncBatchNorm, Mine, nn.BatchNorm2d]
            assert [type(model[i]) for i in (1, 5, 8, 9)] == kinds
            assert isinstance(model[6], nn.GroupNorm)
            assert model[1].running_mean.dtype == dtype
            assert vars(model[1]).keys() == vars(nn.BatchNorm2d(5)).keys()
            if fails:
                raise Failure("within the block")

    if fails:
        with pytest.raises(Failure, match="within the block"):
            block()
    else:
        block()
    assert_as_before(model, before)
    assert all(b is buffers[name] for name, b in model.named_buffers())
    assert torch.equal(model(x), expected)


def test_a_tool_that_knows_torchs_layers_alone() -> None:
    body = nn.Sequential(nn.Conv2d(3, 5, 1), nn.BatchNorm2d(5), nn.ReLU())
    model: Any = truenorm.convert(randomize(body)).eval()
    before = held(model)
    x = torch.randn(2, 3, 4, 4)
    expected = model(x)
    fuse = functools.partial(torch.ao.quantization.fuse_modules, modules_to_fuse=["0", "1", "2"])
    with reverted(model):
        fused = fuse(model)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in fused.modules())
    torch.testing.assert_close(fused(x), expected)
    assert_as_before(model, before)


def test_statistics_that_moved_have_moved() -> None:
    model = truenorm.convert(nn.Sequential(nn.BatchNorm1d(5), nn.BatchNorm1d(5))).bfloat16()
    buffers = dict(model.named_buffers())
    with torch.no_grad():
        model[0].running_mean.fill_(1.0 + 2.0**-12)  # which bfloat16 cannot hold
    with reverted(model):
        model[1].running_mean.fill_(3.0)
        model[1].num_batches_tracked.fill_(7)
    assert {b.dtype for n, b in model.named_buffers() if "mean" in n} == {torch.float32}
    assert all(b is buffers[name] for name, b in model.named_buffers())
    assert (model[0].running_mean == 1.0 + 2.0**-12).all()
    assert (model[1].running_mean == 3.0).all()
    assert model[1].num_batches_tracked == 7


def test_what_the_block_has_changed_stays() -> None:
    model = network().eval()
    first, conv = model[1], model[0]
    with reverted(model):
        model[0] = nn.Identity()
        model[9] = nn.Dropout()
        model[5].__class__ = nn.BatchNorm2d
        model[7].note = "left by the block"
        model[7].momentum = 0.5
        model[8].register_forward_hook(lambda *_: None)
        twin = copy.deepcopy(model[2:3])
        model.train()
    assert type(model[0]) is nn.Identity
    assert type(model[9]) is nn.Dropout
    assert type(model[5]) is nn.BatchNorm2d
    assert model[7].note == "left by the block"
    assert model[7].momentum == 0.5
    assert len(model[8]._forward_hooks) == 1
    assert isinstance(model[8], truenorm.LayerNorm)
    assert model[7].training
    assert type(first) is truenorm.BatchNorm2d
    assert first.renorm
    assert isinstance(twin[0], nn.ReLU)
    assert isinstance(conv, nn.Conv2d)


def test_a_fused_model() -> None:
    body = nn.Sequential(nn.Conv2d(3, 5, 1), nn.BatchNorm2d(5), nn.ReLU())
    model: Any = truenorm.fuse(truenorm.convert(nn.Sequential(randomize(body)))).eval()
    plain = nn.Sequential(nn.Conv2d(3, 5, 1), nn.BatchNorm2d(5), nn.ReLU())
    before, x = held(model), torch.randn(2, 3, 4, 4)
    expected = model(x)
    with reverted(model):
        assert [type(m) for m in model[0].modules()] == [type(m) for m in plain.modules()]
        torch.testing.assert_close(model(x), expected)
    assert_as_before(model, before)
    assert torch.equal(model(x), expected)


def test_hooks_of_accelerate() -> None:
    model: Any = truenorm.convert(nn.Sequential(nn.BatchNorm2d(5)))
    layer = model[0]
    layer._old_forward = layer.forward

    def new_forward(module: Any, x: torch.Tensor) -> Any:
        return module._old_forward(x)

    layer.forward = functools.update_wrapper(
        functools.partial(new_forward, layer), layer._old_forward
    )
    with reverted(model):
        assert layer._old_forward.__func__ is nn.BatchNorm2d.forward
        model(torch.randn(2, 5, 3, 3))
    assert layer._old_forward.__func__ is truenorm.BatchNorm2d.forward
    assert layer.forward.__wrapped__ == layer._old_forward
    model(torch.randn(2, 5, 3, 3))


def test_within_another() -> None:
    model = network()
    before = held(model)
    with reverted(model), reverted(model):
        assert type(model[1]) is nn.BatchNorm2d
    assert_as_before(model, before)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"activation": "relu"}, r"1 layer\(s\) with an activation, the first '1'"),
        ({"statistics_frozen": True}, r"1 frozen layer\(s\), the first '1'"),
        ({"channel_axis": -1}, r"'1'.*channel_axis"),
    ],
)
def test_what_torch_has_not_is_an_error(options: dict[str, Any], match: str) -> None:
    model = nn.Sequential(truenorm.LayerNorm(5), truenorm.BatchNorm1d(5, **options))
    before = held(model)
    with pytest.raises(ValueError, match=match), reverted(model):
        pass
    assert_as_before(model, before)


def test_not_a_model() -> None:
    bad: Any = {}
    with pytest.raises(TypeError, match=r"`model` must be a torch.nn.Module, but got dict"):
        reverted(bad).__enter__()
