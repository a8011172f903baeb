"""The short way of CUDA tensors for what a call is given in other ways than kernels take it.

Beside a float64 formula or torch's own modules; the second call of a kind is a plan's.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from on_triton import DEVICE, PRETENDS, needs_triton, plans, small_tiles, triton_kernels
from test_triton_plans import long_way, same
from torch import Tensor

import truenorm
from truenorm._triton import config

pytestmark = [
    needs_triton,
    pytest.mark.skipif(PRETENDS, reason="a pretended GPU's tensors are a subclass"),
]


@pytest.fixture
def made() -> Iterator[list[int]]:
    torch.manual_seed(7)
    with plans() as counts:
        yield counts


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype).to(DEVICE)


def close(found: Any, wanted: Any) -> None:
    """Beside what was computed in float64."""
    for got, exact in zip(found, (t.detach() for t in wanted), strict=True):
        scale = max(float(exact.abs().max()), 1.0)
        bound = {torch.bfloat16: 2e-2, torch.float16: 3e-3}.get(got.dtype, 1e-5)
        assert got.shape == exact.shape
        torch.testing.assert_close(got.double(), exact, rtol=bound, atol=bound * scale)


def by_plans(run: Callable[[], list[Tensor]], calls: int, made: list[int]) -> list[Tensor]:
    """What the long way, a first call and a plan's call give alike; calls: by plans."""
    expected = long_way(run)
    first = run()
    made.clear()
    found = run()
    assert len(made) == calls, made
    assert None not in config.CALLS.values()
    same(first, expected)
    same(found, expected)
    return found


# ---------------------------------------------------------------- what is copied first

LAYERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "LayerNorm": ((12,), (4, 6, 12)),
    "RMSNorm": ((12,), (4, 6, 12)),
    "GroupNorm": ((2, 6), (4, 6, 3, 4)),
    "BatchNorm2d": ((6,), (4, 6, 3, 4)),
    "InstanceNorm2d": ((6,), (4, 6, 3, 4)),
}


def _misaligned(t: Tensor) -> Tensor:
    return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)


# how it comes to a backward: zero strides are a sum's, the rest other operators'
GRADS: dict[str, Callable[[Tensor], Tensor]] = {
    "of a sum": lambda g: g.flatten()[:1].view((1,) * g.dim()).expand(g.shape),
    "of a sum over rows": lambda g: g[:1].expand(g.shape),
    "of a mean of positions": lambda g: g[..., :1].expand(g.shape),
    "turned": lambda g: g.transpose(0, 1).contiguous().transpose(0, 1),
    "of channels inside": lambda g: g.movedim(1, -1).contiguous().movedim(-1, 1),
    "sliced": lambda g: torch.stack([g, g], -1)[..., 0],
    "misaligned": _misaligned,
}


def _step(layer: Any, x: Tensor, grad: Tensor) -> list[Tensor]:
    leaf = x.detach().requires_grad_()
    y = layer(leaf)
    return [y.detach(), *torch.autograd.grad(y, [leaf, *layer.parameters()], grad)]


def _exact(layer: Any, x: Tensor, grad: Tensor) -> list[Tensor]:
    """By torch's module in float64."""
    kind = type(layer).__name__
    theirs = getattr(torch.nn, kind)(*LAYERS[kind][0]).double()
    theirs.load_state_dict(layer.state_dict(), strict=False)
    return _step(theirs.to(x.device), x.double(), grad.double())


def _built(kind: str, dtype: torch.dtype = torch.float32) -> Any:
    layer = getattr(truenorm, kind)(*LAYERS[kind][0])
    for p in layer.parameters():
        torch.nn.init.normal_(p)
    return layer.to(dtype).to(DEVICE)


@pytest.mark.parametrize("lies", GRADS)
@pytest.mark.parametrize("kind", LAYERS)
def test_gradients_that_are_copied(kind: str, lies: str, made: list[int]) -> None:
    layer, shape = _built(kind), LAYERS[kind][1]
    x, grad = randn(*shape), GRADS[lies](randn(*shape))
    with triton_kernels():
        found = by_plans(lambda: _step(copy.deepcopy(layer), x, grad), 2, made)
        # of the same kind, and another
        other = GRADS[lies](randn(*shape))
        close(_step(layer, x, other), _exact(layer, x, other))
    close(found, _exact(layer, x, grad))


