"""Norms in graphs that Inductor compiles: joined with what follows, own operators, in place."""

from __future__ import annotations

import copy
import operator
import pickle
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code
from torch.fx import GraphModule
from torch.library import opcheck

import truenorm
from truenorm._core.call import ACT, KEEP
from truenorm._core.graphs import nodes, options


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    before = truenorm.compile_options()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        yield
    truenorm.compile_options(**before._asdict())
    torch.compiler.reset()


def changed(call: Callable[..., Any], *args: Any, dynamic: bool = False) -> list[torch.fx.Node]:
    """The nodes of a call's graph once each norm has its form."""
    found: list[torch.fx.Node] = []

    def backend(module: GraphModule, inputs: Any) -> Any:
        options.change(module.graph)
        found.extend(module.graph.nodes)
        module.recompile()
        return module

    torch.compile(call, backend=backend, fullgraph=True, dynamic=dynamic)(*args)
    torch.compiler.reset()
    return found


def forms(found: list[torch.fx.Node]) -> list[tuple[int, bool]]:
    """Of each norm that is left: the activation's number, and whether a residual is taken in."""
    ours = (torch.ops.truenorm.norm.default, torch.ops.truenorm.norm_.default)
    return [
        (int(n.args[nodes.BITS]) >> ACT & 0xFF, n.args[nodes.RESIDUAL] is not None)  # type: ignore[arg-type]
        for n in found
        if n.target in ours
    ]


class Block(nn.Module):
    """ResNet's: sums of another module's norm, in place."""

    def __init__(self, norm: Callable[[int], nn.Module], act: nn.Module) -> None:
        super().__init__()
        self.conv = nn.Conv2d(6, 6, 3, padding=1)
        self.inner = nn.Sequential(norm(6), act, nn.Conv2d(6, 6, 1), norm(6))
        self.shortcut = nn.Sequential(nn.Conv2d(6, 6, 1), norm(6))
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(self.conv(x))
        y += self.shortcut(x)
        return self.act(y)


BLOCKS: dict[str, tuple[Callable[[int], nn.Module], nn.Module, int]] = {
    "batch, relu": (truenorm.BatchNorm2d, nn.ReLU(inplace=True), 1),
    "batch, relu6": (truenorm.BatchNorm2d, nn.ReLU6(inplace=True), 8),
    "instance, leaky relu": (
        lambda c: truenorm.InstanceNorm2d(c, affine=True),
        nn.LeakyReLU(0.2),
        2,
    ),
    "group, silu": (lambda c: truenorm.GroupNorm(3, c), nn.SiLU(), 5),
    "batch, gelu": (truenorm.BatchNorm2d, nn.GELU("tanh"), 7),
    "batch, elu": (truenorm.BatchNorm2d, nn.ELU(0.7), 4),
    "batch, hardswish": (truenorm.BatchNorm2d, nn.Hardswish(inplace=True), 3),
}


def randomized(module: nn.Module) -> nn.Module:
    for p in module.parameters():
        nn.init.normal_(p)
    return module


def assert_trains_as_float64(model: nn.Module, x: Tensor, tolerance: float) -> None:
    """Compiled, against the same model in float64: outputs, gradients and state, of three steps."""
    wide = copy.deepcopy(model).double()
    compiled = torch.compile(model, fullgraph=True)
    for _ in range(3):
        at = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        of_wide = x.detach().double().requires_grad_()
        y, z = compiled(at), wide(of_wide)
        grad = torch.randn(y.shape)
        found = torch.autograd.grad(y, [at, *model.parameters()], grad)
        wanted = torch.autograd.grad(z, [of_wide, *wide.parameters()], grad.double())
        for one, other in zip((y, *found), (z, *wanted), strict=True):
            scale = max(other.abs().max().item(), 1.0)
            assert (one - other).abs().max().item() <= tolerance * scale
    for one, other in zip(model.buffers(), wide.buffers(), strict=True):
        torch.testing.assert_close(one.double(), other.double(), rtol=1e-5, atol=1e-5)


# two layouts, in turn: a compilation takes seconds
@pytest.mark.parametrize(("name", "channels_last"), [(n, i % 2 == 0) for i, n in enumerate(BLOCKS)])
def test_a_sum_of_another_module_is_joined(name: str, channels_last: bool) -> None:
    norm, act, number = BLOCKS[name]
    model = randomized(Block(norm, act))
    x = torch.randn(3, 6, 7, 5)
    if channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        x = x.contiguous(memory_format=torch.channels_last)
    assert forms(changed(copy.deepcopy(model), x)) == [(number, False), (0, False), (number, True)]
    assert_trains_as_float64(model, x, 2e-5)


