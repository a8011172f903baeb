"""The short way of CUDA tensors under a mask, and with running statistics that are averages.

Beside the formula in float64, written out; the second call of a kind is a plan's.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from on_triton import DEVICE, PRETENDS, needs_triton, plans, triton_kernels
from test_triton_plans import long_way, same
from test_triton_plans_given import LAYERS, _built, by_plans, close, randn
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import truenorm
from truenorm import _triton
from truenorm._core import by_plan, eager
from truenorm._triton import config

pytestmark = [
    needs_triton,
    pytest.mark.skipif(PRETENDS, reason="a pretended GPU's tensors are a subclass"),
]


@pytest.fixture
def made() -> Iterator[list[int]]:
    torch.manual_seed(13)
    with plans() as counts:
        yield counts


def _valid(kind: str, x: Tensor) -> Tensor:
    """Of each kind some, and of one sample all."""
    rows = kind in ("LayerNorm", "RMSNorm")
    shape = x.shape[:-1] if rows else (x.shape[0], *x.shape[2:])
    mask = torch.rand(shape) > 0.3
    mask[0] = True
    return mask.to(DEVICE)


def _masked_exact(
    layer: Any, x: Tensor, mask: Tensor, beside: dict[str, Any], frozen: bool = False
) -> Tensor:
    """By the formula over what is valid, written out."""
    kind = type(layer).__name__
    rows = kind in ("LayerNorm", "RMSNorm")
    weight, bias = (
        None if p is None else p.double() for p in (layer.weight, getattr(layer, "bias", None))
    )
    if rows:
        valid = mask[..., None]
        y = F.rms_norm(x, (12,), weight, layer.eps)
        if kind == "LayerNorm":
            y = F.layer_norm(x, (12,), weight, bias)
    else:
        valid = mask[:, None]
        dims = {"BatchNorm2d": (0, 3, 4), "InstanceNorm2d": (3, 4), "GroupNorm": (2, 3, 4)}[kind]
        groups = 2 if kind == "GroupNorm" else 6
        v = x.unflatten(1, (groups, -1))
        w = valid.unflatten(1, (1, 1)).double().expand(v.shape)
        n = w.sum(dims, keepdim=True)
        mean = (v * w).sum(dims, keepdim=True) / n
        var = ((v - mean).square() * w).sum(dims, keepdim=True) / n
        if frozen:
            mean, var = (
                t.double()[:, None, None, None] for t in (layer.running_mean, layer.running_var)
            )
        y = ((v - mean) / (var + layer.eps).sqrt()).flatten(1, 2)
        if weight is not None:
            y = y * weight[:, None, None] + bias[:, None, None]
    if "residual" in beside:
        y = F.silu(y + beside["residual"])
    return torch.where(valid, y, 3.0)


@pytest.mark.parametrize("more", [False, True])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", LAYERS)
def test_masks(kind: str, training: bool, more: bool, made: list[int]) -> None:
    layer, shape = _built(kind), LAYERS[kind][1]
    layer.activation = "silu" if more else None
    x, grad, residual = (randn(*shape) for _ in range(3))
    mask, other = _valid(kind, x), _valid(kind, x)
    frozen = kind == "BatchNorm2d" and not training
    beside = {"residual": residual} if more else {}

    def run(mask: Tensor = mask) -> list[Tensor]:
        own = copy.deepcopy(layer).train(training)
        leaf = x.detach().requires_grad_()
        y = own(leaf, mask=mask, padding_value=3.0, **beside)
        found = torch.autograd.grad(y, [leaf, *own.parameters()], grad)
        return [y.detach(), *found, *(b.clone() for b in own.buffers())]

    with triton_kernels():
        if frozen:
            # their record counts what is valid, by torch's operators
            found = long_way(run)
            for _ in range(2):
                same(run(), found)
        else:
            found = by_plans(run, 2 + (kind == "BatchNorm2d"), made)
        again = run(other)
        with torch.no_grad():
            made.clear()
            y = copy.deepcopy(layer)
            y = [y.train(training)(x, mask=mask, padding_value=3.0, **beside) for _ in range(2)]
            assert len(made) >= 1
            assert all(torch.equal(each, found[0]) for each in y)
    for valid, got in ((mask, found), (other, again)):
        leaf = x.double().requires_grad_()
        wide = {k: t.double() for k, t in beside.items()}
        exact = _masked_exact(layer, leaf, valid, wide, frozen)
        of_x, *rest = torch.autograd.grad(exact, [leaf, *layer.parameters()], grad.double())
        close(got[: 2 + len(rest)], [exact, of_x, *(t.double() for t in rest)])


@pytest.mark.parametrize("kind", ["LayerNorm", "BatchNorm2d", "GroupNorm"])
def test_lengths_and_layouts(kind: str, made: list[int]) -> None:
    """Of what lies otherwise, whose mask is put in another order."""
    layer, shape = _built(kind), LAYERS[kind][1]
    if kind == "LayerNorm":
        x = randn(shape[1], shape[0], shape[2]).transpose(0, 1)
    else:
        x = randn(*shape[:2], shape[3], shape[2]).transpose(2, 3)
    mask, grad = _valid(kind, x), randn(1).expand(shape)

    def run() -> list[Tensor]:
        own, leaf = copy.deepcopy(layer), x.detach().requires_grad_()
        y = own(leaf, mask=mask, padding_value=3.0)
        return [y.detach(), *torch.autograd.grad(y, [leaf, *own.parameters()], grad)]

    with triton_kernels():
        found = by_plans(run, 2 + (kind == "BatchNorm2d"), made)
    leaf = x.double().requires_grad_()
    y = _masked_exact(layer, leaf, mask, {})
    wanted = torch.autograd.grad(y, [leaf, *layer.parameters()], grad.double())
    close(found, [y, *(t.double() for t in wanted)])


@pytest.mark.parametrize("padding", [0.0, -0.0, float("nan"), float("-inf")])
def test_a_padding_value_is_part_of_a_kind(padding: float) -> None:
    layer, x = truenorm.LayerNorm(8, elementwise_affine=False).to(DEVICE), randn(3, 8)
    mask = torch.tensor([True, False, True]).to(DEVICE)
    with triton_kernels(), torch.no_grad():
        for value in (1.5, padding, 0.0, padding):
            y = layer(x, mask=mask, padding_value=value)[1]
            wanted = torch.full((8,), value, device=DEVICE)
            torch.testing.assert_close(y, wanted, rtol=0, atol=0, equal_nan=True)
            assert torch.equal(torch.signbit(y), torch.signbit(wanted))


# ---------------------------------------------------------------- averages


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("count", [0, 3])
def test_averages(count: int, masked: bool, made: list[int]) -> None:
    """momentum None: of all batches, which are counted."""
    layer, x, grad = truenorm.BatchNorm2d(6, momentum=None).to(DEVICE), randn(4, 6, 3, 4), 0.5
    layer.num_batches_tracked.fill_(count)
    mask = {"mask": torch.ones(4, 3, 4, dtype=torch.bool, device=DEVICE)} if masked else {}

    def run(batches: int = 1) -> list[Tensor]:
        own, found = copy.deepcopy(layer), []
        for i in range(batches):
            leaf = (x + i).detach().requires_grad_()
            y = own(leaf, **mask)
            found += [y.detach(), *torch.autograd.grad(y, leaf, torch.full_like(y, grad))]
        return [*found, *(b.clone() for b in own.buffers())]

    with triton_kernels():
        by_plans(run, 3 if masked else 2, made)
        found = run(3)[-3:]
    theirs = torch.nn.BatchNorm2d(6, momentum=None).double().to(DEVICE)
    theirs.num_batches_tracked.fill_(count)
    for i in range(3):
        theirs((x + i).double())
    close(found[:2], [theirs.running_mean, theirs.running_var])
    assert found[2].item() == count + 3


def test_an_average_is_not_any_momentum(made: list[int]) -> None:
    """Without a count, and beside what is no number."""
    x = randn(4, 6)
    with triton_kernels():
        for momentum in (0.0, None, 1.0, None):
            layer = truenorm.BatchNorm1d(6, momentum=momentum).to(DEVICE)
            for _ in range(2):
                layer(x)
            mean = {0.0: 0.0, 1.0: 1.0, None: 1.0}[momentum] * x.mean(0)
            torch.testing.assert_close(layer.running_mean, mean, rtol=1e-5, atol=1e-6)
        mean, var = torch.zeros(6, device=DEVICE), torch.ones(6, device=DEVICE)
        args = x, mean, var, None, None, True
        truenorm.functional.batch_norm(*args, momentum=float("nan"))
        assert mean.isnan().all()


def test_any_nan_is_an_average() -> None:
    x = randn(4, 6)
    with triton_kernels():
        config.CALLS.clear()
        for batches in (1, 2):
            mean, var = torch.zeros(6, device=DEVICE), torch.ones(6, device=DEVICE)
            count = torch.tensor(0, device=DEVICE)
            for _ in range(batches):
                running = mean, var, count, float("nan")
                y = eager.call(eager.MOVING, x, None, None, eager.BATCH, 1e-5, running, None)
                assert y is not None
            torch.testing.assert_close(mean, x.mean(0), rtol=1e-5, atol=1e-6)
            assert count.item() == batches
        assert len(config.CALLS) == 1


# ---------------------------------------------------------------- what moves, and when


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_batch_that_is_computed_again_moves_nothing(use_reentrant: bool) -> None:
    layer, x = truenorm.BatchNorm1d(6).to(DEVICE), randn(4, 6, 5)
    mask = torch.ones(4, 5, dtype=torch.bool, device=DEVICE)
    plain = copy.deepcopy(layer)
    with triton_kernels():
        for _ in range(3):
            plain(x, mask=mask)
            leaf = x.detach().requires_grad_()
            y = checkpoint(lambda t: layer(t, mask=mask), leaf, use_reentrant=use_reentrant)
            y.square().sum().backward()
    same(layer.state_dict().values(), plain.state_dict().values())


def test_a_batch_that_is_not_finite_is_skipped() -> None:
    """By torch's operators, which no plan has."""
    layer, x = truenorm.BatchNorm1d(6).to(DEVICE), randn(4, 6, 5)
    layer.skip_nonfinite = True
    mask = torch.ones(4, 5, dtype=torch.bool, device=DEVICE)
    with triton_kernels():
        for value in (0.0, torch.inf, 0.0, torch.nan):
            before = copy.deepcopy(layer.state_dict())
            layer(x + value, mask=mask)
            moved = not torch.equal(layer.running_mean, before["running_mean"])
            assert moved == (value == 0.0)
        assert layer.num_batches_tracked == 2


def test_where_somebody_looks_on(monkeypatch: pytest.MonkeyPatch) -> None:
    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):  # type: ignore[no-untyped-def]
            return func(*args, **(kwargs or {}))

    of_gpu: Any = SimpleNamespace(is_cuda=True)
    monkeypatch.setattr(_triton, "WHY_NOT", "")
    assert by_plan.serves(of_gpu)
    with Mode():
        assert not by_plan.serves(of_gpu)
    assert not by_plan.serves(torch.ones(2))
    monkeypatch.setattr(_triton, "WHY_NOT", "no Triton")
    assert not by_plan.serves(of_gpu)
