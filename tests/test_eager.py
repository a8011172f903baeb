"""The short way of a plain eager call: the same bits as the long way, and only where it may go."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import CASES, LAYOUTS, Case, run
from promises import layouts
from torch import Tensor
from torch.library import opcheck
from torch.nn.utils import parametrizations, parametrize, prune

import truenorm
from truenorm._core import eager, library, operators

native = pytest.mark.skipif(library.NATIVE is None, reason="needs the native library")
# the other two have no short way
SHORT = [case for case in CASES if case.layer not in ("SyncBatchNorm", "LocalResponseNorm")]
SHORT = [case for case in SHORT if case != CASES[7]]  # unbatched
EVERY = pytest.mark.parametrize("case", SHORT, ids=[case.id for case in SHORT])
MODES = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
CUMULATIVE = Case("BatchNorm2d", (5,), {"momentum": None}, (3, 5, 7, 9))
UNTRACKED = Case("BatchNorm2d", (5,), {"track_running_stats": False}, (3, 5, 7, 9))
PLAIN = Case("InstanceNorm2d", (5,), {}, (3, 5, 7, 9))
BATCH, LAYER = CASES[2], CASES[10]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each call went the short way."""
    made: list[bool] = []
    original = eager.call

    def call(*arguments: Any) -> Tensor | None:
        y = original(*arguments)
        made.append(y is not None)
        return y

    monkeypatch.setattr(eager, "call", call)
    return made


def by_the_long_way(layer: Any, x: Tensor, grad: Tensor) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(eager, "call", lambda *_: None)
        return run(layer, x, grad)


def assert_same(one: Any, other: Any) -> None:
    for a, b in zip(one, other, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert torch.equal(a, b)
            assert (a.dtype, a.stride()) == (b.dtype, b.stride())


@native
@MODES
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("case", "layout"),
    [
        pytest.param(case, layout, id=f"{case.id}-{layout}")
        for case in (*SHORT, CUMULATIVE, UNTRACKED, PLAIN)
        for layout in layouts(case.shape)
    ],
)
def test_the_same_bits(
    case: Case, layout: str, dtype: torch.dtype, training: bool, calls: list[bool]
) -> None:
    # float32 parameters beside a half input, as under autocast, and parameters of the same dtype
    for of_layer in {torch.float32, dtype}:
        layer = case.build().to(of_layer).train(training)
        other = copy.deepcopy(layer)
        x, grad = LAYOUTS[layout](case.input(dtype, offset=2.0)), case.input(dtype)
        assert_same(run(layer, x, grad), by_the_long_way(other, x, grad))
        assert_same(layer.state_dict().values(), other.state_dict().values())
    assert calls == [True] * len({torch.float32, dtype})


@native
@EVERY
def test_without_gradients(case: Case, calls: list[bool]) -> None:
    layer, x = case.build(), case.input()
    expected = copy.deepcopy(layer)(x)
    with torch.no_grad():
        y = layer(x)
    assert torch.equal(y, expected)
    assert not y.requires_grad
    assert y.grad_fn is None
    with torch.inference_mode():
        assert copy.deepcopy(layer).eval()(x).is_inference()
    assert all(calls)


@native
@pytest.mark.parametrize("wanted", [("weight",), ("bias",), ("x",), ("x", "bias"), ()])
@pytest.mark.parametrize("case", [BATCH, LAYER], ids=lambda case: case.id)
def test_some_gradients(case: Case, wanted: tuple[str, ...]) -> None:
    layer, x, grad = case.build(), case.input(), torch.randn(case.shape)
    whole = run(layer, x, grad)._asdict()
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(name in wanted)
    x.requires_grad_("x" in wanted)
    y = layer(x)
    assert y.requires_grad == bool(wanted)
    if wanted:
        asked = [x if name == "x" else getattr(layer, name) for name in wanted]
        found = torch.autograd.grad(y, asked, grad)
        assert_same(found, [whole["input" if name == "x" else name] for name in wanted])


@native
def test_a_bias_of_another_dtype() -> None:
    layer = LAYER.build()
    layer.bias = torch.nn.Parameter(layer.bias.detach().double())
    grad = torch.randn(LAYER.shape)
    found = run(layer, LAYER.input(), grad).bias
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, grad.double().sum((0, 1)))


class Scaled(truenorm.BatchNorm2d):
    """Has a weight of its own over the parameter."""

    @property
    def weight(self) -> Any:
        return self.__getattr__("weight") * 2.0


class Strict(truenorm.BatchNorm2d):
    def _check_input_dim(self, input: Tensor) -> None:
        raise ValueError("not today")


def _parametrized(layer: Any) -> None:
    parametrizations.weight_norm(layer, dim=0)


def _parametrized_later(layer: Any) -> None:
    layer(BATCH.input())
    parametrize.register_parametrization(layer, "bias", torch.nn.Tanh())