def test_relu_joined_has_eager_bits() -> None:
    model = randomized(nn.Sequential(truenorm.BatchNorm2d(5), nn.ReLU(), truenorm.GroupNorm(5, 5)))
    x, grad = torch.randn(4, 5, 6, 7), torch.randn(4, 5, 6, 7)
    other = copy.deepcopy(model)
    y, z = model(x), torch.compile(other, fullgraph=True)(x)
    assert torch.equal(y, z)
    for one, two in zip(
        torch.autograd.grad(y, list(model.parameters()), grad),
        torch.autograd.grad(z, list(other.parameters()), grad),
        strict=True,
    ):
        assert torch.equal(one, two)


LEFT: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "its output is used twice": lambda m, x: F.relu(y := m(x)) * y,
    "the sum is broadcast": lambda m, x: F.relu(m(x) + x[:1]),
    "the sum is of another dtype": lambda m, x: F.relu(m(x) + x.double()),
    "the sum is scaled": lambda m, x: F.relu(torch.add(m(x), x, alpha=2)),
    "twice itself": lambda m, x: F.relu((y := m(x)) + y),
    "another slope, a tensor's": lambda m, x: F.prelu(m(x), x.new_tensor([0.1])),
    "another clamp": lambda m, x: F.hardtanh(m(x), -1.0, 1.0),
    "under a mask": lambda m, x: F.relu(m(x, mask=x[:, 0] > 0)),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_is_not_the_kernels_formula_is_left(name: str) -> None:
    layer, x = randomized(truenorm.InstanceNorm2d(4, affine=True)), torch.randn(3, 4, 5, 6)
    call = LEFT[name]
    assert all(form == (0, False) for form in forms(changed(lambda t: call(layer, t), x)))
    found = torch.compile(lambda t: call(layer, t), fullgraph=True)(x)
    torch.testing.assert_close(found, call(layer, x))


def test_what_is_written_to_in_between_is_read_before() -> None:
    layer = randomized(truenorm.BatchNorm2d(4))

    def call(x: Tensor) -> tuple[Tensor, Tensor]:
        h = x * 2.0
        y = layer(h)
        h.mul_(3.0)
        return F.relu(y + h), h

    x = torch.randn(3, 4, 5, 6)
    other = copy.deepcopy(layer)
    h = x * 2.0
    expected = F.relu(other(h) + 3.0 * h)
    assert forms(changed(call, x)) == [(0, False)]
    layer.load_state_dict(copy.deepcopy(other.state_dict()))
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(call, fullgraph=True)(x)[0], expected)


def test_a_layer_called_twice_moves_its_statistics_in_order() -> None:
    layer = randomized(truenorm.BatchNorm2d(4))
    other = copy.deepcopy(layer)

    def call(m: nn.Module, x: Tensor) -> Tensor:
        y = m(x)
        return F.relu(y + m(2.0 * x - 1.0))

    x = torch.randn(3, 4, 5, 6)
    torch.compile(call, fullgraph=True)(layer, x)
    call(other, x)
    for one, two in zip(layer.buffers(), other.buffers(), strict=True):
        assert torch.equal(one, two)


