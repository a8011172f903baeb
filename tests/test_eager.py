"""The short way of a plain eager call: the same bits as the long way, and only where it may go."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from cases import CASES, LAYOUTS, Case, run
from promises import layouts
from torch import Tensor
from torch.library import opcheck
from torch.nn.utils import parametrizations, parametrize, prune

import truenorm
from truenorm import functional
from truenorm._core import eager, library, operators
from truenorm._core.activation import LEAKY_RELU, RELU
from truenorm._core.call import ACT, CONSTANT, GROUPS
from truenorm.nn._options import Activation

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


def _with_beside(layer: Any, x: Tensor, residual: Tensor | None, grad: Tensor) -> list[Tensor]:
    """Output and gradients, the residual's too."""
    leaves = [x, residual] if residual is not None else [x]
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    y = layer(leaves[0], residual=leaves[1] if residual is not None else None)
    wanted = [*leaves, *layer.parameters()]
    return [y.detach(), *torch.autograd.grad(y, wanted, grad), *layer.state_dict().values()]


@native
@MODES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", [None, *get_args(Activation)])
@pytest.mark.parametrize("case", [CASES[2], CASES[5], CASES[10], PLAIN], ids=lambda case: case.id)
def test_an_activation_and_a_residual(
    case: Case, activation: Any, dtype: torch.dtype, training: bool, calls: list[bool]
) -> None:
    layer = case.build().train(training)
    layer.activation = activation
    x, residual, grad = (case.input(dtype) for _ in range(3))
    for beside in (None, residual):
        other = copy.deepcopy(layer)
        found = _with_beside(layer, x, beside, grad)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(eager, "call", lambda *_: None)
            assert_same(found, _with_beside(other, x, beside, grad))
    assert calls == [True, True]


@native
def test_a_residual_that_does_not_fit_goes_the_long_way(calls: list[bool]) -> None:
    layer, x = LAYER.build(), LAYER.input()
    row = torch.randn(LAYER.shape[-1])
    # as `fuse` calls it, which adds whatever torch adds
    y = layer(x, residual=row, _then=(RELU, 0.0))
    assert torch.equal(y, (layer(x) + row).relu())
    assert calls == [False, True]
    for wrong in (row, x.double()):
        with pytest.raises(ValueError, match="residual"):
            layer(x, residual=wrong)


FUNCTIONS: list[tuple[str, Callable[..., Tensor]]] = [
    ("batch_norm", lambda x, w, b, m, v: functional.batch_norm(x, m, v, w, b, True, 0.3)),
    ("batch_norm, own", lambda x, w, b, m, v: functional.batch_norm(x, None, None, w, b, True)),
    ("batch_norm, given", lambda x, w, b, m, v: functional.batch_norm(x, m, v, w, b)),
    ("instance_norm", lambda x, w, b, m, v: functional.instance_norm(x, m, v, w, b)),
    ("instance_norm, own", lambda x, w, b, m, v: functional.instance_norm(x, weight=w, bias=b)),
    ("instance_norm, given", lambda x, w, b, m, v: functional.instance_norm(x, m, v, w, b, False)),
    ("group_norm", lambda x, w, b, m, v: functional.group_norm(x, 3, w, b)),
    ("layer_norm", lambda x, w, b, m, v: functional.layer_norm(x.mT, [6], w, b)),
    ("rms_norm", lambda x, w, b, m, v: functional.rms_norm(x.mT, (6,), w) + b),
]


@native
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("function", [f for _, f in FUNCTIONS], ids=[name for name, _ in FUNCTIONS])
def test_functional(function: Callable[..., Tensor], dtype: torch.dtype, calls: list[bool]) -> None:
    x, grad = torch.randn(4, 6, 5, dtype=dtype), torch.randn(4, 6, 5, dtype=dtype)
    w, b = torch.randn(6), torch.randn(6)
    mean, var = torch.randn(6), torch.rand(6) + 0.5

    def found() -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in (x, w, b)]
        running = mean.clone(), var.clone()
        y = function(*leaves, *running)
        incoming = grad if y.shape == grad.shape else grad.mT
        return [y.detach(), *torch.autograd.grad(y, leaves, incoming.to(y.dtype)), *running]

    one = found()
    assert calls == [True]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(eager, "call", lambda *_: None)
        assert_same(one, found())


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
    grad = torch.randn_like(y)
    y.backward(grad)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y.backward(grad)


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
    call = x, weight, bias
    opcheck(operators.eager_norm, (*call, eager.BATCH | 7, 1e-5), **check)
    opcheck(operators.eager_norm_given, (*call, CONSTANT | 7, 1e-5, mean, var), **check)
    running = mean.clone(), var.clone(), num_batches
    more = *running, 0.1, grad, 0.3
    acting = LEAKY_RELU << ACT | 15
    opcheck(operators.eager_norm_more, (*call, acting, 1e-5, *more), **check)
    record = operators.eager_norm(*call, eager.BATCH | 7, 1e-5)[1]
    opcheck(operators.eager_norm_backward, (grad, x, record, weight), **check)
    record = operators.eager_norm_more(*call, acting, 1e-5, *more)[1]
    opcheck(operators.eager_norm_backward, (grad, x, record, weight, bias, grad), **check)


@native
def test_what_is_refused_changes_nothing() -> None:
    x, eight = torch.randn(3, 4, 5), torch.zeros(8)
    running = torch.zeros(4), torch.ones(4), torch.tensor(3)
    good = [x, None, None, eager.BATCH, 1e-5, *running, 0.1, x, 0.0]
    wrong: list[tuple[int, Any]] = [(1, eight), (2, eight), (5, eight), (6, eight), (9, eight)]
    wrong += [(7, torch.tensor(1.0)), (6, None), (9, x.double()), (3, 9 << ACT), (3, 1 << GROUPS)]
    wrong += [(0, torch.randn(shape)) for shape in ((4,), (1, 4), (0, 4, 5))]
    for at, value in wrong:
        arguments = [*good[:at], value, *good[at + 1 :]]
        with pytest.raises(RuntimeError, match="no call for the short way"):
            operators.eager_norm_more(*arguments)
    with pytest.raises(RuntimeError, match="no call for the short way"):
        operators.eager_norm_more(x, None, None, CONSTANT, 1e-5, None, None, None, 0.0)
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