def _pruned(layer: Any) -> None:
    prune.random_unstructured(layer, "weight", 0.5)


@native
@pytest.mark.parametrize("change", [_parametrized, _parametrized_later, _pruned])
def test_parameters_held_elsewhere(change: Callable[[Any], None], calls: list[bool]) -> None:
    layer = BATCH.build()
    change(layer)
    plain = BATCH.build()
    plain.load_state_dict({**plain.state_dict(), **layer.state_dict()}, strict=False)
    with torch.no_grad():
        plain.weight.copy_(layer.weight)
        plain.bias.copy_(layer.bias)
    x = BATCH.input()
    del calls[:]
    assert torch.equal(layer(x), plain(x))
    assert calls == [True]  # the plain one's


@native
def test_subclasses_with_their_own(calls: list[bool]) -> None:
    x = BATCH.input()
    layer = Scaled(5)
    layer.__getattr__("weight").data.fill_(1.0)
    torch.nn.init.zeros_(layer.bias)
    y = layer(x)
    assert calls == []
    torch.testing.assert_close(y, 2.0 * truenorm.BatchNorm2d(5)(x))
    with pytest.raises(ValueError, match="not today"):
        Strict(5)(x)


@native
def test_a_tensor_left_over_from_a_transform() -> None:
    layer, left = LAYER.build(), []

    def f(x: Tensor) -> Tensor:
        left.append(x)
        return x.square().sum()

    x = LAYER.input()
    torch.func.grad(f)(x)
    grad = torch.randn(LAYER.shape)
    found = torch.autograd.grad(layer(left[0]), layer.weight, grad)[0]
    assert torch.equal(found, torch.autograd.grad(layer(x), layer.weight, grad)[0])


@native
@EVERY
def test_a_second_backward_says_so(case: Case) -> None:
    y = case.build()(case.input().requires_grad_())
    y.sum().backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y.sum().backward()


@native
def test_two_forwards_before_one_backward() -> None:
    layer = BATCH.build()
    first, second, grad = BATCH.input(), BATCH.input(offset=4.0), torch.randn(BATCH.shape)
    wanted = [run(layer, x, grad).input for x in (first, second)]
    first.requires_grad_()
    second.requires_grad_()
    outputs = layer(first), layer(second)
    assert_same(torch.autograd.grad(outputs, [first, second], [grad, grad]), wanted)


@native
@pytest.mark.parametrize("num_batches", [torch.tensor(3), None], ids=["counted", "uncounted"])
def test_schemas(num_batches: Tensor | None) -> None:
    x, grad = torch.randn(3, 4, 5), torch.randn(3, 4, 5)
    weight, bias, mean, var = torch.randn(4), torch.randn(4), torch.randn(4), torch.rand(4) + 0.5
    check: dict[str, Any] = {"test_utils": "test_schema"}
    opcheck(operators.eager_forward, (x, weight, bias, eager.BATCH | 7, 1e-5), **check)
    running = mean.clone(), var.clone(), num_batches
    arguments = (x, weight, bias, *running, 0.1, eager.BATCH | 7, 1e-5)
    opcheck(operators.eager_forward_running, arguments, **check)
    opcheck(operators.eager_apply, (x, weight, bias, mean, var, 8 | 7, 1e-5), **check)
    record = operators.eager_forward(x, weight, bias, eager.BATCH | 7, 1e-5)[1]
    opcheck(operators.eager_backward, (grad, x, record, weight), **check)


@native
def test_what_is_refused_changes_nothing() -> None:
    x, eight = torch.randn(3, 4, 5), torch.zeros(8)
    running = torch.zeros(4), torch.ones(4), torch.tensor(3)
    for at, wrong in ((1, eight), (2, eight), (3, eight), (4, eight), (5, torch.tensor(1.0))):
        arguments: list[Any] = [x, None, None, *running, 0.1, eager.BATCH, 1e-5]
        arguments[at] = wrong
        with pytest.raises(RuntimeError, match="no call for the short way"):
            operators.eager_forward_running(*arguments)
    for shape in ((4,), (1, 4), (0, 4, 5)):
        with pytest.raises(RuntimeError, match="no call for the short way"):
            operators.eager_forward_running(
                torch.randn(shape), None, None, *running, 0.1, eager.BATCH, 1e-5
            )
    assert running[0].eq(0.0).all()
    assert running[1].eq(1.0).all()
    assert running[2] == 3


@native
@MODES
def test_a_backward_that_is_compiled(training: bool) -> None:
    from torch._dynamo import compiled_autograd

    layer, x, grad = BATCH.build().train(training), BATCH.input(), torch.randn(BATCH.shape)
    expected = run(layer, x, grad)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        x.requires_grad_()
        with compiled_autograd._enable(torch.compile(backend="aot_eager", fullgraph=True)):
            layer(x).backward(grad)
    assert_same((x.grad, layer.weight.grad, layer.bias.grad), expected[1:])
    torch.compiler.reset()
