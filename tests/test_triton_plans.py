"""The short way of CUDA tensors: the same bits as the long way, and only where it may go."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any, get_args

import pytest
import torch
from cases import CASES, LAYOUTS, Case
from on_triton import (
    DEVICE,
    HAS_CUDA,
    PRETENDS,
    needs_triton,
    plans,
    small_tiles,
    triton_kernels,
)
from promises import layouts
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import truenorm
from truenorm import functional
from truenorm._core import by_plan, eager
from truenorm._triton import config
from truenorm.nn._options import Activation

pytestmark = [
    needs_triton,
    pytest.mark.skipif(PRETENDS, reason="a pretended GPU's tensors are a subclass"),
]
# the other two have no short way, nor has what is not batched
SHORT = [
    case
    for case in CASES
    if case.layer not in ("SyncBatchNorm", "LocalResponseNorm") and case != CASES[7]
]
PLAIN = Case("InstanceNorm2d", (5,), {}, (3, 5, 7, 9))
BATCH, TRACKED, LAYER, RMS = CASES[2], CASES[5], CASES[10], CASES[12]


@pytest.fixture
def made() -> Iterator[list[int]]:
    """How many steps each plan has taken, in the order of calls."""
    with plans() as counts:
        yield counts


def build(case: Case) -> Any:
    return case.build().to(DEVICE)


def fresh(case: Case, *args: Any, **more: Any) -> Tensor:
    return case.input(*args, **more).to(DEVICE)


def step(layer: Any, x: Tensor, grad: Tensor, residual: Tensor | None = None) -> list[Tensor]:
    """Output, gradients and state of a training step, or of one in evaluation."""
    leaves = [t.detach().requires_grad_() for t in (x, residual) if t is not None]
    y = layer(leaves[0], residual=leaves[1]) if len(leaves) > 1 else layer(*leaves)
    wanted = [*leaves, *(p for p in layer.parameters() if p.requires_grad)]
    found = torch.autograd.grad(y, wanted, grad)
    return [y.detach(), *found, *(b.clone() for b in layer.buffers())]


def long_way(run: Callable[[], Any]) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(eager, "call", lambda *_: None)
        patch.setattr(by_plan, "serves", lambda x: False)
        return run()


def same(one: Any, other: Any) -> None:
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a, b)
        assert (a.dtype, a.stride()) == (b.dtype, b.stride())


def check(layer: Any, *args: Any) -> None:
    """A first call, which is written down, and one by the plan, beside the long way."""
    wanted = long_way(lambda: step(copy.deepcopy(layer), *args))
    for _ in range(2):
        same(step(copy.deepcopy(layer), *args), wanted)


# ---------------------------------------------------------------- the same bits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", [*SHORT, PLAIN], ids=lambda case: case.id)
def test_the_same_bits(case: Case, dtype: torch.dtype, made: list[int]) -> None:
    modes = (True, False) if case.layer[:5] in ("Batch", "Insta") else (True,)
    with triton_kernels():
        for training in modes:
            layer = build(case).to(dtype).train(training)
            for name in layouts(case.shape):
                x, grad = LAYOUTS[name](fresh(case, dtype, offset=2.0)), fresh(case, dtype)
                made.clear()
                check(layer, x, grad)
                assert len(made) >= 2


@pytest.mark.parametrize("case", [BATCH, TRACKED, LAYER, RMS], ids=lambda case: case.id)
def test_the_same_bits_of_several_launches(case: Case, made: list[int]) -> None:
    small = case._replace(shape=(*case.shape[:-1], 6)) if case in (BATCH, TRACKED) else case
    with small_tiles(), triton_kernels():
        check(build(small), fresh(small), fresh(small))
    assert len(made) == 2
    assert min(made) > 1


@pytest.mark.parametrize("activation", [None, *get_args(Activation)])
@pytest.mark.parametrize("case", [BATCH, TRACKED, LAYER], ids=lambda case: case.id)
def test_an_activation_and_a_residual(case: Case, activation: Any, made: list[int]) -> None:
    layer = build(case)
    layer.activation = activation
    x, residual, grad = (fresh(case) for _ in range(3))
    with triton_kernels():
        for beside in ((), (residual,)):
            check(layer, x, grad, *beside)
    # without an activation the gradients are one kind
    assert len(made) == (5 if activation is None else 4)


@pytest.mark.parametrize("activation", [None, "silu"])
def test_one_tensor_in_two_places(activation: Any, made: list[int]) -> None:
    """Which another call of the same kind has apart."""
    layer, grad, x, residual = build(LAYER), fresh(LAYER), fresh(LAYER), fresh(LAYER)
    layer.activation = activation
    parameter = torch.nn.Parameter(torch.randn(7, device=DEVICE))
    bias = layer.bias
    with triton_kernels():
        for first, second in ((parameter, parameter), (parameter, bias)):
            layer.weight, layer.bias = first, second
            for one, other in ((x, x), (x, residual), (grad, x)):

                def run(one: Tensor = one, other: Tensor = other) -> list[Tensor]:
                    leaf = one.detach().requires_grad_()
                    y = layer(leaf, residual=leaf if other is one else other)
                    return [y, *torch.autograd.grad(y, [leaf, *layer.parameters()], grad)]

                same(run(), long_way(run))
    assert made


def test_a_parameter_of_an_activation_is_part_of_a_kind() -> None:
    x, form = torch.tensor([[1.0, -1.0]], device=DEVICE), eager.layer(1)
    with triton_kernels():
        for slope in (0.0, -0.0, 0.5, 0.0):
            beside = None, 2, slope
            y = eager.call(eager.OWN, x, None, None, form, 1e-5, (), beside)
            assert y is not None
            assert y[0, 1].item() == pytest.approx(-slope, abs=1e-4)
            assert torch.signbit(y[0, 1]) == torch.signbit(torch.tensor(-slope))


@pytest.mark.parametrize("wanted", [("weight",), ("bias",), ("x",), ("x", "bias"), ()])
@pytest.mark.parametrize("case", [BATCH, LAYER], ids=lambda case: case.id)
def test_some_gradients(case: Case, wanted: tuple[str, ...], made: list[int]) -> None:
    layer, grad = build(case), fresh(case)
    x = fresh(case).requires_grad_("x" in wanted)
    layer.weight.requires_grad_("weight" in wanted)
    layer.bias.requires_grad_("bias" in wanted)
    leaves = [t for t in (x, layer.weight, layer.bias) if t.requires_grad]

    def run() -> list[Tensor]:
        y = layer(x)
        assert y.requires_grad == bool(leaves)
        return [y, *(torch.autograd.grad(y, leaves, grad) if leaves else ())]

    with triton_kernels():
        expected = long_way(run)
        for _ in range(2):
            same(run(), expected)
        with torch.no_grad():
            assert torch.equal(layer(x), expected[0])
    assert made


def test_a_gradient_of_the_residual_alone(made: list[int]) -> None:
    layer, x, grad = build(LAYER).requires_grad_(False), fresh(LAYER), fresh(LAYER)
    residual = fresh(LAYER).requires_grad_()
    with triton_kernels():
        for _ in range(2):
            (found,) = torch.autograd.grad(layer(x, residual=residual), residual, grad)
            assert torch.equal(found, grad)
    assert made == [1]


def test_second_derivatives(made: list[int]) -> None:
    layer, x, grad = build(LAYER), fresh(LAYER), fresh(LAYER)

    def run() -> list[Tensor]:
        leaf, incoming = x.clone().requires_grad_(), grad.clone().requires_grad_()
        wanted = [leaf, *layer.parameters()]
        first = torch.autograd.grad(layer(leaf), wanted, incoming, create_graph=True)
        loss = sum(g.square().sum() for g in first)
        return list(torch.autograd.grad(loss, [leaf, incoming, layer.weight]))

    with triton_kernels():
        expected = long_way(run)
        run()
        same(run(), expected)
    assert made == [1]


def test_running_statistics_over_steps() -> None:
    batches = [fresh(BATCH, offset=float(i)) for i in range(4)]
    with triton_kernels():
        for momentum in (0.3, 0.7, None):
            one = build(BATCH)
            one.momentum = momentum
            other = copy.deepcopy(one)
            for x in batches:
                same([one(x)], long_way(lambda x=x, layer=other: [layer(x)]))  # type: ignore[misc]
            same(one.state_dict().values(), other.state_dict().values())
            assert one.num_batches_tracked == 4


def test_two_forwards_before_one_backward(made: list[int]) -> None:
    layer, grad = build(LAYER), fresh(LAYER)
    inputs = [fresh(LAYER).requires_grad_() for _ in range(3)]
    with triton_kernels():
        expected = [long_way(lambda x=x: torch.autograd.grad(layer(x), x, grad)) for x in inputs]  # type: ignore[misc]
        for _ in range(2):
            outputs = [layer(x) for x in inputs]
            found = [torch.autograd.grad(y, x, grad) for y, x in zip(outputs, inputs, strict=True)]
            for a, b in zip(found, expected, strict=True):
                same(a, b)
        with pytest.raises(RuntimeError, match="second time"):
            torch.autograd.grad(outputs[0], inputs[0], grad)
    assert len(made) == 10


# ---------------------------------------------------------------- what changes


def test_a_layer_that_changes(made: list[int]) -> None:
    """A kind is of what a call is given, which is read every time."""
    layer, x, grad = build(LAYER), fresh(LAYER), fresh(LAYER)

    def weight(value: Tensor) -> None:
        layer.weight = torch.nn.Parameter(value)

    changes: list[Callable[[], Any]] = [
        lambda: None,
        lambda: setattr(layer, "eps", 0.5),
        lambda: weight(torch.randn(7, device=DEVICE)),
        lambda: weight(torch.randn(7, device=DEVICE).double()),
        lambda: weight(torch.randn(14, device=DEVICE)[::2]),
        lambda: weight(torch.randn(8, device=DEVICE)[1:]),
        lambda: layer.weight.requires_grad_(False),
        lambda: layer.register_parameter("bias", None),
        lambda: layer.register_parameter("weight", None),
    ]
    with triton_kernels():
        for change in changes:
            change()
            check(layer, x, grad)
            check(layer, x.half(), grad.half())
        assert len(made) > 20


@pytest.mark.parametrize("make", [lambda t: t[1:], lambda t: t[:-1].t().contiguous().t()])
def test_an_input_that_is_copied_first(make: Any, made: list[int]) -> None:
    layer, room = truenorm.LayerNorm(9).to(DEVICE), torch.randn(5, 9, device=DEVICE)
    x, grad = make(room), torch.randn(4, 9, device=DEVICE)
    with triton_kernels():
        check(layer, x, grad)
    assert made == [2, 3]


def test_an_address_is_part_of_a_kind(made: list[int]) -> None:
    layer = truenorm.LayerNorm(8).to(DEVICE)
    room, grad = torch.randn(5, 8, device=DEVICE), torch.randn(4, 8, device=DEVICE)
    odd = room.flatten()[1:33].view(4, 8)
    with triton_kernels():
        for x in (room[:4], odd, room[:4]):
            check(layer, x, grad)
    # what lies elsewhere is copied first
    assert made == [1, 2, 2, 3, 1, 2, 1, 2]


def test_choices_that_change_are_seen() -> None:
    layer, x = build(LAYER), fresh(LAYER)
    with triton_kernels():
        layer(x)
        assert config.CALLS
        config.choose(config.Key(True, 1, 1, False, False, 4, False), None)
        assert not config.CALLS
        layer(x)
        with config.asked() as keys:
            layer(x)
        assert keys


# ---------------------------------------------------------------- what is not for this way


class _Looks(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class _Own(Tensor):
    pass


class _Quiet(Tensor):
    """Seen by the dispatcher alone."""

    __torch_function__ = torch._C._disabled_torch_function_impl


def test_what_is_not_plain(made: list[int]) -> None:
    layer, x = build(LAYER), fresh(LAYER)
    with triton_kernels():
        layer(x)
        made.clear()
        for run in (
            lambda: torch.vmap(layer)(x),
            lambda: torch.func.jvp(layer, (x,), (x,)),
            lambda: torch.func.grad(lambda t: layer(t).sum())(x),
            lambda: layer(x.as_subclass(_Own)),
        ):
            run()
        with _Looks():
            layer(x)
        quiet = layer.weight.detach().as_subclass(_Quiet)
        assert eager.call(eager.OWN, x, quiet, None, eager.layer(1), 1e-5, (), None) is None
        assert made == []
        layer(x)
        assert made == [1]


def test_a_gradient_that_is_not_plain(made: list[int]) -> None:
    layer, x = build(LAYER), fresh(LAYER).requires_grad_()
    with triton_kernels():
        expected = torch.autograd.grad(layer(x), x, torch.ones(LAYER.shape, device=DEVICE))
        made.clear()
        y = layer(x)
        with _Looks():
            same(torch.autograd.grad(y, x, torch.ones(LAYER.shape, device=DEVICE)), expected)
        y = layer(x)
        batched = torch.ones(2, *LAYER.shape, device=DEVICE)
        (found,) = torch.autograd.grad(y, x, batched, is_grads_batched=True)
        assert torch.allclose(found[0], expected[0], atol=1e-5)
    assert made == [1, 1]


def test_saved_tensors_that_others_keep(made: list[int]) -> None:
    """They may come back as something else."""
    layer, x, grad = build(LAYER), fresh(LAYER).requires_grad_(), fresh(LAYER)
    with triton_kernels():
        expected = torch.autograd.grad(layer(x), x, grad)
        hooks = torch.autograd.graph.saved_tensors_hooks
        for unpack in (lambda t: t.clone(), lambda t: t.as_subclass(_Own)):
            with hooks(lambda t: t, unpack):
                y = layer(x)
            same(torch.autograd.grad(y, x, grad), expected)
        y = layer(x)
        with torch.no_grad():
            x.add_(1.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(y, x, grad)


WRONG: list[tuple[str, Callable[[], Any]]] = [
    ("dtype", lambda: functional.layer_norm(torch.ones(4, 7, dtype=torch.int64), (7,))),
    ("weight", lambda: functional.layer_norm(torch.ones(4, 7), (7,), torch.ones(6))),
    ("parts", lambda: functional.group_norm(torch.ones(4, 6, 5), 2, torch.ones(4, 6))),
    ("device", lambda: functional.layer_norm(torch.ones(4, 7), (7,), torch.ones(7).to("meta"))),
    ("groups", lambda: functional.group_norm(torch.ones(4, 7, 2), 2)),
    ("rank", lambda: functional.group_norm(torch.ones(4), 2)),
    ("one value", lambda: functional.batch_norm(torch.ones(1, 7), None, None, training=True)),
    ("none given", lambda: functional.batch_norm(torch.ones(4, 7), None, None)),
    (
        "statistics",
        lambda: functional.batch_norm(
            torch.ones(4, 7), torch.ones(7), torch.ones(6), training=True, momentum=0.5
        ),
    ),
    ("sparse", lambda: functional.layer_norm(torch.ones(4, 7).to_sparse(), (7,))),
]


@pytest.mark.skipif(HAS_CUDA, reason="of a CPU's tensors, taken for a GPU's")
@pytest.mark.parametrize("wrong", [run for _, run in WRONG], ids=[name for name, _ in WRONG])
def test_the_same_errors(wrong: Callable[[], Any]) -> None:
    with triton_kernels():
        # so that what is in order has a plan
        for _ in range(2):
            functional.layer_norm(torch.ones(4, 7), (7,), torch.ones(7))
            args = torch.ones(7), torch.ones(7)
            functional.batch_norm(torch.ones(4, 7), *args, training=True, momentum=0.5)
        with pytest.raises((RuntimeError, ValueError, TypeError)) as expected:
            long_way(wrong)
        for _ in range(2):
            with pytest.raises(type(expected.value)) as found:
                wrong()
            assert str(found.value) == str(expected.value)


def test_freed_memory_is_not_read() -> None:
    x, form = torch.randn(4, 8, device=DEVICE), eager.layer(1)
    with triton_kernels():
        for _ in range(2):
            weight = torch.ones(8, device=DEVICE)
            assert eager.call(eager.OWN, x, weight, None, form, 1e-5, (), None) is not None
        weight.untyped_storage().resize_(0)
        assert eager.call(eager.OWN, x, weight, None, form, 1e-5, (), None) is None


def test_what_refers_to_negated_memory(made: list[int]) -> None:
    x = torch.randn(4, 8, device=DEVICE)
    layer = truenorm.LayerNorm(8).to(DEVICE)
    with triton_kernels():
        layer(x)
        assert torch.equal(layer(torch._neg_view(x)), layer(-x))
