"""recalibrate: running statistics of a whole data set, and everything else as it was."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from cases import randomize
from processes import processes
from test_convert import ResNet
from tolerances import FLOAT64, assert_output, relative
from torch import Tensor, nn
from torch.nn import Module

import truenorm
from truenorm import recalibrate


def batches(sizes: list[int], *shape: int, offset: float = 0.0) -> list[Tensor]:
    return [torch.randn(size, *shape) * 1.7 + offset for size in sizes]


def exact(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance per channel, float64, in two passes."""
    flat = values.double().movedim(1, 0).flatten(1)
    mean = flat.mean(1, keepdim=True)
    mean = mean + (flat - mean).mean(1, keepdim=True)
    return mean[:, 0], ((flat - mean) ** 2).sum(1) / (flat.shape[1] - 1)


def snapshot(model: Module) -> Any:
    held = [(type(m), m.training, dict(vars(m)), dict(m._buffers)) for m in model.modules()]
    hooks = [dict(m._forward_hooks) for m in model.modules()]
    values = {k: v.clone() for k, v in model.state_dict().items()}
    return held, hooks, values


def assert_as_before(model: Module, before: Any) -> None:
    held, hooks, values = before
    for module, (kind, mode, attributes, buffers), hook in zip(
        model.modules(), held, hooks, strict=True
    ):
        assert type(module) is kind
        assert module.training is mode
        assert vars(module).keys() == attributes.keys()
        assert vars(module).get("process_group") == attributes.get("process_group")
        assert all(module._buffers[k] is b for k, b in buffers.items())
        assert dict(module._forward_hooks) == hook
    assert all(torch.equal(v, values[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("library", [nn, truenorm], ids=["torch", "truenorm"])
@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_population_of_the_input(library: Any, offset: float, dtype: torch.dtype) -> None:
    layer = randomize(library.BatchNorm2d(3, momentum=0.7)).to(dtype)
    data = [b.to(dtype) for b in batches([4, 1, 7, 2], 3, 5, 4, offset=offset)]
    assert recalibrate(layer, data) == 4
    mean, var = exact(torch.cat(data))
    assert_output(layer.running_mean, mean)
    assert_output(layer.running_var, var)
    assert layer.num_batches_tracked.item() == 4
    assert layer.momentum == 0.7


def test_every_layer_of_a_network_sees_what_it_gets_in_training() -> None:
    model = randomize(ResNet()).double().train()
    model.head.append(nn.Dropout(0.5))
    data = [b.double() for b in batches([6, 6, 4], 3, 8, 8)]
    layers = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    seen: dict[Module, list[Tensor]] = {layer: [] for layer in layers}
    other = copy.deepcopy(model)
    for layer, twin in zip(layers, other.modules(), strict=False):
        assert layer is not twin
    twins = [m for m in other.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for layer, twin in zip(layers, twins, strict=True):
        twin.register_forward_pre_hook(lambda _, args, at=layer: seen[at].append(args[0]))
    for batch in data:
        other(batch)
    recalibrate(model, iter(data))
    for layer in layers:
        mean, var = exact(torch.cat(seen[layer]))
        assert relative(layer.running_mean, mean) < 1e3 * FLOAT64
        assert relative(layer.running_var, var) < 1e3 * FLOAT64
    assert model.training


def test_instance_norm_gets_the_average_over_samples() -> None:
    layer = truenorm.InstanceNorm2d(3, track_running_stats=True)
    data = batches([4, 1, 2], 3, 5, 4, offset=100.0)
    data[0] = data[0].to(memory_format=torch.channels_last)
    data.append(torch.randn(3, 5, 4))  # unbatched
    recalibrate(layer, data)
    samples = [s for b in data for s in (b if b.dim() == 4 else b[None]).split(1)]
    each = [exact(s) for s in samples]
    assert_output(layer.running_mean, torch.stack([m for m, _ in each]).mean(0))
    assert_output(layer.running_var, torch.stack([v for _, v in each]).mean(0))


def test_everything_else_is_as_it_was() -> None:
    model = randomize(nn.Sequential(ResNet(), nn.Dropout(0.5), nn.Linear(5, 5)))
    truenorm.convert(model, sync=True, only=(nn.BatchNorm2d,))
    model[0].blocks[0].eval()
    model[1].eval()
    before = snapshot(model)
    twice = [recalibrate(model, batches([5, 5], 3, 8, 8)) for _ in range(2)]
    assert twice == [2, 2]
    fresh = {k: v for k, v in model.state_dict().items() if "running" in k or "num_b" in k}
    assert not any(torch.equal(v, before[2][k]) for k, v in fresh.items())
    with torch.no_grad():
        for name, value in fresh.items():
            value.copy_(before[2][name])
    assert_as_before(model, before)
    assert all(p.grad is None for p in model.parameters())


class Broken(Exception):
    pass


def breaking(data: list[Tensor], after: int) -> Iterator[Tensor]:
    yield from data[:after]
    raise Broken("the disk is full")


@pytest.mark.parametrize("after", [0, 2])
@pytest.mark.parametrize("where", ["loader", "model"])
def test_an_error_changes_nothing(where: str, after: int) -> None:
    model = randomize(nn.Sequential(nn.SyncBatchNorm(3), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))
    model[2].eval()
    before = snapshot(model)
    data: Any = batches([4, 4, 4], 3, 5, 5)
    if where == "loader":
        with pytest.raises(Broken, match="disk is full"):
            recalibrate(model, breaking(data, after))
    else:
        data[after] = torch.randn(4, 2, 5, 5)
        with pytest.raises(RuntimeError, match="to match num_features"):
            recalibrate(model, data)
    assert_as_before(model, before)


def test_as_many_batches_as_asked_for_and_no_more() -> None:
    layer, drawn = nn.BatchNorm1d(3), []

    def endless() -> Iterator[Tensor]:
        for _ in itertools.count():
            drawn.append(torch.randn(5, 3))
            yield drawn[-1]

    assert recalibrate(layer, endless(), batches=3) == 3
    assert len(drawn) == 3
    assert_output(layer.running_var, exact(torch.cat(drawn))[1])


def test_how_a_batch_enters_the_model() -> None:
    class Two(Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, left: Tensor, right: Tensor) -> Tensor:
            return self.norm(input=left + right)

    data = [torch.randn(4, 3) for _ in range(3)]
    results = []
    for model, loader, forward in (
        (nn.BatchNorm1d(3), [(x, "label") for x in data], None),
        (nn.BatchNorm1d(3), [[x] for x in data], None),
        (Two(), [{"left": x / 2, "right": x / 2} for x in data], None),
        (Two(), data, lambda model, x: model(x / 2, x / 2)),
    ):
        recalibrate(model, loader, forward=forward)
        results.append(next(m for m in model.modules() if isinstance(m, nn.BatchNorm1d)))
    for layer in results:
        assert_output(layer.running_mean, exact(torch.cat(data))[0])


def test_a_layer_used_twice_and_one_never_reached() -> None:
    class Net(Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.unused = nn.BatchNorm1d(3), randomize(nn.BatchNorm1d(3))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.norm(x), self.norm(x + 5.0)

    model, x = Net(), torch.randn(6, 3)
    before = {k: v.clone() for k, v in model.unused.state_dict().items()}
    recalibrate(model, [x])
    assert_output(model.norm.running_var, exact(torch.cat([x, x + 5.0]))[1])
    assert all(torch.equal(v, before[k]) for k, v in model.unused.state_dict().items())


def test_a_compiled_model() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.ReLU())
    compiled = torch.compile(model, backend="eager")
    data = batches([4, 4], 3)
    compiled(data[0])
    recalibrate(compiled, data)
    assert_output(model[0].running_mean, exact(torch.cat(data))[0])
    torch.compiler.reset()


def test_resumed_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "moments.pt"
    model = randomize(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)))
    data = batches([4] * 7, 3, 5, 5)
    whole = copy.deepcopy(model)
    recalibrate(whole, data)
    before = snapshot(model)
    with pytest.raises(Broken, match="disk"):
        recalibrate(model, breaking(data, 5), resume=file, save_every=2)
    assert_as_before(model, before)
    assert [p.name for p in tmp_path.iterdir()] == [file.name]
    with pytest.raises(ValueError, match=r"moments.pt.* holds the moments of 2 layers, not of one"):
        truenorm.Moments.load(file)
    seen = []
    model[0].register_forward_pre_hook(lambda *_: seen.append(1))
    assert recalibrate(model, data, resume=file) == 7
    assert len(seen) == 2
    for name, value in whole.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    assert not list(tmp_path.iterdir())


def test_a_batch_that_fails_halfway_is_not_in_the_file(tmp_path: Path) -> None:
    file = tmp_path / "moments.pt"
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 4), nn.BatchNorm1d(4))
    data = batches([4] * 3, 3)

    def once(model: Module, batch: Tensor) -> None:
        model[:2](batch)
        if batch is data[1] and file.name:
            raise Broken("the disk is full")
        model[2](model[1](batch))

    with pytest.raises(Broken, match="disk"):
        recalibrate(model, data, resume=file, forward=once)
    recalibrate(model, data, resume=file)
    assert_output(model[0].running_mean, exact(torch.cat(data))[0])


