"""The recycled memory of large results: reused, bounded, shared by no two live tensors."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from pooling import CAP, FOUR, ONE, TWO, only_native, pooled, result, statistics  # noqa: F401
from torch import Tensor

import truenorm
import truenorm.functional as F
from truenorm._core import pool

pytestmark = [only_native, pytest.mark.usefixtures("pooled")]


@pytest.mark.parametrize("shape", [ONE, TWO, FOUR])
def test_memory_of_a_dead_result_is_used_again(shape: tuple[int, ...]) -> None:
    y = result(shape)
    assert y.data_ptr() % 4096 == 0
    address, before = y.data_ptr(), statistics()
    del y
    assert statistics().idle_buffers == 1
    assert statistics().idle_mib == torch.Size(shape).numel() * 4 / 2**20
    assert result(shape).data_ptr() == address
    assert statistics().hits == before.hits + 1
    assert statistics().misses == before.misses


def test_the_newest_of_a_size_comes_first() -> None:
    first, second = result(), result()
    address = first.data_ptr()
    del second
    del first
    assert result().data_ptr() == address


def test_a_larger_buffer_serves_a_size_up_to_a_quarter_below() -> None:
    x = torch.randn(10, 32, 128, 128)
    address = F.instance_norm(x).data_ptr()
    y = F.instance_norm(x[:8])
    assert y.data_ptr() == address
    # what the storage says is what was asked for, or views and copies would see more
    assert y.untyped_storage().nbytes() == 16 << 20
    del y
    assert F.instance_norm(x[:7]).data_ptr() != address


def test_an_exact_size_is_preferred_to_a_newer_larger_one() -> None:
    x = torch.randn(9, 32, 128, 128)
    small, large = F.instance_norm(x[:8]), F.instance_norm(x)
    address = small.data_ptr()
    del small
    del large
    assert F.instance_norm(x[:8]).data_ptr() == address


def test_small_results_are_left_to_the_heap() -> None:
    before = statistics()
    result((1, 31, 256, 256))
    assert statistics() == before


def test_the_cap_is_kept_and_the_oldest_go_first() -> None:
    pool.set_cap(24)
    alive = [result() for _ in range(5)]
    addresses = [y.data_ptr() for y in alive]
    for _ in range(5):
        alive.pop(0)
        assert statistics().idle_mib <= 24
    assert statistics().idle_buffers == 3
    found = [result() for _ in range(3)]
    assert [y.data_ptr() for y in found] == addresses[:1:-1]


def test_a_buffer_above_the_cap_pushes_no_other_out() -> None:
    pool.set_cap(24)
    result(ONE)
    result(FOUR)
    assert (statistics().idle_mib, statistics().idle_buffers) == (8, 1)


def test_lowering_the_cap_gives_back_at_once() -> None:
    result(FOUR)
    pool.set_cap(31)
    assert statistics().idle_buffers == 0


def test_off() -> None:
    pool.set_cap(0)
    before = statistics()
    y = result(FOUR)
    y.resize_(5, 32, 256, 256)
    del y
    assert statistics() == before
    assert str(before) == "off"


def test_a_live_result_outlives_its_pool() -> None:
    x = torch.randn(FOUR)
    y, expected = F.instance_norm(x), F.instance_norm(x).clone()
    pool.set_cap(0)
    assert torch.equal(y, expected)
    del y
    assert statistics().idle_buffers == 0


def test_empty_cache() -> None:
    y = result(FOUR)
    expected = y.clone()
    result(FOUR)
    assert statistics().idle_mib == 32
    truenorm.empty_cache()
    assert (statistics().idle_mib, statistics().idle_buffers) == (0, 0)
    assert torch.equal(y, expected)


def test_two_live_results_share_no_memory() -> None:
    alive: list[Tensor] = []
    for i in range(200):
        alive.append(result((ONE, TWO, FOUR)[i % 3]))
        if i % 5 == 4:
            del alive[i % len(alive)], alive[0]
        spans = sorted((y.data_ptr(), y.data_ptr() + y.untyped_storage().nbytes()) for y in alive)
        assert all(a[1] <= b[0] for a, b in pairwise(spans))
        del alive[12:]


LAYERS: list[Callable[[], Any]] = [
    lambda: truenorm.BatchNorm2d(16),
    lambda: truenorm.InstanceNorm2d(16, affine=True),
    lambda: truenorm.GroupNorm(4, 16),
    lambda: truenorm.LayerNorm([106, 110]),
    lambda: truenorm.RMSNorm(110),
    lambda: truenorm.LocalResponseNorm(3),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("build", LAYERS)
def test_the_same_bits_and_layout_on_and_off(
    build: Callable[[], Any], format: torch.memory_format, dtype: torch.dtype
) -> None:
    layer = build()
    x = torch.randn(24, 16, 106, 110).to(dtype, memory_format=format).requires_grad_()
    grad = torch.randn(x.shape).to(dtype, memory_format=format)
    found = []
    for cap in (0, CAP, CAP):
        pool.set_cap(cap)
        y = layer(x)
        found.append((y, torch.autograd.grad(y, [x, *layer.parameters()], grad)))
    (expected, gradients), *others = found
    for y, of in others:
        assert (y.device, y.dtype, y.stride()) == (expected.device, dtype, expected.stride())
        assert torch.equal(y, expected)
        for one, other in zip(of, gradients, strict=True):
            assert torch.equal(one, other)
            assert one.stride() == other.stride()


def test_a_training_loop_stops_missing() -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        truenorm.BatchNorm2d(4),
        torch.nn.ReLU(),
        torch.nn.Conv2d(4, 8, 3, padding=1),
        truenorm.InstanceNorm2d(8, affine=True),
        torch.nn.ReLU(inplace=True),
        truenorm.GroupNorm(2, 8),
    )
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    x = torch.randn(8, 4, 256, 256, requires_grad=True)
    seen = []
    for _ in range(6):
        net(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        x.grad = None
        seen.append(statistics())
    hits = [b.hits - a.hits for a, b in pairwise(seen)]
    misses = [b.misses - a.misses for a, b in pairwise(seen)]
    # three outputs and three input gradients a step
    assert (hits[-3:], misses[-3:]) == ([6, 6, 6], [0, 0, 0])
