"""Frozen statistics, checkpoints, accumulation, one value, NaN, ghost batches, renormalization."""

from __future__ import annotations

import copy
import functools
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import randomize, run
from processes import processes
from ranks import counted
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap
from torch.utils.checkpoint import checkpoint

import truenorm
from truenorm import functional as F

RUNNING = ("running_mean", "running_var", "num_batches_tracked")


@pytest.fixture(autouse=True)
def _graphs_anew() -> None:
    torch.compiler.reset()


def data(*shape: int, offset: float = 3.0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).float() * 2.0 + offset


def warm(layer: Any, *shape: int) -> Any:
    randomize(layer)
    layer(data(*shape))
    return layer


def state(layer: Any) -> list[Tensor]:
    return [getattr(layer, name).clone() for name in RUNNING]


def assert_same(one: Any, other: Any) -> None:
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a, b)


KINDS: list[Callable[[], Any]] = [
    lambda: warm(truenorm.BatchNorm2d(5), 4, 5, 3, 7),
    lambda: warm(truenorm.SyncBatchNorm(5), 4, 5, 3, 7),
    lambda: warm(truenorm.InstanceNorm2d(5, affine=True, track_running_stats=True), 4, 5, 3, 7),
]
EVERY = pytest.mark.parametrize("make", KINDS, ids=["batch", "sync", "instance"])


@EVERY
def test_frozen_is_evaluation(make: Callable[[], Any]) -> None:
    layer, x, grad = make(), data(4, 5, 3, 7), data(4, 5, 3, 7)
    wanted = run(copy.deepcopy(layer).eval(), x, grad)
    assert truenorm.freeze(layer) is layer
    layer.train()
    before = state(layer)
    assert "statistics_frozen=True" in repr(layer)
    for other in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert_same(run(other, x, grad), wanted)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), wanted.output)
    assert_same(state(layer), before)
    truenorm.unfreeze(layer)(x)
    assert not torch.equal(layer.running_mean, before[0])
    assert "_truenorm_options" not in vars(layer)


def test_frozen_goes_the_short_way() -> None:
    for made in (truenorm.BatchNorm2d(5), truenorm.InstanceNorm1d(5, track_running_stats=True)):
        made.statistics_frozen = True
        assert made._direct
        made.on_single = "running"
        assert not made._direct


