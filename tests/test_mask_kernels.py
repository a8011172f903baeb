"""The ways of the masked kernels: rows short and long, runs, scattered values, folded channels."""

from __future__ import annotations

import copy

import pytest
import torch
from test_mask import by_hand, laid_out, padded_with
from torch import Tensor, nn

import truenorm

# contiguous rows below and above those that are computed whole and of more than one piece, a batch
# that is too large for a cache; channels that are folded, that fill vectors, and several units
ROWS = [(3, 5, 37), (3, 4, 300), (3, 2, 5000), (5, 1, 110_000), (100, 3, 9)]
CHANNELS = [(3, 5, 37), (2, 70, 1100), (3, 19, 2500), (6, 130, 9)]


def positions(kind: str, n: int, size: int) -> Tensor:
    """Where values count; `mixed` has samples of every kind, of all values and of none."""
    at = torch.arange(size)
    lengths = at < (torch.arange(n)[:, None] * size) // max(n - 1, 1)
    kinds = {
        "lengths": lengths,
        "random": torch.rand(n, size) < 0.5,
        "rare": torch.rand(n, size) < 0.02,
        "runs": ((at + torch.arange(n)[:, None]) // 100 % 2 == 0).contiguous(),
        "few": ((at + torch.arange(n)[:, None]) // 20 % 3 == 1).contiguous(),
    }
    if kind != "mixed":
        return kinds[kind]
    rows = [*(each[n // 2] for each in kinds.values()), at >= 0, at < 0]
    return torch.stack([rows[i % len(rows)] for i in range(n)])


def layers(channels: int) -> list[nn.Module]:
    made: list[nn.Module] = [truenorm.BatchNorm1d(channels)]
    made.append(truenorm.InstanceNorm1d(channels, affine=True))
    made.extend(truenorm.GroupNorm(g, channels) for g in (2, 1) if channels % g == 0)
    for layer in made:
        nn.init.uniform_(layer.weight, -1.5, 1.5)  # type: ignore[arg-type]
        nn.init.uniform_(layer.bias, -1.5, 1.5)  # type: ignore[arg-type]
    return made


def check(shape: tuple[int, ...], kind: str, offset: float, channels_last: bool) -> None:
    mask = positions(kind, shape[0], shape[2])
    mask[0, : shape[2] // 2 + 2] = True  # several values in every channel, or what is left cancels
    for layer in layers(shape[1]):
        exact = copy.deepcopy(layer).double()
        values, grad = torch.randn(shape) * 2 + offset, torch.randn(shape)
        x = laid_out(padded_with(values, mask, float("nan")), channels_last).requires_grad_()
        wide = values.double().requires_grad_()
        y = layer(x, mask=mask)
        y.backward(laid_out(padded_with(grad, mask, float("nan")), channels_last))
        expected = by_hand(wide, mask, exact)
        expected.backward(padded_with(grad, mask, 0.0).double())
        assert x.grad is not None
        assert wide.grad is not None
        pairs = [(y, expected), (x.grad, wide.grad)]
        pairs += [(layer.weight.grad, exact.weight.grad), (layer.bias.grad, exact.bias.grad)]  # type: ignore[union-attr, list-item]
        # a sum of g · x̂ is about as large as the norm of g, unless it cancels
        norms = [0.0, 0.0, *[padded_with(grad, mask, 0.0).norm().item() / shape[1] ** 0.5] * 2]
        for (ours, theirs), norm in zip(pairs, norms, strict=True):
            scale = theirs.abs().max().clamp(min=norm)
            torch.testing.assert_close(ours.double() / scale, theirs / scale, rtol=0, atol=3e-6)
        outside = ~mask.unsqueeze(1).expand(shape)
        assert (y[outside] == 0).all()
        assert (x.grad[outside] == 0).all()


@pytest.mark.parametrize("kind", ["lengths", "random", "rare", "runs", "few", "mixed"])
@pytest.mark.parametrize("shape", ROWS, ids=str)
def test_rows(shape: tuple[int, ...], kind: str) -> None:
    check(shape, kind, 3.0, channels_last=False)


@pytest.mark.parametrize("kind", ["lengths", "random", "rare", "runs", "few", "mixed"])
@pytest.mark.parametrize("shape", CHANNELS, ids=str)
def test_channels(shape: tuple[int, ...], kind: str) -> None:
    check(shape, kind, 3.0, channels_last=True)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("kind", ["lengths", "random", "mixed"])
def test_far_from_zero(kind: str, channels_last: bool) -> None:
    # where sums about zero do not serve
    check((4, 4, 700), kind, 1e6, channels_last)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_types_hold_what_is_valid(dtype: torch.dtype, channels_last: bool) -> None:
    tolerance = {torch.float64: 1e-12, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
    for shape in ((3, 4, 37), (3, 4, 700), (2, 70, 300)):
        for kind in ("lengths", "random", "few"):
            mask = positions(kind, shape[0], shape[2])
            mask[0] = True
            for layer in layers(shape[1]):
                layer = layer.to(dtype)
                values = torch.randn(shape).to(dtype)
                x = laid_out(padded_with(values, mask, float("nan")), channels_last)
                expected = by_hand(values.double(), mask, copy.deepcopy(layer).double())
                y = layer(x, mask=mask, padding_value=-7.0)
                outside = ~mask.unsqueeze(1).expand(shape)
                assert (y[outside] == -7).all()
                y = torch.where(outside, 0, y).double()
                torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("kind", ["lengths", "random", "mixed"])
def test_a_large_batch_has_the_same_bits_for_any_number_of_threads(
    kind: str, channels_last: bool
) -> None:
    shape = (5, 1, 110_000)
    layer, x, grad = truenorm.BatchNorm1d(1), torch.randn(shape) + 2, torch.randn(shape)
    mask, found, before = positions(kind, 5, 110_000), [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            leaf = laid_out(x, channels_last).clone().requires_grad_()
            y = layer(leaf, mask=mask)
            found.append((y, *torch.autograd.grad(y, [leaf, layer.weight, layer.bias], grad)))
    finally:
        torch.set_num_threads(before)
    for others in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))
