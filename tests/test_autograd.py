"""Derivatives of every kind, for every layer, its input and its parameters."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from cases import CASES, IDS, Case, randomize, run
from tolerances import FLOAT64, assert_gradient, relative
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils.checkpoint import checkpoint

import truenorm
import truenorm.functional as F

# Layers at sizes at which every entry of a Jacobian can be looked at.
SMALL = [
    Case("BatchNorm1d", (3,), {}, (5, 3)),
    Case("BatchNorm2d", (3,), {}, (2, 3, 1, 3)),
    Case("SyncBatchNorm", (2,), {}, (3, 2, 2)),
    Case("InstanceNorm1d", (3,), {"affine": True, "track_running_stats": True}, (2, 3, 5)),
    Case("InstanceNorm2d", (2,), {"affine": True}, (2, 3, 2)),
    Case("GroupNorm", (2, 4), {}, (3, 4, 3)),
    Case("LayerNorm", ((3, 2),), {}, (3, 3, 2)),
    Case("RMSNorm", ((5,),), {}, (3, 5)),
    Case("LocalResponseNorm", (3,), {"alpha": 0.3}, (2, 4, 3)),
]
SMALL_IDS = [case.id for case in SMALL]
EVERY = pytest.mark.parametrize("case", SMALL, ids=SMALL_IDS)
MODES = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def pure(layer: Any, names: list[str]) -> Any:
    """The layer as a function of its input and parameters; buffers are fresh for every call."""

    def call(x: Tensor, *values: Tensor) -> Tensor:
        buffers = {name: buffer.clone() for name, buffer in layer.named_buffers()}
        return functional_call(layer, {**dict(zip(names, values, strict=True)), **buffers}, (x,))

    return call


def prepared(case: Case, training: bool = True) -> tuple[Any, Any, tuple[Tensor, ...]]:
    layer = case.build(dtype=torch.float64).train(training)
    names = [name for name, _ in layer.named_parameters()]
    x = case.input(torch.float64, offset=2.0).requires_grad_()
    parameters = [p.detach().clone().requires_grad_() for p in layer.parameters()]
    return layer, pure(layer, names), (x, *parameters)


@MODES
@EVERY
def test_gradcheck(case: Case, training: bool) -> None:
    _, of, inputs = prepared(case, training)
    assert gradcheck(of, inputs, check_forward_ad=True, check_batched_grad=True)


@MODES
@EVERY
def test_gradgradcheck(case: Case, training: bool) -> None:
    _, of, inputs = prepared(case, training)
    assert gradgradcheck(of, inputs, check_fwd_over_rev=True, gen_non_contig_grad_outputs=True)


@MODES
@EVERY
def test_a_batch_of_gradients_can_be_differentiated(case: Case, training: bool) -> None:
    _, of, inputs = prepared(case, training)
    several = torch.randn(2, *of(*inputs).shape, dtype=torch.float64)

    def gradients(*inputs: Tensor) -> Any:
        batch = {"is_grads_batched": True, "create_graph": True}
        return torch.autograd.grad(of(*inputs), inputs, several, **batch)

    assert gradcheck(gradients, inputs)


@EVERY
def test_gradcheck_in_another_layout(case: Case) -> None:
    _, of, (x, *parameters) = prepared(case)
    x = x.detach().movedim(0, -1).contiguous().movedim(-1, 0).requires_grad_()
    assert gradcheck(of, (x, *parameters), fast_mode=True)
    assert gradgradcheck(of, (x, *parameters), fast_mode=True)


@MODES
@EVERY
def test_gradients_of_a_part(case: Case, training: bool) -> None:
    """Any one argument alone gets the gradient that it gets with all others."""
    _, of, inputs = prepared(case, training)
    direction = torch.randn(case.shape, dtype=torch.float64)
    together = torch.autograd.grad(of(*inputs), inputs, direction)
    for i, expected in enumerate(together):
        alone = [t.detach().requires_grad_(i == j) for j, t in enumerate(inputs)]
        (actual,) = torch.autograd.grad(of(*alone), [alone[i]], direction)
        assert torch.equal(actual, expected)
    assert not of(*[t.detach() for t in inputs]).requires_grad


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_the_output_used_twice(case: Case) -> None:
    _, of, inputs = prepared(case)
    a, b = torch.randn(2, *case.shape, dtype=torch.float64)
    y = of(*inputs)
    found = torch.autograd.grad((y * a).sum() + (y * b).sum(), inputs)
    for actual, expected in zip(
        found, torch.autograd.grad(of(*inputs), inputs, a + b), strict=True
    ):
        assert relative(actual, expected) < FLOAT64


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_the_gradient_is_the_input_itself(case: Case) -> None:
    """One tensor in two roles; the values are compared, exactly, with those of two tensors."""
    layer, x = case.build(), case.input()
    for actual, expected in zip(run(layer, x, x), run(layer, x, x.clone()), strict=True):
        assert (actual is None) == (expected is None)
        assert actual is None or torch.equal(actual, expected)


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_gradient_penalty_as_torch(case: Case) -> None:
    """A loss on the norm of the input's gradient, as WGAN-GP uses it."""
    found = []
    x, direction = case.input(torch.float64), torch.randn(case.shape, dtype=torch.float64)
    for layer in case.pair(dtype=torch.float64):
        at = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(torch.sin(layer(at)), at, direction, create_graph=True)
        penalty = ((slope * slope).sum() + 0.1).sqrt()
        wanted = [p for n, p in layer.named_parameters() if n != "bias"]
        found.append(torch.autograd.grad(penalty, [at, *wanted]))
    for actual, expected in zip(*found, strict=True):
        assert relative(actual, expected) < 1e-9


