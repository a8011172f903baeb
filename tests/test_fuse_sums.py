"""fuse: a sum and the norm of it, h = x + r and norm(h), in one pass."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import randomize
from torch import Tensor, nn

import truenorm
from truenorm._core import added
from truenorm._models.fusing import sums

FEATURES = 96


def past_limit(dtype: torch.dtype = torch.float32) -> tuple[int, ...]:
    """Of a little more than the bytes from which on sums alone are looked for."""
    return 8, -(-sums.LARGE // (8 * FEATURES * dtype.itemsize)), FEATURES


LARGE = past_limit()


class Block(nn.Module):
    """A transformer's, without its attention; `how` picks the way it is written."""

    def __init__(self, how: str, norm: Callable[[int], nn.Module] = nn.LayerNorm) -> None:
        super().__init__()
        self.how = how
        self.norm1, self.norm2 = norm(FEATURES), norm(FEATURES)
        self.mix, self.mlp = nn.Linear(FEATURES, FEATURES), nn.Linear(FEATURES, FEATURES)
        self.drop = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Any:
        if self.how == "first":
            x = x + self.mix(self.norm1(x))
            return x + self.mlp(self.norm2(x))
        if self.how == "last":
            x = self.norm1(torch.add(x, self.mix(x)))
            return self.norm2(self.mlp(x).add(x))
        if self.how == "dropped":
            x = self.drop(x + self.mix(self.norm1(x)))
            return self.mlp(self.norm2(x)).sigmoid() * x
        if self.how == "in place":
            x = self.mix(self.norm1(x))
            x += self.mlp(x)
            return self.norm2(x)
        if self.how == "overwritten":
            h = x + self.mix(self.norm1(x))
            h.mul_(2.0)
            return self.norm2(h) + h
        if self.how == "handed to a module":
            h = x + self.mix(self.norm1(x))
            y = self.mlp(h)
            return self.norm2(h) + y
        if self.how == "scaled":
            return self.norm2(torch.add(x, self.mix(x), alpha=0.5))
        return self.norm2(x + 1.0) + self.norm1(x)


FOUND = {"first": 1, "last": 2, "dropped": 1}
LEFT = ("in place", "overwritten", "handed to a module", "scaled", "a number")


def passes(run: Callable[[], Any]) -> int:
    """How many sums and norms were one pass."""
    count = 0
    original = added.by_bits

    def by_bits(*args: Any) -> Any:
        nonlocal count
        made = original(*args)
        count += made is not None
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(added, "by_bits", by_bits)
        run()
    return count


def pair(model: nn.Module) -> tuple[Any, Any]:
    theirs = truenorm.convert(randomize(model))
    return theirs, truenorm.fuse(copy.deepcopy(theirs))