@EVERY
def test_frozen_in_the_state(make: Callable[[], Any]) -> None:
    layer = truenorm.freeze(make())
    buffer = io.BytesIO()
    torch.save(nn.Sequential(layer).state_dict(), buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    theirs = truenorm.revert(truenorm.unfreeze(nn.Sequential(make())))
    theirs.load_state_dict(saved, strict=True)
    assert list(saved) == list(theirs.state_dict())
    ours = nn.Sequential(make())
    ours.load_state_dict(saved, strict=True)
    assert ours[0].statistics_frozen
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert ours[0].statistics_frozen  # torch's state says nothing about it
    other = nn.Sequential(make())
    other.load_state_dict(theirs.state_dict(), strict=True)
    assert not other[0].statistics_frozen


def test_frozen_sends_nothing() -> None:
    assert processes(2).run(_sends_when_frozen) == [[], []]


def _sends_when_frozen(rank: int) -> list[int]:
    layer = truenorm.SyncBatchNorm(5)
    truenorm.freeze(layer)
    return counted(lambda: layer(data(4, 5)))


def test_what_cannot_be_frozen_changes_nothing() -> None:
    model = nn.Sequential(truenorm.BatchNorm1d(3), nn.BatchNorm1d(3))
    with pytest.raises(ValueError, match=r"'1', that is torch.*convert\(model\) first"):
        truenorm.freeze(model)
    assert not model[0].statistics_frozen
    model[1] = truenorm.BatchNorm1d(3, track_running_stats=False)
    with pytest.raises(ValueError, match=r"'1', that has no running statistics"):
        truenorm.freeze(model)
    assert not model[0].statistics_frozen
    with pytest.raises(ValueError, match=r"no truenorm layer with running statistics"):
        truenorm.freeze(nn.Linear(3, 3))
    with pytest.raises(TypeError, match=r"`model` must be a torch.nn.Module"):
        truenorm.freeze(3)
    with pytest.raises(ValueError, match=r"1 frozen layer.*unfreeze\(model\)"):
        truenorm.revert(truenorm.freeze(model[:1]))


def test_fold_of_a_frozen_layer_in_training() -> None:
    model = nn.Sequential(nn.Conv2d(3, 5, 3), warm(truenorm.BatchNorm2d(5), 4, 5, 3, 7))
    truenorm.freeze(model)
    x = data(2, 3, 9, 9)
    folding = truenorm.fold(model, x)
    assert len(folding.folded) == 1
    torch.testing.assert_close(folding.model(x), model(x), rtol=1e-4, atol=1e-4)


@EVERY
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("how", ["eager", "long", "compiled"])
def test_checkpoint_counts_once(
    make: Callable[[], Any], reentrant: bool, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if how == "long":
        monkeypatch.setattr(truenorm._core.eager, "call", lambda *_: None)
    layer = make()
    other = copy.deepcopy(layer)
    x, grad = data(4, 5, 3, 7), data(4, 5, 3, 7)
    wanted = run(other, x, grad)
    call = torch.compile(layer, fullgraph=True, backend="aot_eager") if how == "compiled" else layer
    x = x.requires_grad_()
    y = checkpoint(call, x, use_reentrant=reentrant)
    y.backward(grad)
    assert_same((y, x.grad, layer.weight.grad, layer.bias.grad), wanted)
    assert_same(state(layer), state(other))


@pytest.mark.parametrize("options", [{"renorm": True}, {"on_single": "running"}])
def test_checkpoint_finds_the_statistics_of_the_first_forward(options: dict[str, Any]) -> None:
    layer = warm(truenorm.BatchNorm1d(5, **options), 9, 5)
    x, grad = data(9 if "renorm" in options else 1, 5), data(9 if "renorm" in options else 1, 5)
    other = copy.deepcopy(layer)
    wanted = run(other, x, grad)
    x = x.requires_grad_()
    y = checkpoint(layer, x, use_reentrant=False)
    y.backward(grad)
    assert_same((y, x.grad, layer.weight.grad, layer.bias.grad), wanted)
    assert_same(state(layer), state(other))


@pytest.mark.parametrize("momentum", [0.3, None])
@pytest.mark.parametrize("compiled", [False, True])
def test_accumulate_is_one_batch(momentum: float | None, compiled: bool) -> None:
    layer = warm(truenorm.BatchNorm2d(5, momentum=momentum), 4, 5, 3, 7)
    before = state(layer)
    parts = [data(n, 5, 3, 7, offset=100.0 * n) for n in (2, 1, 4)]
    call = torch.compile(layer, fullgraph=True, backend="aot_eager") if compiled else layer
    with truenorm.accumulate(layer):
        outputs = [call(p) for p in parts]
        assert_same(state(layer), before)
        with (
            pytest.raises(RuntimeError, match=r"already accumulates.*cannot be nested"),
            truenorm.accumulate(layer),
        ):
            pass
    whole = torch.cat(parts).double()
    factor = 0.5 if momentum is None else momentum
    seen = whole.mean((0, 2, 3)), whole.var((0, 2, 3), unbiased=True)
    for b, s, now in zip(before, seen, state(layer), strict=False):
        torch.testing.assert_close(now.double(), (1 - factor) * b + factor * s, rtol=1e-6, atol=0)
    assert layer.num_batches_tracked == before[2] + 1
    fresh = truenorm.BatchNorm2d(5)
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(outputs[1], fresh(parts[1]))
    call(parts[0])
    assert layer.num_batches_tracked == before[2] + 2


def test_accumulate_of_samples() -> None:
    layer = truenorm.InstanceNorm1d(3, track_running_stats=True)
    other = copy.deepcopy(layer)
    parts = [data(n, 3, 7) for n in (2, 1, 4)]
    with truenorm.accumulate(layer):
        for p in parts:
            layer(p)
    other(torch.cat(parts))
    torch.testing.assert_close(layer.running_mean, other.running_mean)
    torch.testing.assert_close(layer.running_var, other.running_var)


def test_an_error_within_accumulate_changes_nothing() -> None:
    layer = warm(truenorm.BatchNorm1d(3), 4, 3)
    before = state(layer)

    def step() -> None:
        with truenorm.accumulate(layer):
            layer(data(4, 3))
            layer(data(4, 3, 2, 2))

    with pytest.raises(ValueError, match="2D or 3D"):
        step()
    assert_same(state(layer), before)
    assert layer._gathered is None
    layer(data(4, 3))
    assert layer.num_batches_tracked == before[2] + 1


def test_accumulate_of_all_ranks() -> None:
    parts = [[data(n, 5) for n in sizes] for sizes in ((2, 3), (4, 1))]
    found = processes(2).run(_accumulated, each=[(p,) for p in parts])
    whole = torch.cat([p for own in parts for p in own]).double()
    for mean, var, batches in found:
        torch.testing.assert_close(mean.double(), 0.1 * whole.mean(0), rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(var.double(), 0.9 + 0.1 * whole.var(0), rtol=1e-6, atol=1e-7)
        assert batches == 1


def _accumulated(rank: int, parts: list[Tensor]) -> list[Tensor]:
    layer = truenorm.SyncBatchNorm(5)
    with truenorm.accumulate(layer):
        for p in parts:
            layer(p)
    return state(layer)


def test_one_value() -> None:
    x, grad = data(1, 5), data(1, 5)
    layer = warm(truenorm.BatchNorm1d(5), 4, 5)
    before = state(layer)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        layer(x)
    layer.on_single = "running"
    assert_same(run(layer, x, grad), run(copy.deepcopy(layer).eval(), x, grad))
    layer.on_single = "skip"
    found = run(layer, x, grad)
    torch.testing.assert_close(found.output, x * layer.weight + layer.bias)
    torch.testing.assert_close(found.input, grad * layer.weight)
    assert_same(state(layer), before)
    x = data(4, 5)
    plain = truenorm.BatchNorm1d(5)
    plain.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x), plain(x))
    with pytest.raises(ValueError, match=r"`on_single` must be .* but got 'drop'"):
        layer.on_single = "drop"
    assert layer.on_single == "skip"


@EVERY
def test_nonfinite_batches_are_skipped(make: Callable[[], Any]) -> None:
    layer = make()
    layer.skip_nonfinite = True
    other, before = make(), None
    other.load_state_dict(layer.state_dict())
    x = data(4, 5, 3, 7)
    assert torch.equal(layer(x), other(x))
    assert_same(state(layer), state(other))
    before = state(layer)
    for bad in (float("nan"), float("inf")):
        y = x.clone()
        y[1, 2, 0, 0] = bad
        layer(y)
        torch.compile(layer, fullgraph=True, backend="aot_eager")(y)
    assert_same(state(layer), before)


@pytest.mark.parametrize("samples", [9, 8, 3])
def test_ghost_batches_are_batches(samples: int) -> None:
    layer = warm(truenorm.BatchNorm1d(5, virtual_batch_size=4), 4, 5)
    plain = truenorm.BatchNorm1d(5)
    plain.load_state_dict(layer.state_dict())
    x, grad = data(samples, 5), data(samples, 5)
    # 9 samples: the last one alone would be one value per channel
    sizes = {9: [4, 5], 8: [4, 4], 3: [3]}[samples]
    wanted = [run(plain, p, g) for p, g in zip(x.split(sizes), grad.split(sizes), strict=True)]
    found = run(layer, x, grad)
    assert torch.equal(found.output, torch.cat([w.output for w in wanted]))
    assert torch.equal(found.input, torch.cat([w.input for w in wanted]))
    torch.testing.assert_close(found.weight, sum(w.weight for w in wanted))
    assert_same(state(layer), state(plain))
    assert torch.equal(layer.eval()(x), plain.eval()(x))


def renormalized(x: Tensor, layer: Any, mean: Tensor, var: Tensor) -> Tensor:
    """Ioffe 2017, algorithm 1."""
    mu, sigma_b = x.mean(0), (x.var(0, unbiased=False) + layer.eps).sqrt()
    sigma = (var.double() + layer.eps).sqrt()
    r = (sigma_b.detach() / sigma).clamp(1 / layer.rmax, layer.rmax)
    d = ((mu.detach() - mean.double()) / sigma).clamp(-layer.dmax, layer.dmax)
    x_hat = (x - mu) / sigma_b * r + d
    return layer.weight.double() * x_hat + layer.bias.double()


@pytest.mark.parametrize(("rmax", "dmax"), [(3.0, 5.0), (1.1, 0.2), (1.0, 0.0)])
@pytest.mark.parametrize("compiled", [False, True])
def test_renorm_is_its_formula(rmax: float, dmax: float, compiled: bool) -> None:
    layer = warm(truenorm.BatchNorm1d(5, renorm=True), 64, 5)
    layer.rmax, layer.dmax = rmax, dmax
    mean, var, batches = state(layer)
    x, grad = data(6, 5), data(6, 5)
    wide = x.double().requires_grad_()
    wanted = renormalized(wide, layer, mean, var)
    grads = torch.autograd.grad(wanted, [wide, layer.weight, layer.bias], grad.double())
    call = torch.compile(layer, fullgraph=True, backend="aot_eager") if compiled else layer
    x = x.requires_grad_()
    y = call(x)
    found = torch.autograd.grad(y, [x, layer.weight, layer.bias], grad)
    for a, b in zip((y, *found), (wanted, *grads), strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=2e-5, atol=2e-5)
    now = 0.9 * mean.double() + 0.1 * x.double().mean(0)
    torch.testing.assert_close(layer.running_mean.double(), now, rtol=1e-6, atol=1e-6)
    assert layer.num_batches_tracked == batches + 1


# without clips in between: what is clipped or held constant has no derivative to check
@pytest.mark.parametrize(
    "options", [{"renorm": True, "rmax": 1.0, "dmax": 0.0}, {"virtual_batch_size": 3}, {}]
)
def test_second_derivatives(options: dict[str, Any]) -> None:
    layer = warm(truenorm.BatchNorm1d(3, momentum=0.0, **options), 8, 3).double()
    x = data(6, 3).double().requires_grad_()
    assert torch.autograd.gradgradcheck(layer, (x,))


def test_options_that_do_not_go_together() -> None:
    make = truenorm.BatchNorm1d
    for options, message in (
        ({"virtual_batch_size": 4, "renorm": True}, r"`virtual_batch_size` \(=4\).*choose one"),
        ({"on_single": "skip", "process_group": "world"}, r"batch of one process"),
        ({"renorm": True, "track_running_stats": False}, r"`renorm` needs running statistics"),
        ({"virtual_batch_size": 0}, r"`virtual_batch_size` must be .* got 0"),
        ({"rmax": 0.5}, r"`rmax` must be a number of at least 1, but got 0.5"),
        ({"dmax": -1.0}, r"`dmax` must be a number of at least 0, but got -1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            make(3, **options)
    with pytest.raises(TypeError, match=r"`renorm` must be True or False, but got 1"):
        make(3, renorm=1)
    with pytest.raises(TypeError, match="on_single"):
        truenorm.SyncBatchNorm(3, on_single="skip")


def test_the_functional_form() -> None:
    x, w, b = data(6, 5), torch.rand(5), torch.randn(5)
    mean, var = torch.zeros(5), torch.ones(5)
    y, moments = F.batch_norm_stats(x, w, b)
    assert torch.equal(y, F.batch_norm(x, mean, var, w, b, training=True))
    found = moments.update(torch.zeros(5), torch.ones(5), 0.1)
    torch.testing.assert_close(found, (mean, var))
    ys, many = vmap(F.batch_norm_stats)(torch.stack([x, 2 * x]), torch.stack([w, w]))
    torch.testing.assert_close(ys[0], F.batch_norm_stats(x, w)[0])
    torch.testing.assert_close(many.mean[1], 2 * moments.mean)
    jacobian = jacrev(lambda x: F.batch_norm_stats(x, w, b)[0])(x)
    by_hand = torch.autograd.functional.jacobian(lambda x: F.batch_norm_stats(x, w, b)[0], x)
    torch.testing.assert_close(jacobian, by_hand, rtol=1e-4, atol=1e-5)


def test_two_forwards_of_one_network_before_a_backward() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.rand(5))

        def forward(self, x: Tensor) -> tuple[Tensor, truenorm.Moments]:
            return F.batch_norm_stats(x, self.weight)

    net, weight = Net(), torch.rand(5, requires_grad=True)
    (one, first), (two, second) = (
        functional_call(net, {"weight": weight}, data(6, 5)) for _ in range(2)
    )
    (one * two).sum().backward()
    assert weight.grad is not None
    assert first.merge(second).count == 12


# --- frozen means frozen, whoever resets, converts or copies


def mixed() -> nn.Sequential:
    """A frozen layer, and one that is not."""
    model = nn.Sequential(warm(truenorm.BatchNorm1d(5), 4, 5), warm(truenorm.BatchNorm1d(5), 4, 5))
    truenorm.freeze(model[0])
    return model.train()


def test_update_bn_leaves_frozen_statistics() -> None:
    model = mixed()
    before, moving = state(model[0]), state(model[1])
    momenta = [layer.momentum for layer in model]
    batches = [data(4, 5) for _ in range(3)]
    torch.optim.swa_utils.update_bn(batches, model)
    assert_same(state(model[0]), before)
    assert [layer.momentum for layer in model] == momenta
    assert not torch.equal(model[1].running_mean, moving[0])
    seen = torch.stack([model[0](b).mean(0) for b in batches]).mean(0)
    torch.testing.assert_close(model[1].running_mean, seen)
    assert model[1].num_batches_tracked == 3


def test_update_bn_of_an_averaged_model() -> None:
    model = mixed()
    before = state(model[0])
    averaged = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    averaged.update_parameters(model)
    averaged.update_parameters(model)
    torch.optim.swa_utils.update_bn([data(4, 5)], averaged)
    for layer in (averaged.module[0], model[0]):
        assert layer.statistics_frozen
        assert_same(state(layer), before)


@EVERY
@pytest.mark.parametrize("reset", ["reset_running_stats", "reset_parameters"])
def test_resetting_leaves_frozen_statistics(make: Callable[[], Any], reset: str) -> None:
    layer = truenorm.freeze(make())
    before = state(layer)
    getattr(layer, reset)()
    assert_same(state(layer), before)
    assert bool((layer.weight == 1).all()) == (reset == "reset_parameters")
    getattr(truenorm.unfreeze(layer), reset)()
    assert not layer.running_mean.any()


KEPT: list[dict[str, Any]] = [
    {"statistics_frozen": True},
    {"activation": "leaky_relu", "leaky_relu_slope": 0.3},
    {"channel_axis": -1},
    {"skip_nonfinite": True},
    {"overwrite_input": True, "activation": "relu"},
    {"virtual_batch_size": 2},
    {"renorm": True},
]
NOT_KEPT: list[dict[str, Any]] = [
    {"on_single": "skip"},
]


@pytest.mark.parametrize("options", KEPT, ids=str)
def test_our_sync_conversion_keeps_options(options: dict[str, Any]) -> None:
    layer = warm(truenorm.BatchNorm1d(5, **options), 4, 5, 5)
    model = nn.Sequential(nn.Sequential(layer), nn.Linear(5, 5), nn.BatchNorm1d(5)).train()
    x, before = data(4, 5, 5), state(layer)
    twin = copy.deepcopy(layer)
    converted: Any = truenorm.SyncBatchNorm.convert_sync_batchnorm(model)
    found = converted[0][0]
    assert type(found) is type(converted[2]) is truenorm.SyncBatchNorm
    assert found._chosen() == options
    assert converted[2]._chosen() == {}
    torch.testing.assert_close(found(x.clone()), twin(x.clone()))
    assert torch.equal(found.running_mean, before[0]) == ("statistics_frozen" in options)
    alone = truenorm.SyncBatchNorm.convert_sync_batchnorm(twin)
    assert alone._chosen() == options  # type: ignore[operator]


def test_our_sync_conversion_keeps_the_group() -> None:
    layer = truenorm.BatchNorm1d(5, process_group="world")
    converted: Any = truenorm.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(layer))
    assert converted[0].process_group == "world"
    again: Any = truenorm.SyncBatchNorm.convert_sync_batchnorm(converted)
    assert again[0].process_group == "world"


@pytest.mark.parametrize("options", NOT_KEPT, ids=str)
@pytest.mark.parametrize("how", ["class method", "convert"])
def test_sync_refuses_what_is_for_one_process(options: dict[str, Any], how: str) -> None:
    model = nn.Sequential(nn.BatchNorm1d(5), truenorm.BatchNorm1d(5, **options))
    name, value = next(iter(options.items()))
    call: Any = truenorm.SyncBatchNorm.convert_sync_batchnorm
    if how == "convert":
        call = functools.partial(truenorm.convert, sync=True)
    with pytest.raises(ValueError, match=rf"layer, '1', whose `{name}` \(={value!r}\).*set layer"):
        call(model)
    assert type(model[0]) is nn.BatchNorm1d
    assert model[1]._chosen() == options


@pytest.mark.parametrize("options", KEPT + NOT_KEPT, ids=str)
def test_torchs_sync_conversion_refuses_what_it_would_drop(options: dict[str, Any]) -> None:
    model = nn.Sequential(nn.BatchNorm1d(5), truenorm.BatchNorm1d(5, **options))
    name = next(iter(options))
    with pytest.raises(ValueError, match=rf"layer, '1', with .*{name}=.*sync=True"):
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert model[1]._chosen() == options
    plain: Any = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(truenorm.BatchNorm1d(5)))
    assert type(plain[0]) is nn.SyncBatchNorm
    mine: Any = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(nn.BatchNorm1d(5)), "group")
    assert mine[0].process_group == "group"


@pytest.mark.parametrize("library", [nn, truenorm], ids=["torch", "truenorm"])
def test_sync_conversion_refuses_lazy_layers(library: Any) -> None:
    model = nn.Sequential(truenorm.LazyBatchNorm1d())
    with pytest.raises(ValueError, match=r"`module` has a lazy layer, '0', .*call the model once"):
        library.SyncBatchNorm.convert_sync_batchnorm(model)
    model(data(4, 5))
    converted = library.SyncBatchNorm.convert_sync_batchnorm(model)
    assert converted[0].num_features == 5


def test_frozen_through_every_conversion() -> None:
    model = truenorm.freeze(truenorm.convert(nn.Sequential(nn.BatchNorm1d(5))))
    for sync in (None, True, False):
        truenorm.convert(model, sync=sync)
        assert model[0].statistics_frozen
    with pytest.raises(ValueError, match="1 frozen layer"), truenorm.reverted(model):
        pass
    assert model[0].statistics_frozen
