"""torch.compile, export, fx, fake and meta tensors, autocast: no graph break, the same bits."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from cases import CASES, IDS, Case, run
from checking import same_layout
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import truenorm
import truenorm.functional as F

EVERY = pytest.mark.parametrize("case", CASES, ids=IDS)
MODES = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
SOME = [CASES[2], CASES[5], CASES[10]]
CUMULATIVE = Case("BatchNorm2d", (5,), {"momentum": None}, (3, 5, 7, 9))


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    with warnings.catch_warnings():
        # torch's own compiler uses what its own next version will not have
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        yield
    torch.compiler.reset()


def assert_equal(actual: Any, expected: Any) -> None:
    for one, other in zip(actual, expected, strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other)


def assert_same_training(case: Case, backend: str, training: bool, **options: Any) -> None:
    """Compiled and eager: the same bits of output, gradients and state, over three steps."""
    eager = case.build().train(training)
    other = copy.deepcopy(eager)
    compiled = torch.compile(other, fullgraph=True, backend=backend, **options)
    for _ in range(3):
        x, grad = case.input(offset=3.0), torch.randn(case.shape)
        expected = run(eager, x, grad)
        at = x.clone().requires_grad_()
        y = compiled(at)
        parameters = dict(other.named_parameters())
        found = torch.autograd.grad(y, [at, *parameters.values()], grad)
        assert_equal((y, found[0]), (expected.output, expected.input))
        for name, gradient in zip(parameters, found[1:], strict=True):
            assert torch.equal(gradient, getattr(expected, name)), name
        assert_equal(other.state_dict().values(), eager.state_dict().values())


@MODES
@pytest.mark.parametrize("case", [*CASES, CUMULATIVE], ids=[*IDS, "cumulative"])
def test_aot_eager(case: Case, training: bool) -> None:
    assert_same_training(case, "aot_eager", training)


@pytest.mark.parametrize("case", [CUMULATIVE, CASES[6], CASES[11]], ids=lambda case: case.layer)
def test_inductor(case: Case) -> None:
    assert_same_training(case, "inductor", training=True)


@pytest.mark.parametrize("layout", ["channels_last", "sliced"])
def test_compiled_layouts(layout: str) -> None:
    from cases import LAYOUTS

    layer = CASES[2].build()
    compiled = torch.compile(copy.deepcopy(layer), fullgraph=True, backend="aot_eager")
    x = LAYOUTS[layout](CASES[2].input())
    y, expected = compiled(x), layer(x)
    assert torch.equal(y, expected)
    assert same_layout(y, expected)


@pytest.mark.parametrize("case", [*SOME, CASES[9], CASES[13]], ids=lambda case: case.layer)
def test_a_dynamic_batch(case: Case) -> None:
    eager = case.build()
    other = copy.deepcopy(eager)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(other, fullgraph=True, backend=counter)
    for batch in (3, 5, 8):
        x = torch.randn(batch, *case.shape[1:], requires_grad=True)
        torch._dynamo.mark_dynamic(x, 0)
        grad = torch.randn(x.shape)
        y, expected = compiled(x), eager(x)
        assert torch.equal(y, expected)
        assert_equal(torch.autograd.grad(y, [x], grad), torch.autograd.grad(expected, [x], grad))
        assert_equal(other.state_dict().values(), eager.state_dict().values())
    assert counter.frame_count == 1


def test_compiled_in_a_network_with_a_second_mode() -> None:
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 5, 3), CASES[2].build(), torch.nn.ReLU(), truenorm.GroupNorm(5, 5)
    )
    other = copy.deepcopy(net)
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    for training in (True, False, True):
        x = torch.randn(2, 3, 9, 7)
        assert torch.equal(compiled.train(training)(x), net.train(training)(x))


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
@EVERY
def test_export(case: Case, strict: bool) -> None:
    layer, x = case.build().eval(), case.input()
    program = torch.export.export(layer, (x,), strict=strict)
    assert torch.equal(program.module()(x), layer(x))
    called = {str(n.target) for n in program.graph.nodes if n.op == "call_function"}
    assert any(name.startswith("truenorm.") for name in called)


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
@pytest.mark.parametrize(
    "case", [CASES[2], CUMULATIVE, CASES[5]], ids=["batch", "cumulative", "instance"]
)
def test_export_for_training(case: Case, strict: bool) -> None:
    layer, x = case.build(), case.input()
    program = torch.export.export(copy.deepcopy(layer), (x,), strict=strict).module()
    for _ in range(2):
        x = case.input(offset=2.0)
        assert torch.equal(program(x), layer(x))
        # a strict export leaves out what is not read, as InstanceNorm's num_batches_tracked
        state = dict(program.named_buffers())
        assert {"running_mean", "running_var"} <= state.keys()
        for name, value in state.items():
            assert torch.equal(layer.get_buffer(name), value), name


def test_export_with_a_dynamic_batch() -> None:
    layer = CASES[2].build().eval()
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(layer, (CASES[2].input(),), dynamic_shapes=({0: batch},))
    x = torch.randn(11, 5, 7, 9)
    assert torch.equal(program.module()(x), layer(x))


@EVERY
def test_make_fx(case: Case) -> None:
    layer, x = case.build().eval(), case.input()
    grad = torch.randn(case.shape)

    def step(x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.detach().requires_grad_()
        y = layer(x)
        return y, torch.autograd.grad(y, x, grad)[0]

    traced = make_fx(step)(x)
    other = case.input()
    assert_equal(traced(other), step(other))


@MODES
@EVERY
def test_fake_tensors(case: Case, training: bool) -> None:
    with FakeTensorMode() as mode:
        layer = case.build().train(training)
        y = layer(mode.from_tensor(case.input()))
    x = case.input()
    real = case.build().train(training)(x)
    assert y.dtype == real.dtype
    assert same_layout(y, real)


@MODES
@EVERY
def test_meta_device(case: Case, training: bool) -> None:
    layer = case.build()
    on_meta = copy.deepcopy(layer).to("meta").train(training)
    x = case.input().to("meta").requires_grad_()
    y = on_meta(x)
    assert y.is_meta
    assert y.shape == case.shape
    (gradient,) = torch.autograd.grad(y, x, torch.empty_like(y))
    assert gradient.is_meta
    assert gradient.shape == case.shape
    restored = on_meta.to_empty(device="cpu")
    restored.load_state_dict(layer.state_dict())
    x = case.input()
    assert torch.equal(restored(x), layer.train(training)(x))


@EVERY
def test_symbolic_trace_keeps_layers_whole(case: Case) -> None:
    net = torch.nn.Sequential(case.build(), torch.nn.ReLU(), case.build())
    traced = fx.symbolic_trace(net)
    calls = [n.target for n in traced.graph.nodes if n.op == "call_module"]
    assert calls == ["0", "1", "2"]
    for training in (True, False):
        x = case.input()
        expected = copy.deepcopy(net).train(training)(x)
        assert torch.equal(copy.deepcopy(traced).train(training)(x), expected)


def test_symbolic_trace_of_a_functional_call() -> None:
    class Net(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.group_norm(torch.relu(x), 2) + 1.0

    traced, x = fx.symbolic_trace(Net()), torch.randn(2, 6, 5)
    assert F.group_norm in [n.target for n in traced.graph.nodes]
    assert torch.equal(traced(x), Net()(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", [*CASES, CASES[13]._replace(shape=(2, 5, 7))], ids=[*IDS, "3D"])
def test_autocast_dtypes_as_torch(case: Case, dtype: torch.dtype) -> None:
    ours, theirs = case.pair()
    for of_input in (torch.float32, dtype):
        x = case.input(of_input)
        with torch.autocast("cpu", dtype=dtype), warnings.catch_warnings():
            # torch's RMSNorm says that it has no fast path for a half input and float32 parameters
            warnings.filterwarnings("ignore", "Mismatch dtype between input and weight")
            y, expected = ours(x), theirs(x)
        assert y.dtype == expected.dtype
        torch.testing.assert_close(y, expected, rtol=0.02, atol=0.02)


def test_autocast_in_a_network() -> None:
    ours = torch.nn.Sequential(torch.nn.Conv2d(3, 5, 3), CASES[2].build(), torch.nn.Conv2d(5, 3, 1))
    theirs = truenorm.revert(copy.deepcopy(ours))
    x = torch.randn(2, 3, 9, 7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, expected = ours(x), theirs(x)
    assert y.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected, rtol=0.02, atol=0.03)
    grad = torch.randn(y.shape).bfloat16()
    for one, other in zip(
        torch.autograd.grad(y, list(ours.parameters()), grad),
        torch.autograd.grad(expected, list(theirs.parameters()), grad),
        strict=True,
    ):
        assert one.dtype == other.dtype == torch.float32