def test_joined_for_sizes_that_are_not_known() -> None:
    layer = randomized(truenorm.BatchNorm2d(6))

    def call(x: Tensor) -> Tensor:
        return F.relu(layer(x) + x)

    assert forms(changed(call, torch.randn(3, 6, 7, 5), dynamic=True)) == [(1, True)]
    compiled = torch.compile(call, dynamic=True, fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):  # type: ignore[attr-defined]
        for shape in ((3, 6, 7, 5), (5, 6, 9, 4), (2, 6, 8, 8)):
            x = torch.randn(shape)
            torch.testing.assert_close(compiled(x), call(x), rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------- the compiler's own operators

OWN: list[tuple[Callable[[], nn.Module], tuple[int, ...]]] = [
    (lambda: truenorm.BatchNorm2d(6), (3, 6, 5, 4)),
    (lambda: truenorm.BatchNorm1d(6, affine=False), (7, 6)),
    (lambda: truenorm.BatchNorm2d(6, momentum=None, activation="gelu"), (3, 6, 5, 4)),
    (lambda: truenorm.InstanceNorm2d(6, affine=True), (3, 6, 5, 4)),
    (lambda: truenorm.InstanceNorm1d(6, track_running_stats=True), (3, 6, 9)),
    (lambda: truenorm.GroupNorm(3, 6), (3, 6, 5, 4)),
    (lambda: truenorm.GroupNorm(1, 6), (3, 6, 11)),
    (lambda: truenorm.LayerNorm((5, 4)), (3, 6, 5, 4)),
    (lambda: truenorm.LayerNorm(9, bias=False), (4, 9)),
    (lambda: truenorm.RMSNorm(9), (4, 3, 9)),
]


# in evaluation those that have running statistics
@pytest.mark.parametrize(
    ("number", "training"), [*((n, True) for n in range(len(OWN))), (0, False), (4, False)]
)
def test_a_small_norm_is_the_compilers_own(number: int, training: bool) -> None:
    truenorm.compile_options(own=1000)
    make, shape = OWN[number]
    layer = randomized(make()).train(training)
    x = torch.randn(shape) + 1e4 * (training and "RMS" not in type(layer).__name__)
    assert forms(changed(copy.deepcopy(layer), x)) == []
    assert_trains_as_float64(layer, x, 3e-6)


def test_half_precision_is_rounded_once() -> None:
    truenorm.compile_options(own=1000)
    layer = randomized(truenorm.LayerNorm(33)).bfloat16()
    x = torch.randn(5, 33).bfloat16()
    y = torch.compile(layer, fullgraph=True)(x)
    exact = copy.deepcopy(layer).double()(x.double())
    assert torch.equal(y, exact.bfloat16())


def test_only_norms_of_at_most_so_many_values() -> None:
    truenorm.compile_options(own=120)
    layer = truenorm.GroupNorm(3, 6)
    assert forms(changed(layer, torch.randn(2, 6, 10))) == []
    assert forms(changed(layer, torch.randn(2, 6, 11))) == [(0, False)]
    # nor where their number is not known
    assert forms(changed(layer, torch.randn(2, 6, 10), dynamic=True)) == [(0, False)]


# ---------------------------------------------------------------- in place


def test_inference_writes_over_what_nobody_else_sees() -> None:
    model = randomized(Block(lambda c: truenorm.GroupNorm(2, c), nn.ReLU())).eval()
    x = torch.randn(3, 6, 7, 5)
    with torch.no_grad():
        targets = [n.target for n in changed(copy.deepcopy(model), x)]
        # what the graph gives back is new memory
        assert targets.count(torch.ops.truenorm.norm_.default) == 2
        assert targets.count(torch.ops.truenorm.norm.default) == 1
        before = x.clone()
        torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), model(x))
        assert torch.equal(x, before)


def test_an_input_or_a_shared_tensor_is_not_written_over() -> None:
    layer = randomized(truenorm.InstanceNorm2d(4, affine=True)).eval()
    conv = nn.Conv2d(4, 4, 1)

    def shares(x: Tensor) -> Tensor:
        h = conv(x)
        return layer(h).sin() + h

    x = torch.randn(3, 4, 5, 6)
    with torch.no_grad():
        for call in (layer, shares, lambda t: layer(t.view(3, 4, 6, 5)).sin()):
            found = [n.target for n in changed(call, x)]
            assert torch.ops.truenorm.norm_.default not in found
        torch.testing.assert_close(torch.compile(shares, fullgraph=True)(x), shares(x))


@pytest.mark.parametrize("norm", [truenorm.BatchNorm2d, lambda c: truenorm.GroupNorm(2, c)])
def test_training_is_never_in_place(norm: Callable[[int], nn.Module]) -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 1), norm(4), nn.Conv2d(4, 4, 1))
    found = [n.target for n in changed(model, torch.randn(3, 4, 5, 6))]
    assert torch.ops.truenorm.norm.default in found
    assert torch.ops.truenorm.norm_.default not in found


# ---------------------------------------------------------------- below autograd


def _called(code: list[str], name: str) -> int:
    return "\n".join(code).count(f"torch.ops.truenorm.{name}.default(")


@pytest.mark.parametrize("training", [True, False])
def test_compiled_code_calls_what_autograd_does_not_see(training: bool) -> None:
    layer = randomized(truenorm.LayerNorm(7))
    x = torch.randn(4, 7, requires_grad=training)
    leaves = [x, *layer.parameters()]

    def step() -> list[Tensor]:
        with torch.set_grad_enabled(training):
            y = torch.compile(layer, fullgraph=True)(x)
        return [y, *(torch.autograd.grad(y, leaves, torch.ones_like(y)) if training else ())]

    found, code = run_and_get_code(step)
    assert _called(code, "norm") == _called(code, "norm_backward") == 0
    assert _called(code, "norm_below") == 1
    assert _called(code, "norm_backward_below") == int(training)
    y = layer(x)
    right = [y, *(torch.autograd.grad(y, leaves, torch.ones_like(y)) if training else ())]
    assert all(map(torch.equal, found, right))