def gradients(model: nn.Module, x: Tensor, grad: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    y = model(x)
    leaves = [x, *(p for p in model.parameters() if p.requires_grad)]
    found = torch.autograd.grad(y, leaves, grad, allow_unused=True)
    return [y, *(g for g in found if g is not None)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
@pytest.mark.parametrize("how", FOUND)
def test_blocks(how: str, norm: Callable[[int], nn.Module], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    plain = randomize(Block(how, norm)).to(dtype)
    fused = truenorm.fuse(truenorm.convert(copy.deepcopy(plain)))
    assert type(fused) is not Block
    x, grad = (torch.randn(past_limit(dtype), dtype=dtype) for _ in range(2))
    found: list[Tensor] = []
    assert passes(lambda: found.extend(gradients(fused, x, grad))) == FOUND[how]
    # torch's own layers in float64 are the judge, and rounding in between is what it is
    wide = gradients(copy.deepcopy(plain).double(), x.double(), grad.double())
    unit = torch.finfo(dtype).eps
    for one, other in zip(found, wide, strict=True):
        assert one.dtype == dtype
        assert (one.double() - other).norm() < 20 * unit * other.norm()
    small = torch.randn(2, 3, FEATURES, dtype=dtype)
    assert passes(lambda: fused(small)) == 0
    unfused = truenorm.unfuse(copy.deepcopy(fused))
    assert torch.equal(fused(small), unfused(small))
    with torch.no_grad():
        assert torch.equal(fused(x), unfused(x))


@pytest.mark.parametrize("how", LEFT)
def test_what_is_left(how: str) -> None:
    as_it_was, fused = pair(Block(how))
    assert type(fused) is Block
    x = torch.randn(LARGE)
    with torch.no_grad():
        assert torch.equal(fused(x), as_it_was(x))


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(FEATURES)

    def forward(self, x: Any, r: Any) -> Any:
        h = x + r
        return self.norm(h), h


@torch.no_grad()
def test_what_torch_adds_otherwise_is_as_written() -> None:
    as_it_was, fused = pair(Two())
    assert type(fused) is not Two
    x, r = torch.randn(LARGE), torch.randn(LARGE)
    turned = x.transpose(0, 1).contiguous().transpose(0, 1)
    cases: list[tuple[Any, Any, int]] = [
        (x, r, 1), (x, x, 1), (x, r[:1], 0), (x, r.bfloat16(), 0), (turned, r, 0),
        (x[:1], r[:1], 0), (x.expand(2, *LARGE), r, 0),
    ]  # fmt: skip
    for one, other, count in cases:
        wanted = as_it_was(one, other)
        assert passes(lambda one=one, other=other: fused(one, other)) == count  # type: ignore[misc]
        for a, b in zip(fused(one, other), wanted, strict=True):
            assert a.dtype == b.dtype
            assert a.stride() == b.stride()
            assert torch.equal(a, b)
    with torch.autocast("cpu", torch.bfloat16):
        for a, b in zip(fused(x, r), as_it_was(x, r), strict=True):
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b)
    with pytest.raises(TypeError, match="unsupported operand"):
        fused(x, None)


@torch.no_grad()
def test_changes_are_noticed() -> None:
    as_it_was, fused = pair(Two())
    x, r = torch.randn(LARGE), torch.randn(LARGE)
    seen: list[Tensor] = []
    handle = fused.norm.register_forward_hook(lambda m, args, y: seen.append(y))
    assert passes(lambda: fused(x, r)) == 0
    assert len(seen) == 1
    handle.remove()
    assert passes(lambda: fused(x, r)) == 1
    fused.norm.activation = "relu"
    assert passes(lambda: fused(x, r)) == 0
    assert fused(x, r)[0].min() == 0
    fused.norm.activation = None
    fused.norm.overwrite_input = True
    assert passes(lambda: fused(x, r)) == 0
    fused.norm = nn.Identity()
    assert torch.equal(fused(x, r)[0], x + r)
    twin = truenorm.fuse(as_it_was)
    assert passes(lambda: twin(x, r)) == 1
    with truenorm.recompute_outputs():
        assert passes(lambda: twin(x, r)) == 0


def test_a_layer_that_overwrites_is_left() -> None:
    model = truenorm.convert(Two())
    model.norm.overwrite_input = True
    assert type(truenorm.fuse(model)) is Two


@torch.no_grad()
def test_one_sum_of_two_norms() -> None:
    class Parallel(Block):
        def forward(self, x: Tensor) -> Any:
            h = x + self.mix(x)
            return self.norm1(h), self.norm2(h), h

    as_it_was, fused = pair(Parallel("first"))
    x = torch.randn(LARGE)
    found: list[Tensor] = []
    assert passes(lambda: found.extend(fused(x))) == 1
    for one, other in zip(found, as_it_was(x), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_compiled() -> None:
    as_it_was, fused = pair(nn.Sequential(Block("first"), Block("last")))
    x, grad = torch.randn(LARGE), torch.randn(LARGE)
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    for one, other in zip(gradients(compiled, x, grad), gradients(as_it_was, x, grad), strict=True):
        torch.testing.assert_close(
            one, other, rtol=1e-4, atol=1e-4 * float(other.detach().abs().max())
        )
    torch.compiler.reset()


def test_every_way_of_adding_has_a_call() -> None:
    x, r = torch.randn(2, 3), torch.randn(2, 3)
    for add, call in sums._BY.items():
        y, h = call(nn.Tanh(), x, r)
        assert torch.equal(h, x.add(r) if add == "add" else add(x, r))
        assert torch.equal(y, h.tanh())
    assert operator.iadd not in sums._BY


def test_a_small_input_is_not_looked_at_further() -> None:
    """Where nothing but sums was found; a forward with an activation pays at any size."""
    fused = truenorm.fuse(truenorm.convert(Block("first")))
    holds = fused._truenorm_plan.holds  # type: ignore[union-attr, operator]
    large = torch.randn(LARGE)
    inputs = torch.randn(2, 7, FEATURES), large[:, 1:].contiguous(), large
    assert [holds(fused, x) for x in inputs] == [False, False, True]
    assert [passes(lambda x=x: fused(x)) for x in inputs] == [0, 0, 1]  # type: ignore[misc]
    both = nn.Sequential(Block("first"), nn.BatchNorm1d(7), nn.ReLU())
    fused = truenorm.fuse(truenorm.convert(both))
    assert fused._truenorm_plan.holds(fused, inputs[0])  # type: ignore[union-attr, operator]
