"""A result over recycled memory does what an ordinary tensor does, but for growing."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from pooling import CAP, FOUR, ONE, TWO, only_native, pooled, result, statistics  # noqa: F401
from torch import Tensor, multiprocessing

import truenorm.functional as F

pytestmark = [only_native, pytest.mark.usefixtures("pooled")]


@pytest.mark.parametrize(
    "keep",
    [
        lambda y: y[0, 0, 0, :3],
        lambda y: y.view(-1),
        lambda y: y.detach(),
        lambda y: y.numpy(),
        lambda y: torch.from_dlpack(y),
        lambda y: y.untyped_storage(),
    ],
    ids=["slice", "view", "detach", "numpy", "dlpack", "storage"],
)
def test_whatever_looks_into_a_result_keeps_its_memory(keep: Callable[[Tensor], Any]) -> None:
    y = result()
    address, kept = y.data_ptr(), keep(y)
    expected = copy.deepcopy(kept)
    del y
    assert statistics().idle_buffers == 0
    others = [result() for _ in range(3)]
    assert address not in [y.data_ptr() for y in others]
    assert np.array_equal(np.asarray(kept), np.asarray(expected))
    del kept
    assert statistics().idle_buffers == 1


def test_sent_to_another_process() -> None:
    queue = multiprocessing.SimpleQueue()
    y = result()
    expected = y.clone()
    queue.put(y)
    # the sender's tensor moves to shared memory, and its buffer is free
    assert y.is_shared()
    assert statistics().idle_buffers == 1
    assert torch.equal(queue.get(), expected)
    assert torch.equal(y, expected)


def test_share_memory() -> None:
    y = result()
    expected = y.clone()
    assert y.share_memory_().is_shared()
    assert torch.equal(y, expected)
    # shared memory took its place: the buffer is free
    assert statistics().idle_buffers == 1


def test_save_and_copy() -> None:
    y = result()
    file = io.BytesIO()
    torch.save(y, file)
    assert file.tell() < y.untyped_storage().nbytes() + 65536
    file.seek(0)
    assert torch.equal(torch.load(file), y)
    twin = copy.deepcopy(y)
    assert torch.equal(twin, y)
    assert twin.data_ptr() != y.data_ptr()


def test_numpy_reads_and_writes_the_same_memory() -> None:
    y = result()
    array = y.numpy()
    array[0, 0, 0, 0] = 7.0
    assert y[0, 0, 0, 0] == 7.0
    assert torch.from_numpy(array).data_ptr() == y.data_ptr()


def test_in_place_operations() -> None:
    x = torch.randn(ONE, requires_grad=True)
    y = F.instance_norm(x)
    expected = torch.relu(y.detach().clone())
    y.relu_()
    assert torch.equal(y, expected)
    y.backward(torch.randn_like(y))
    z = result()
    z.set_(torch.ones(3))
    assert z.shape == (3,)
    assert statistics().idle_buffers > 0


def test_resize() -> None:
    y = result(TWO)
    expected = y[0].clone()
    assert torch.equal(y.resize_(32, 256, 256), expected)
    assert result(TWO).clone().resize_(FOUR).shape == FOUR
    # its storage is not torch's own and cannot grow, as one from numpy cannot; what torch leaves
    # behind then has the new sizes over the old storage, here as there
    with pytest.raises(RuntimeError, match="not resizable"):
        y.resize_(FOUR)