def test_a_file_of_another_model(tmp_path: Path) -> None:
    file = tmp_path / "moments.pt"
    model, data = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), batches([4, 4], 3)
    with pytest.raises(Broken, match="disk"):
        recalibrate(model, breaking(data, 1), resume=file)
    randomize(model)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"`resume` .*moments.pt.* other parameters: delete the"):
        recalibrate(model, data, resume=file)
    file.write_bytes(b"something else")
    with pytest.raises(ValueError, match=r"`path` .*moments.pt.* is no file of moments"):
        recalibrate(model, data, resume=file)
    assert_as_before(model, before)


def test_a_bar(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    recalibrate(nn.BatchNorm1d(3), batches([4] * 5, 3), progress=True, batches=4)
    shown = capsys.readouterr().err
    assert "recalibrate: 100%" in shown
    assert "4/4" in shown
    assert "batch/s" in shown
    recalibrate(nn.BatchNorm1d(3), batches([4], 3))
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("truenorm._tools.extras.has", lambda package: False)
    with pytest.raises(ImportError, match="progress=True needs tqdm: pip install"):
        recalibrate(nn.BatchNorm1d(3), batches([4], 3), progress=True)


@pytest.mark.parametrize(
    ("model", "loader", "kwargs", "kind", "message"),
    [
        ({"a": 1}, [], {}, TypeError, r"`model` must be a torch.nn.Module, but got dict"),
        (nn.LayerNorm(3), [], {}, ValueError, r"`model` has no layer with running statistics"),
        (nn.BatchNorm1d(3), [], {}, ValueError, r"`loader` gave no batch: pass one that starts"),
        (
            nn.BatchNorm1d(3),
            [],
            {"batches": 0},
            ValueError,
            r"`batches` must be a whole number of at least 1, .* 0",
        ),
        (nn.BatchNorm1d(3), 5, {}, TypeError, r"`loader` must be an iterable of batches, .* int"),
        (nn.BatchNorm1d(3), torch.randn(4, 3), {}, TypeError, r"got Tensor: of one batch pass \["),
        (nn.LazyBatchNorm1d(), [], {}, ValueError, r"lazy layer, '', .*call the model once before"),
    ],
)
def test_bad_input(model: Any, loader: Any, kwargs: Any, kind: Any, message: str) -> None:
    with pytest.raises(kind, match=message):
        recalibrate(model, loader, **kwargs)


@pytest.mark.parametrize("shares", [[2, 3], [4, 0, 1]], ids=str)
def test_every_rank_its_share(shares: list[int]) -> None:
    model = truenorm.convert(randomize(ResNet()))
    data = batches([6] * 5, 3, 8, 8)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    recalibrate(model, data)
    wanted = model.state_dict()
    starts = [sum(shares[:rank]) for rank in range(len(shares))]
    each = [([data[i] for i in range(a, a + n)],) for a, n in zip(starts, shares, strict=True)]
    found = processes(len(shares)).run(ranks.recalibrated, state, each=each)
    for after in found:
        for name, value in after.items():
            assert torch.equal(value, found[0][name]), name
            assert relative(value.double(), wanted[name].double()) < 1e-6


def test_a_failure_on_one_rank_is_one_on_all() -> None:
    state = ResNet().state_dict()
    data = batches([6] * 2, 3, 8, 8)
    bad = [data[0], torch.randn(6, 2, 8, 8)]
    found = processes(3).outcomes(ranks.recalibrated, state, each=[(data,), (bad,), (data,)])
    assert found[1].kind == "RuntimeError"
    assert "expected input[6, 2, 8, 8] to have 3 channels" in found[1].text
    for failed in (found[0], found[2]):
        assert failed.kind == "RuntimeError"
        assert "recalibrate failed on rank 1, and so on all: nothing was changed" in failed.text