def test_operators_below_autograd() -> None:
    x, weight, bias = torch.randn(3, 4, 5), torch.randn(4), torch.randn(4)
    ours = torch.ops.truenorm
    call = x, weight, bias, None, None, None, None, KEEP, 1e-5, 0.0, 0.0
    y, record = ours.norm_below(*call)
    assert all(map(torch.equal, (y, record), ours.norm(*call)))
    pulled = y, x, record, weight, None, None, None, None, KEEP | 7, 1e-5, 0.0
    gradients = ours.norm_backward_below(*pulled)
    assert all(map(torch.equal, gradients, ours.norm_backward(*pulled)))
    opcheck(ours.norm_below.default, call)
    opcheck(ours.norm_backward_below.default, pulled)
    # nothing is differentiated from here on
    assert not ours.norm_below(x.requires_grad_(), *call[1:])[0].requires_grad
    with pytest.raises(RuntimeError, match="takes no empty tensor"):
        ours.norm_below(x[:0], *call[1:])
    with pytest.raises(RuntimeError, match="`grad` must have the shape of `x`"):
        ours.norm_backward_below(y[:2], *pulled[1:])


# ---------------------------------------------------------------- the compiler's own loops


def evaluated(layer: Any, offset: float = 0.0) -> Any:
    """The layer in evaluation, with statistics of its own."""
    randomized(layer)
    layer.running_mean.normal_(offset, 2.0)
    layer.running_var.uniform_(0.05, 4.0)
    return layer.eval()


LOOPS: dict[str, tuple[Callable[[], Any], tuple[int, ...]]] = {
    "1d": (lambda: truenorm.BatchNorm1d(6), (5, 6)),
    "1d, no parameters": (lambda: truenorm.BatchNorm1d(7, affine=False), (3, 7, 9)),
    "2d, relu": (lambda: truenorm.BatchNorm2d(19, activation="relu"), (2, 19, 5, 7)),
    "2d, leaky relu": (lambda: truenorm.BatchNorm2d(6, activation="leaky_relu"), (2, 6, 5, 7)),
    "instances": (lambda: truenorm.InstanceNorm2d(5, track_running_stats=True), (2, 5, 3, 4)),
    "3d, relu6": (lambda: truenorm.BatchNorm3d(3, eps=1e-3, activation="relu6"), (2, 3, 4, 3, 5)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", LOOPS)
def test_evaluation_in_the_compilers_loops_has_eager_bits(name: str, dtype: torch.dtype) -> None:
    make, shape = LOOPS[name]
    layer = evaluated(make(), 1000.0).to(dtype)
    compiled = torch.compile(layer, fullgraph=True)
    x = torch.randn(shape, dtype=dtype) * 3.0 + 1000.0
    x[0, 0] = torch.nan
    x[-1, -1] = -torch.inf
    inputs = [x, x.contiguous(memory_format=torch.channels_last)] if x.dim() == 4 else [x]
    for given in inputs:
        with torch.no_grad():
            y, code = run_and_get_code(compiled, given)
            wanted = layer(given)
        assert torch.equal(y.nan_to_num(7.0), wanted.nan_to_num(7.0))
        assert torch.equal(y.isnan(), wanted.isnan())
        assert y.stride() == wanted.stride()
        assert "torch.ops.truenorm" not in "\n".join(code)


def test_loops_take_in_what_stands_around_a_norm() -> None:
    model = randomized(Block(truenorm.BatchNorm2d, nn.ReLU())).eval()
    x = torch.randn(3, 6, 7, 5)
    with torch.no_grad():
        y, code = run_and_get_code(torch.compile(model, fullgraph=True, dynamic=True), x)
        torch.testing.assert_close(y, model(x))
    assert "torch.ops.truenorm" not in "\n".join(code)
    # a sum and an activation of the layer's own
    layer = evaluated(truenorm.BatchNorm2d(6, activation="relu"))
    r = torch.randn(3, 6, 7, 5)
    with torch.no_grad():
        found, code = run_and_get_code(torch.compile(layer, fullgraph=True), x, residual=r)
        assert torch.equal(found, layer(x, residual=r))
    assert "torch.ops.truenorm" not in "\n".join(code)


KERNELS: dict[str, tuple[Callable[[], Any], torch.dtype]] = {
    "half precision": (lambda: truenorm.BatchNorm2d(6), torch.bfloat16),
    "an exponential": (lambda: truenorm.BatchNorm2d(6, activation="silu"), torch.float32),
}


@pytest.mark.parametrize("name", KERNELS)
def test_evaluation_that_loops_do_not_serve_has_eager_bits(name: str) -> None:
    make, dtype = KERNELS[name]
    layer = evaluated(make()).to(dtype)
    x = torch.randn(3, 6, 7, 5, dtype=dtype)
    with torch.no_grad():
        y, code = run_and_get_code(torch.compile(layer, fullgraph=True), x)
        assert torch.equal(y, layer(x))
    assert _called(code, "norm_below") == 1


def test_frozen_statistics_with_a_gradient_stay_an_operator() -> None:
    layer = evaluated(truenorm.BatchNorm2d(6))
    inputs = [torch.randn(3, 6, 7, 5).requires_grad_() for _ in range(2)]
    inputs[1].data.copy_(inputs[0])
    grad = torch.randn(3, 6, 7, 5)
    compiled = torch.compile(layer, fullgraph=True)
    made = []
    for call, x in ((layer, inputs[0]), (compiled, inputs[1])):
        y = call(x)
        made.append([y, *torch.autograd.grad(y, [x, *layer.parameters()], grad)])
    assert all(map(torch.equal, *made))


def test_a_compiler_reads_a_fused_forward_as_written() -> None:
    model = randomized(Block(truenorm.BatchNorm2d, nn.ReLU()))
    fused = truenorm.fuse(copy.deepcopy(model))
    x = torch.randn(3, 6, 7, 5)
    # the graph's own pass finds what fuse has found
    assert forms(changed(fused, x)) == forms(changed(model, x))
    truenorm.compile_options(join=False)
    assert forms(changed(fused, x)) != forms(changed(model, x))


# ---------------------------------------------------------------- options


def test_joining_can_be_turned_off() -> None:
    assert truenorm.compile_options(join=False) == (False, 0)
    model = nn.Sequential(truenorm.BatchNorm2d(4), nn.ReLU())
    assert forms(changed(model, torch.randn(3, 4, 5, 6))) == [(0, False)]


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"join": 1}, TypeError, r"`join` must be True, False or None, but got 1: pass one"),
        ({"own": 1.5}, TypeError, r"`own` must be a number of values, an int, but got 1.5"),
        ({"own": True}, TypeError, r"`own` must be a number of values, an int, but got True"),
        ({"own": -1}, ValueError, r"`own` must be at least 0, but got -1: pass 0 for none"),
    ],
)
def test_wrong_options_change_nothing(given: Any, error: type[Exception], words: str) -> None:
    before = truenorm.compile_options()
    with pytest.raises(error, match=words):
        truenorm.compile_options(**{"join": False, **given})
    assert truenorm.compile_options() == before


