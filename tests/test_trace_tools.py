"""What is built on tracing: the older ONNX exporter, TensorBoard, autocast, fuse, make_fx."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import CASES, IDS, Case, randomize
from test_convert import ResNet
from test_trace import IMAGES, OPTIONS, Calling, batch, instance, random, second
from tolerances import FLOAT32_BETWEEN, relative
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from tracing import assert_follows, assert_standard, trace, twins

import truenorm

pytestmark = pytest.mark.filterwarnings(r"ignore:`torch\.jit\.:DeprecationWarning")
EVERY = pytest.mark.parametrize("case", CASES, ids=IDS)


def network(**options: Any) -> Any:
    """Without biases before norms, whose gradients would be roundings of zero."""
    return nn.Sequential(
        nn.Conv2d(5, 5, 1, bias=False),
        batch(**options),
        nn.ReLU(),
        nn.Conv2d(5, 5, 3, bias=False),
        instance(),
        nn.GELU(),
    )


# ---------------------------------------------------------------- ONNX by torch.jit.trace


def in_onnxruntime(model: Any, inputs: tuple[Tensor, ...], path: Path) -> tuple[Tensor, set[str]]:
    """Output of the file that the older exporter writes, and the operators in it."""
    onnx = pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own deprecation
        torch.onnx.export(model, inputs, str(path), dynamo=False, opset_version=18)
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    nodes = onnx.load(str(path)).graph.node
    assert {node.domain for node in nodes} <= {""}
    given = {one.name: x.numpy() for one, x in zip(session.get_inputs(), inputs, strict=True)}
    (output,) = session.run(None, given)
    return torch.from_numpy(output), {node.op_type for node in nodes}


@EVERY
def test_onnx(case: Case, tmp_path: Path) -> None:
    layer, x = case.build().eval(), case.input()
    y, _ = in_onnxruntime(layer, (x,), tmp_path / "layer.onnx")
    assert relative(y, layer(x)) < FLOAT32_BETWEEN


@pytest.mark.parametrize("option", OPTIONS)
def test_onnx_of_options(option: str, tmp_path: Path) -> None:
    x = random((3, 7, 5, 9) if option == "channel_axis" else IMAGES[0])
    layer = OPTIONS[option]().eval()
    y, _ = in_onnxruntime(layer, (x,), tmp_path / "layer.onnx")
    assert relative(y, layer(x)) < FLOAT32_BETWEEN


@pytest.mark.parametrize("kind", ["mask", "residual"])
def test_onnx_of_a_second_tensor(kind: str, tmp_path: Path) -> None:
    x = random(IMAGES[0])
    model = Calling(instance(activation="relu"), kind).eval()
    inputs = (x, second(x, kind))
    y, _ = in_onnxruntime(model, inputs, tmp_path / "layer.onnx")
    assert relative(y, model(*inputs)) < FLOAT32_BETWEEN


def test_onnx_of_a_network(tmp_path: Path) -> None:
    model, x = truenorm.convert(randomize(ResNet())).eval(), torch.randn(2, 3, 8, 8)
    y, _ = in_onnxruntime(model, (x,), tmp_path / "net.onnx")
    assert relative(y, model(x)) < FLOAT32_BETWEEN


# ---------------------------------------------------------------- others that trace


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_as_tensorboard_does(training: bool) -> None:
    model, x = network().train(training), random(IMAGES[0])
    state = copy.deepcopy(model.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.onnx.select_model_mode_for_export(model, torch.onnx.TrainingMode.EVAL):
            traced = torch.jit.trace(model, (x,), strict=False)
    assert_standard(traced.inlined_graph)
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name
    # what add_graph draws a layer by
    assert "aten::batch_norm" in str(traced.inlined_graph)
    try:
        from torch.utils.tensorboard._pytorch_graph import graph
    except ImportError:
        return
    graph(model, (x,))


def test_a_module_by_its_methods() -> None:
    model, x = network(), random(IMAGES[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        traced = torch.jit.trace_module(copy.deepcopy(model), {"forward": (x,)})
    other = copy.deepcopy(model)
    other.load_state_dict(traced.state_dict())
    assert_follows(traced, other, [(random(shape),) for shape in IMAGES])


@pytest.mark.parametrize("norm", [True, False], ids=["by-layer", "by-function"])
def test_a_function(norm: bool) -> None:
    # torch takes no tensor that requires a gradient for a constant
    layer = batch(activation="relu").eval().requires_grad_(False) if norm else None

    def call(x: Tensor) -> Tensor:
        y = truenorm.functional.group_norm(x, 5)
        return y if layer is None else layer(y)  # type: ignore[no-any-return]

    traced = trace(call, (random(IMAGES[0]),))
    assert_standard(traced.graph)
    x = random(IMAGES[1])
    assert relative(traced(x), call(x)) < FLOAT32_BETWEEN


def test_a_call_past_the_hooks() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = batch()

        def forward(self, x: Tensor) -> Tensor:
            return self.norm.forward(x)  # type: ignore[no-any-return]

    assert_follows(*twins(Net(), (random(IMAGES[0]),)), [(random(IMAGES[1]),)])


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_under_autocast(training: bool) -> None:
    model, x = network().train(training), random(IMAGES[0])
    theirs = truenorm.revert(copy.deepcopy(model))
    with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
        traced, expected = (
            # whose check runs on torch's own layers outside of autocast, too
            trace(copy.deepcopy(m), (x,), check_trace=False)
            for m in (model, theirs)
        )
    assert_standard(traced.inlined_graph)
    x = random(IMAGES[1])
    y, wanted = traced(x), expected(x)
    assert y.dtype == wanted.dtype
    assert relative(y, wanted) < 2**-7


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_fused_model(training: bool) -> None:
    model = truenorm.fuse(network()).train(training)
    assert type(model) is not nn.Sequential
    # the first norm's weight, its running statistics and the second norm are in the trace
    traced, other = twins(model, (random(IMAGES[0]),))
    assert_follows(traced, other, [(random(shape),) for shape in IMAGES])


def test_within_recompute_outputs() -> None:
    with truenorm.recompute_outputs():
        traced, model = twins(network(), (random(IMAGES[0]),))
    assert_follows(traced, model, [(random(IMAGES[1]),)])


def test_after_tracing_the_kernels_serve_again() -> None:
    layer, x = batch(), random(IMAGES[0])
    wanted = copy.deepcopy(layer)(x)
    trace(copy.deepcopy(layer), (x,))
    assert torch.equal(layer(x), wanted)
    with pytest.raises(NotImplementedError, match="virtual_batch_size"):
        trace(batch(virtual_batch_size=2), (x,))
    assert torch.equal(batch(virtual_batch_size=2).eval()(x[:0]), x[:0])


# ---------------------------------------------------------------- graphs of torch.fx


TRAINED: dict[str, Callable[[], Any]] = {
    **OPTIONS,
    "on_single": lambda: batch(on_single="running"),
    "virtual_batch_size": lambda: batch(virtual_batch_size=2),
    "renorm": lambda: batch(renorm=True),
    "momentum-None": lambda: batch(momentum=None),
    "half": lambda: batch().bfloat16(),
}


def called(graph: Any) -> set[str]:
    return {str(n.target) for n in graph.nodes if n.op == "call_function"}


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
@pytest.mark.parametrize("option", TRAINED)
def test_export_for_training(option: str, strict: bool) -> None:
    layer = TRAINED[option]()
    shape = (3, 7, 5, 9) if option == "channel_axis" else IMAGES[0]
    dtype = torch.bfloat16 if option == "half" else torch.float32
    within = FLOAT32_BETWEEN if dtype == torch.float32 else 2**-7
    with truenorm.standard_ops():
        exported = torch.export.export(
            copy.deepcopy(layer), (random(shape).to(dtype),), strict=strict
        )
    assert not any("truenorm" in name for name in called(exported.graph))
    program = exported.module()
    for _ in range(2):
        x = random(shape).to(dtype)
        assert relative(program(x), layer(x)) < within
        for name, value in program.named_buffers():
            if "num_batches" not in name or "instance" not in option:
                assert relative(value, layer.get_buffer(name)) < FLOAT32_BETWEEN, name


@EVERY
def test_make_fx(case: Case) -> None:
    layer, x = case.build(), case.input()
    with truenorm.standard_ops():
        traced = make_fx(copy.deepcopy(layer))(x)
        assert torch.equal(copy.deepcopy(layer)(x), copy.deepcopy(layer)(x))
    assert not any("truenorm" in name for name in called(traced.graph))
    x = case.input()
    assert relative(traced(x), layer(x)) < FLOAT32_BETWEEN