def test_gradient_penalty_in_float32() -> None:
    case = CASES[2]
    ours, wide = case.build(), case.build(torch.nn, dtype=torch.float64)
    wide.load_state_dict(ours.state_dict())
    x, direction = case.input(), torch.randn(case.shape)
    found = []
    for layer in (ours, wide):
        dtype = layer.weight.dtype
        at = x.to(dtype).requires_grad_()
        (slope,) = torch.autograd.grad(layer(at), at, direction.to(dtype), create_graph=True)
        found.append(torch.autograd.grad((slope * slope).sum(), [at, layer.weight]))
    for actual, expected in zip(*found, strict=True):
        assert_gradient(actual, expected)


@MODES
@EVERY
def test_jacobians(case: Case, training: bool) -> None:
    """Reverse and forward mode, with vmap inside both, against torch's layer by plain autograd."""
    layer, of, inputs = prepared(case, training)
    theirs = case.build(torch.nn, dtype=torch.float64).train(training)
    theirs.load_state_dict(layer.state_dict())
    expected = torch.autograd.functional.jacobian(
        pure(theirs, [name for name, _ in theirs.named_parameters()]), inputs
    )
    every = tuple(range(len(inputs)))
    for transform in (jacrev, jacfwd):
        for actual, wanted in zip(transform(of, every)(*inputs), expected, strict=True):
            assert relative(actual, wanted) < 1e-9


@EVERY
def test_hessian_vector_products(case: Case) -> None:
    _, of, (x, *parameters) = prepared(case)
    direction, v = torch.randn(2, *case.shape, dtype=torch.float64)

    def loss(x: Tensor) -> Tensor:
        return (torch.sin(of(x, *parameters)) * direction).sum()

    _, forward_over_reverse = jvp(grad(loss), (x,), (v,))
    (slope,) = torch.autograd.grad(loss(x), x, create_graph=True)
    (reverse_over_reverse,) = torch.autograd.grad(slope, x, v)
    assert relative(forward_over_reverse, reverse_over_reverse) < 1e-9


@MODES
@EVERY
def test_vmap(case: Case, training: bool) -> None:
    if (
        training
        and "track_running_stats" in inspect.signature(getattr(torch.nn, case.layer)).parameters
    ):
        # as with torch's layers, one buffer cannot follow several batches at once
        case = case._replace(kwargs={**case.kwargs, "track_running_stats": False})
    _, of, (x, *parameters) = prepared(case, training)
    batch = torch.randn(4, *x.shape, dtype=torch.float64)
    y = vmap(lambda one: of(one, *parameters))(batch)
    for i in range(4):
        assert relative(y[i], of(batch[i], *parameters)) < FLOAT64
    _, pull = vjp(of, x, *parameters)
    for values in zip(*vmap(pull)(batch), strict=True):
        assert all(
            value.shape == like.shape for value, like in zip(values, (x, *parameters), strict=True)
        )


def test_vmap_over_shared_running_statistics_is_an_error() -> None:
    layer = SMALL[0].build()
    with pytest.raises(RuntimeError, match="vmap"):
        vmap(layer)(torch.randn(4, *SMALL[0].shape))


def test_vmap_over_parameters() -> None:
    """An ensemble: one input, several weights."""
    x, weights = torch.randn(3, 5, 7), torch.randn(4, 7)
    y = vmap(lambda w: F.layer_norm(x, (7,), w))(weights)
    for i in range(4):
        assert torch.allclose(y[i], F.layer_norm(x, (7,), weights[i]), atol=1e-6)


@EVERY
def test_forward_mode_beside_reverse_mode(case: Case) -> None:
    _, of, inputs = prepared(case)
    tangents = [torch.randn_like(t) for t in inputs]
    direction = torch.randn(case.shape, dtype=torch.float64)
    with forward_ad.dual_level():
        y = of(
            *(forward_ad.make_dual(t.detach(), d) for t, d in zip(inputs, tangents, strict=True))
        )
        along = forward_ad.unpack_dual(y).tangent
    gradients = torch.autograd.grad(of(*inputs), inputs, direction)
    pulled = sum((g * d).sum() for g, d in zip(gradients, tangents, strict=True))
    assert (along * direction).sum().item() == pytest.approx(pulled.item(), rel=1e-9)


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_checkpoint(case: Case) -> None:
    layer = randomize(torch.nn.Sequential(case.build()))
    x, direction = case.input().requires_grad_(), torch.randn(case.shape)
    state = {k: v.clone() for k, v in layer.state_dict().items()}
    wanted = torch.autograd.grad(layer(x), [x, *layer.parameters()], direction)
    layer.load_state_dict(state)
    y = checkpoint(layer, x, use_reentrant=False)
    found = torch.autograd.grad(y, [x, *layer.parameters()], direction)
    for actual, expected in zip(found, wanted, strict=True):
        assert torch.equal(actual, expected)