def test_a_pass_of_the_users_goes_on() -> None:
    from torch._inductor import config

    seen: list[int] = []

    class Theirs(torch._inductor.custom_graph_pass.CustomGraphPass):  # type: ignore[name-defined,misc]
        def __call__(self, graph: Any) -> None:
            seen.append(len(forms(list(graph.nodes))))

        def uuid(self) -> Any:
            return None

    model = nn.Sequential(truenorm.BatchNorm2d(4), nn.ReLU())
    with config.patch(pre_grad_custom_pass=Theirs()):
        torch.compile(model, fullgraph=True)(torch.randn(3, 4, 5, 6))
        assert config.pre_grad_custom_pass.uuid() is None
    assert seen == [1]


def test_a_graph_on_disk_is_of_these_options() -> None:
    from torch._inductor import config

    def keys() -> tuple[Any, bytes]:
        # torch 2.11 pickles what later ones ask for its uuid
        return config.pre_grad_custom_pass.uuid(), pickle.dumps(config.pre_grad_custom_pass)

    options.install()
    first = keys()
    assert first == keys()
    truenorm.compile_options(own=7)
    assert all(one != other for one, other in zip(first, keys(), strict=True))


def test_a_graph_is_found_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    layer, x = truenorm.BatchNorm2d(4), torch.randn(3, 4, 5, 6)
    for found in (0, 1):
        torch.compiler.reset()
        torch._dynamo.utils.counters.clear()
        torch.compile(layer, fullgraph=True)(x)
        counted = torch._dynamo.utils.counters["inductor"]
        assert counted["fxgraph_cache_bypass"] == 0
        assert counted["fxgraph_cache_hit"] == found


def test_functions_that_write_are_known() -> None:
    assert {operator.iadd, operator.ixor, operator.setitem} <= nodes.IN_PLACE
    assert not {operator.add, operator.index, operator.invert, operator.getitem} & nodes.IN_PLACE
