"""Networks that others wrote: converted, run, trained, inspected, folded, exported, reverted."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import randomize
from tolerances import FLOAT32_BETWEEN, relative
from torch import Tensor
from torch.nn import Module

import truenorm
from truenorm._models.layers import norms_of
from truenorm._tools.bench import models
from truenorm._tools.bench.networks import NETWORKS, Network, first_tensor, without_norms
from truenorm._tools.bench.timing import Plan
from truenorm._tools.cli import main

EVERY = pytest.mark.parametrize("network", NETWORKS, ids=[n.name for n in NETWORKS])
FOLDING = {"ResNet-50", "MobileNetV2"}


def build(network: Network) -> tuple[Any, Tensor]:
    with warnings.catch_warnings():
        # of their own imports
        warnings.simplefilter("ignore")
        pytest.importorskip(network.package)
        torch.manual_seed(20)
        model = network.build(True)
    x = torch.randn(network.small)
    # running statistics as training leaves them, and weights and biases that are not 1 and 0
    with torch.no_grad():
        for _ in range(3):
            model.train()(torch.randn(network.small))
    for _, layer in norms_of(model):
        state = {name: b.clone() for name, b in layer.named_buffers()}
        randomize(layer)
        for parameter in layer.parameters():
            parameter.data.mul_(0.3).add_(0.7)
        layer.load_state_dict(state, strict=False)
    return model.eval(), x


def outputs(model: Module, x: Tensor, grad: Tensor | None = None) -> list[Tensor]:
    """Output and gradients, in training mode, of a copy."""
    model = copy.deepcopy(model).train()
    for module in model.modules():
        if isinstance(module, torch.nn.modules.dropout._DropoutNd):
            module.p = 0.0
    y = first_tensor(model(x))
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(3)))
    return [y.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


@EVERY
def test_converted(network: Network) -> None:
    model, x = build(network)
    count = len(norms_of(model))
    assert count >= 5
    kinds = [type(m) for m in model.modules()]
    wanted, exact = outputs(model, x), outputs(copy.deepcopy(model).double(), x.double())
    truenorm.convert(model)
    ours = sum(type(m).__module__ == "truenorm.nn" for m in model.modules())
    assert ours == count
    found = outputs(model, x)
    assert len(found) == len(wanted)
    whole = torch.cat([g.flatten() for g in exact[1:]]).norm().item()
    for a, b, e in zip(found, wanted, exact, strict=True):
        # no worse than torch against float64, but for chance; some gradients are all rounding
        bound = 4.0 * (b.double() - e).norm().item() + 1e-6 * max(e.norm().item(), 1e-2 * whole)
        assert (a.double() - e).norm().item() <= bound
    with torch.no_grad():
        y = first_tensor(model(x))
        assert [type(m) for m in truenorm.revert(model).modules()] == kinds
        assert relative(y, first_tensor(model(x))) < FLOAT32_BETWEEN


@EVERY
def test_inspected_and_compared(network: Network, tmp_path: Path) -> None:
    model, x = build(network)
    result = truenorm.inspect(model, x)
    assert [t.name for t in result.layers] == [name for name, _ in norms_of(model)] or (
        {t.name for t in result.layers} | set(result.not_called) == {n for n, _ in norms_of(model)}
    )
    assert all(t.torch_error is not None and t.truenorm_error < 2e-5 for t in result.layers)
    pytest.importorskip("plotly")
    result.save(tmp_path / "page.html")
    assert (tmp_path / "page.html").stat().st_size < 5e6
    c = truenorm.compare(model, truenorm.convert(copy.deepcopy(model)), x)
    assert c.first is None
    assert len(c.layers) > len(result.layers)


@pytest.mark.parametrize(
    "network", [n for n in NETWORKS if n.name in FOLDING], ids=sorted(FOLDING, reverse=True)
)
def test_folded(network: Network) -> None:
    model, x = build(network)
    result = truenorm.fold(model, x)
    assert not result.kept
    assert len(result.folded) == len(norms_of(model))
    assert not norms_of(result.model)
    assert result.error is not None
    assert result.error < 1e-5
    assert truenorm.compare(model, result.model, x).first is None


@pytest.mark.parametrize("name", ["ResNet-50", "ViT", "BasicUNet"])
def test_exported(name: str, tmp_path: Path) -> None:
    from test_export import in_onnxruntime

    class First(Module):
        def __init__(self, model: Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            return first_tensor(self.model(x))

    network = next(n for n in NETWORKS if n.name == name)
    model, x = build(network)
    truenorm.convert(model)
    y, _ = in_onnxruntime(First(model).eval(), x, tmp_path / "net.onnx")
    with torch.no_grad():
        assert relative(y, first_tensor(model(x))) < 10 * FLOAT32_BETWEEN


def test_the_benchmark_judges_and_times(monkeypatch: pytest.MonkeyPatch) -> None:
    network = next(n for n in NETWORKS if n.name == "BasicUNet")
    pytest.importorskip(network.package)
    small = network._replace(build=lambda _: network.build(True), shape=network.small)
    plan = Plan(minimum=2, maximum=2, seconds=0.0)
    step = models.measure(small, plan)
    assert not step.wrong
    assert set(step.seconds) == {"torch", "truenorm", "fused", "ceiling"}
    assert step.gain is not None
    assert models.line(step).startswith("BasicUNet ")
    assert not norms_of(without_norms(network.build(True)))

    def broken(model: Any) -> Any:
        truenorm.convert(model)
        next(m for _, m in norms_of(model)).eps = 0.1
        return model

    monkeypatch.setattr(models, "convert", broken)
    wrong = models.measure(small, plan)
    assert "of float64, torch's by" in wrong.wrong
    assert "WRONG, not timed" in models.line(wrong)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--layer", "LayerNorm"], "--layer is of layers: leave it out with --models"),
        (["--chart", "x.png"], "--chart is of layers"),
        (["--dtype", "bfloat16"], "--models takes float32"),
        (["--threads", "1", "2"], "one number of --threads"),
    ],
)
def test_options_of_the_benchmark(argv: list[str], message: str, capsys: Any) -> None:
    assert main(["bench", "--models", *argv]) == 2
    assert message in capsys.readouterr().err


def test_the_benchmark_of_networks(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    network = next(n for n in NETWORKS if n.name == "BasicUNet")
    pytest.importorskip(network.package)
    small = network._replace(build=lambda _: network.build(True), shape=network.small)
    missing = network._replace(name="Other", package="no_such_package")
    monkeypatch.setattr(models, "NETWORKS", (small, missing))
    before = torch.get_num_threads()
    path = tmp_path / "models.json"
    argv = ["bench", "--models", "--quick", "--threads", "1", "--json", str(path)]
    assert main(argv) == 0
    assert torch.get_num_threads() == before
    out = capsys.readouterr().out
    assert "Other        left out: pip install no_such_package" in out
    (found,) = json.loads(path.read_text())["models"]
    assert found["network"] == "BasicUNet"
    seconds = found["median_seconds"]
    way = seconds["torch"] - seconds["ceiling"]
    if way > 0.0:
        expected = (seconds["torch"] - seconds["truenorm"]) / way
        assert found["share_of_the_way"] == pytest.approx(expected)
        expected = (seconds["torch"] - seconds["fused"]) / way
        assert found["share_of_the_way_fused"] == pytest.approx(expected)