SAVED = [(case, name) for case in CASES for name in ("input", "weight")]
SAVED.remove((CASES[13], "weight"))  # LocalResponseNorm has none


@pytest.mark.parametrize(("case", "changed"), SAVED, ids=lambda v: getattr(v, "id", v))
def test_a_value_changed_before_backward_is_noticed(case: Case, changed: str) -> None:
    layer = case.build()
    x = case.input().requires_grad_() * 1.0
    y = layer(x)
    with torch.no_grad():
        (x if changed == "input" else layer.weight).add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(torch.randn(case.shape))


def test_accumulation_over_two_backwards() -> None:
    layer = CASES[2].build()
    x, direction = CASES[2].input(), torch.randn(CASES[2].shape)
    layer(x).backward(direction)
    once = layer.weight.grad.clone()
    layer(x).backward(direction)
    assert torch.equal(layer.weight.grad, 2 * once)


def test_backward_twice_needs_the_graph_kept() -> None:
    x = CASES[2].input().requires_grad_()
    y, direction = CASES[2].build()(x), torch.randn(CASES[2].shape)
    (first,) = torch.autograd.grad(y, x, direction, retain_graph=True)
    (second,) = torch.autograd.grad(y, x, direction)
    assert torch.equal(first, second)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(y, x, direction)


@pytest.mark.parametrize("name", ["batch_norm", "instance_norm"])
@pytest.mark.parametrize("with_tangent", [(0,), (1,), (0, 1), (0, 1, 2), (3,), (1, 3), (2, 4)])
def test_running_statistics_with_a_tangent(name: str, with_tangent: tuple[int, ...]) -> None:
    """Refused where torch refuses them: in evaluation, beside another tangent."""

    def run(library: object, training: bool) -> str:
        tensors = (
            torch.randn(3, 2, 5),
            torch.randn(2),
            torch.rand(2),
            torch.randn(2),
            torch.randn(2),
        )
        with forward_ad.dual_level():
            given = [
                forward_ad.make_dual(t, torch.randn_like(t)) if i in with_tangent else t
                for i, t in enumerate(tensors)
            ]
            try:
                y = getattr(library, name)(*given, training)
            except RuntimeError as error:
                return str(error)
            return "a tangent" if forward_ad.unpack_dual(y).tangent is not None else "none"

    for training in (True, False):
        wanted, found = run(torch.nn.functional, training), run(F, training)
        assert found.startswith(wanted[:90])
    refused = bool({1, 2} & {*with_tangent}) and bool({0, 3, 4} & {*with_tangent})
    assert ("cannot have" in found) == refused


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("asked", ["running_mean", "running_var"])
@pytest.mark.parametrize("name", ["batch_norm", "instance_norm"])
def test_running_statistics_that_ask_for_a_gradient(name: str, asked: str, training: bool) -> None:
    x = torch.randn(3, 2, 5, requires_grad=True)
    for functions in (torch.nn.functional, F):
        given = {"running_mean": torch.zeros(2), "running_var": torch.ones(2)}
        given[asked].requires_grad_()
        with pytest.raises(RuntimeError, match=f"not differentiable with respect to.*'{asked}'"):
            getattr(functions, name)(x, *given.values(), None, None, training)
        with torch.no_grad():
            y = getattr(functions, name)(x, *given.values(), None, None, training)
        assert not y.requires_grad


@MODES
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_layer_whose_running_mean_asks_for_a_gradient(training: bool, compiled: bool) -> None:
    layer = truenorm.BatchNorm1d(3).train(training)
    layer.running_mean.requires_grad_()
    call = torch.compile(layer, backend="eager", fullgraph=True) if compiled else layer
    with pytest.raises(RuntimeError, match="not differentiable with respect to"):
        call(torch.randn(5, 3))


@pytest.mark.parametrize("transform", [grad, jacrev, jacfwd, lambda f: grad(grad(f))])
@pytest.mark.parametrize("name", ["batch_norm", "instance_norm"])
def test_running_statistics_move_within_a_transform(name: str, transform: Any) -> None:
    factor, x = torch.tensor(1.5), torch.randn(3, 2, 5)

    def running(norm: Any) -> tuple[Tensor, Tensor]:
        given = torch.zeros(2), torch.ones(2)
        transform(lambda f: norm(f * x, *given, None, None, True).pow(3).sum())(factor)
        return given

    of_torch = running(getattr(torch.nn.functional, name))
    torch.testing.assert_close(running(getattr(F, name)), of_torch)


def test_a_layers_running_statistics_move_within_a_transform() -> None:
    of_torch, layer = torch.nn.BatchNorm1d(3), truenorm.BatchNorm1d(3)
    x = torch.randn(5, 3)
    of_torch(x)
    grad(lambda x: layer(x).pow(3).sum())(x)
    torch.testing.assert_close(layer.state_dict(), of_torch.state_dict())