def test_the_gradient_of_a_sum(made: list[int]) -> None:
    layer, x = _built("LayerNorm"), randn(4, 6, 12)
    by = randn(4, 6, 12)

    def run(layer: Any = layer, x: Tensor = x, by: Tensor = by) -> list[Tensor]:
        leaf = x.detach().requires_grad_()
        # of the layer, and of what comes before it, whose gradient is then no constant
        layer(leaf * by).sum().backward()
        found = [leaf.grad, *(p.grad for p in layer.parameters())]
        layer.zero_grad()
        return found  # type: ignore[return-value]

    with triton_kernels():
        found = by_plans(run, 2, made)
    theirs = torch.nn.LayerNorm(12).double().to(DEVICE)
    theirs.load_state_dict(layer.state_dict())
    # the gradient of the input is a small difference of large numbers
    close(found[1:], run(theirs, x.double(), by.double())[1:])
    wanted = run(theirs, x.double(), by.double())[0]
    torch.testing.assert_close(found[0].double(), wanted, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("of_grad", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_of_another_dtype(
    dtype: torch.dtype, of_grad: torch.dtype, made: list[int]
) -> None:  # fmt: skip
    """As an operator's backward may be given; autograd itself casts before."""
    from truenorm._core import planned
    from truenorm._core.call import KEEP

    x, grad, weight = randn(4, 12, dtype=dtype), randn(4, 12, dtype=of_grad), randn(12)
    form = truenorm._core.eager.layer(1)
    with triton_kernels():
        y = torch.ops.truenorm.norm(x, weight, *[None] * 5, form | KEEP, 1e-5, 0.0, 0.0)
        args = y[1], form | 7, 1e-5, 0.0
        wanted = planned._backward(grad, *args, x, weight)
        found = planned._backward(grad, *args, x, weight)
        same(found[:3], wanted[:3])
        assert len(made) == 1
    leaves = [t.double().requires_grad_() for t in (x, weight)]
    exact = torch.nn.functional.layer_norm(leaves[0], (12,), leaves[1])
    close(found[:2], torch.autograd.grad(exact, leaves, grad.to(dtype).double()))


INPUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "sliced": lambda t: torch.stack([t, t + 1], -1)[..., 0],
    "misaligned": _misaligned,
    "turned": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "expanded": lambda t: t[:1].expand(t.shape),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lies", INPUTS)
@pytest.mark.parametrize("kind", LAYERS)
def test_inputs_that_are_copied(
    kind: str, lies: str, dtype: torch.dtype, made: list[int]
) -> None:  # fmt: skip
    layer, shape = _built(kind, dtype), LAYERS[kind][1]
    x, grad = INPUTS[lies](randn(*shape, dtype=dtype)), randn(*shape, dtype=dtype)
    assert not x.is_contiguous() or x.data_ptr() % 16
    with triton_kernels():
        found = by_plans(lambda: _step(copy.deepcopy(layer), x, grad), 2, made)
        other = INPUTS[lies](randn(*shape, dtype=dtype))
        close(_step(layer, other, grad), _exact(layer, other, grad))
    close(found, _exact(layer, x, grad))


@pytest.mark.parametrize("lies", INPUTS)
def test_inputs_that_are_copied_for_several_launches(lies: str, made: list[int]) -> None:
    for kind in ("LayerNorm", "BatchNorm2d"):
        layer, shape = _built(kind), LAYERS[kind][1]
        x, grad = INPUTS[lies](randn(*shape)), INPUTS[lies](randn(*shape))
        with small_tiles(), triton_kernels():
            found = by_plans(lambda: _step(copy.deepcopy(layer), x, grad), 2, made)  # noqa: B023
        close(found, _exact(layer, x, grad))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["LayerNorm", "BatchNorm2d"])
def test_weights_and_statistics_that_are_copied(
    kind: str, dtype: torch.dtype, made: list[int]
) -> None:  # fmt: skip
    """And running statistics that are written back."""
    layer, shape = _built(kind), LAYERS[kind][1]
    size = layer.weight.numel()
    layer.weight = torch.nn.Parameter(randn(size * 2).to(dtype)[::2])
    layer.bias = torch.nn.Parameter(_misaligned(randn(size)))
    x, grad = randn(*shape), randn(*shape)
    with triton_kernels():
        if kind == "BatchNorm2d":
            room = torch.ones(2, size, 2, device=DEVICE)
            layer.running_mean, layer.running_var = room[0, :, 0], room[1, :, 0]
            # torch's deepcopy keeps the strides
            assert copy.deepcopy(layer).running_mean.stride() == (2,)

        def run() -> list[Tensor]:
            own = copy.deepcopy(layer)
            return [*_step(own, x, grad), *(b.contiguous() for b in own.buffers())]

        found = by_plans(run, 2, made)
    close(found[:4], _exact(layer, x, grad))
    if kind == "BatchNorm2d":
        theirs = torch.nn.BatchNorm2d(size).to(DEVICE).double()
        theirs.running_mean.fill_(1.0)
        theirs(x.double())
        close(found[4:6], [theirs.running_mean, theirs.running_var])


def test_nothing_of_a_plan_is_in_a_graph(made: list[int]) -> None:
    """What is copied asks for a gradient; its copies do not, nor are they kept."""
    layer, x = _built("LayerNorm"), _misaligned(randn(4, 6, 12)).requires_grad_()
    with triton_kernels():
        for _ in range(3):
            y = layer(x)
            assert type(y.grad_fn).__name__ == "NormBackward"
            names = {type(f).__name__ for f, _ in y.grad_fn.next_functions if f is not None}
            assert names == {"AccumulateGrad", "ViewBackward0"} or names == {"AccumulateGrad"}
            assert not y._is_view()
            y.add_(1.0)
    assert made
