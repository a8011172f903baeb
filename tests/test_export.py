"""Files that run without truenorm: ONNX in onnxruntime, torch.export and AOTInductor, torch.ao."""

from __future__ import annotations

import copy
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import CASES, IDS, Case, randomize
from test_convert import ResNet, UNet
from tolerances import FLOAT32_BETWEEN, relative
from torch import Tensor, nn
from torch.nn import Module

import truenorm

EVERY = pytest.mark.parametrize("case", CASES, ids=IDS)
ONNX = {
    "BatchNorm": {"BatchNormalization"},
    "SyncBatch": {"BatchNormalization"},
    "InstanceN": {"InstanceNormalization"},
    "GroupNorm": {"InstanceNormalization"},
    "LayerNorm": {"LayerNormalization"},
}


def in_onnxruntime(model: Module, x: Tensor, path: Path) -> tuple[Tensor, set[str]]:
    """Output of the exported file, and the operators in it."""
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package)
    runtime = pytest.importorskip("onnxruntime")
    with warnings.catch_warnings():
        # torch's exporter warns of its own deprecated parts
        warnings.simplefilter("ignore")
        program = torch.onnx.export(model, (x,), dynamo=True, verbose=False)
    assert program is not None
    program.save(path)
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = {node.op_type for node in program.model.graph}
    # nothing but ONNX's own
    assert {node.domain for node in program.model.graph} == {""}
    (output,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    return torch.from_numpy(output), names


@EVERY
def test_onnx(case: Case, tmp_path: Path) -> None:
    layer, x = case.build().eval(), case.input()
    y, names = in_onnxruntime(layer, x, tmp_path / "layer.onnx")
    assert relative(y, layer(x)) < FLOAT32_BETWEEN
    wanted = ONNX.get(case.layer[:9], set())
    # tracked statistics are a BatchNorm's in evaluation, and torch's own export drops them
    if case.kwargs.get("track_running_stats"):
        wanted = {"BatchNormalization"}
    assert wanted <= names


@pytest.mark.parametrize("net", [ResNet, UNet])
def test_onnx_of_networks(net: Any, tmp_path: Path) -> None:
    model, x = truenorm.convert(randomize(net())).eval(), torch.randn(2, 3, 8, 8)
    y, _ = in_onnxruntime(model, x, tmp_path / "net.onnx")
    assert relative(y, model(x)) < FLOAT32_BETWEEN


def operators(program: Any) -> set[str]:
    return {str(n.target) for n in program.graph.nodes if n.op == "call_function"}


@EVERY
def test_export_of_standard_operators(case: Case) -> None:
    layer, x = case.build().eval(), case.input()
    with truenorm.standard_ops():
        program = torch.export.export(layer, (x,))
    assert not any("truenorm" in name for name in operators(program))
    assert relative(program.module()(x), layer(x)) < FLOAT32_BETWEEN
    # and only then
    after = torch.export.export(layer, (x,))
    assert any("truenorm" in name for name in operators(after))
    assert torch.equal(after.module()(x), layer(x))


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
@pytest.mark.parametrize("case", [CASES[2], CASES[5]], ids=["batch", "instance"])
def test_export_for_training(case: Case, strict: bool) -> None:
    layer = case.build()
    with truenorm.standard_ops():
        exported = torch.export.export(copy.deepcopy(layer), (case.input(),), strict=strict)
    assert not any("truenorm" in name for name in operators(exported))
    program = exported.module()
    for _ in range(2):
        x = case.input(offset=2.0)
        assert relative(program(x), layer(x)) < FLOAT32_BETWEEN
        for name, value in program.named_buffers():
            if "num_batches" not in name or case.layer.startswith("Batch"):
                assert relative(value, layer.get_buffer(name)) < FLOAT32_BETWEEN, name


def test_half_precision_with_wide_statistics() -> None:
    layer = randomize(truenorm.BatchNorm2d(5)).eval().bfloat16()
    assert layer.running_var.dtype == torch.float32
    x = torch.randn(3, 5, 7, 9).bfloat16()
    with truenorm.standard_ops():
        program = torch.export.export(layer, (x,))
    assert relative(program.module()(x), layer(x)) < 2**-7


def test_eager_calls_stay_truenorms() -> None:
    layer, x = CASES[2].build(), CASES[2].input()
    wanted = copy.deepcopy(layer)(x)
    with truenorm.standard_ops():
        assert torch.equal(layer(x), wanted)

    def leave() -> None:
        with truenorm.standard_ops():
            raise KeyError("left")

    with pytest.raises(KeyError, match="left"):
        leave()
    assert not truenorm._core.exporting._asked


ALONE = """
import sys, torch
sys.modules["truenorm"] = None  # whoever imports it now fails
model = torch._inductor.aoti_load_package(sys.argv[1])
x, y = torch.load(sys.argv[2])
error = ((model(x) - y).norm() / y.norm()).item()
assert error < 2e-5, error
print("done")
"""


def test_aot_inductor_without_truenorm(tmp_path: Path) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3),
        truenorm.BatchNorm2d(6),
        truenorm.InstanceNorm2d(6, track_running_stats=True),
        truenorm.GroupNorm(2, 6),
    )
    randomize(model).eval()
    x = torch.randn(2, 3, 9, 9)
    with truenorm.standard_ops(), torch.no_grad():
        program = torch.export.export(model, (x,))
        y = model(x)
    with warnings.catch_warnings():
        # torch's own deprecated parts
        warnings.simplefilter("ignore")
        package = torch._inductor.aoti_compile_and_package(
            program, package_path=str(tmp_path / "model.pt2")
        )
    torch.save((x, y), tmp_path / "xy.pt")
    done = subprocess.run(
        [sys.executable, "-c", ALONE, package, str(tmp_path / "xy.pt")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.stdout.strip() == "done", done.stderr
