"""What the tests of the recycled memory share."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import truenorm
import truenorm.functional as F
from truenorm._core import pool

only_native = pytest.mark.skipif(
    truenorm.info().pool is None, reason="without the library nothing is recycled"
)

CAP = 256
# float32 results of 8, 16 and 32 MiB: the least that is recycled, and more
ONE, TWO, FOUR = (1, 32, 256, 256), (2, 32, 256, 256), (4, 32, 256, 256)


@pytest.fixture
def pooled() -> Iterator[None]:
    gc.collect()
    before = statistics().cap_mib
    truenorm.empty_cache()
    pool.set_cap(CAP)
    yield
    truenorm.empty_cache()
    pool.set_cap(before)


def statistics() -> pool.Pool:
    pool = truenorm.info().pool
    assert pool is not None
    return pool


def result(shape: tuple[int, ...] = ONE, dtype: torch.dtype = torch.float32) -> Tensor:
    return F.instance_norm(torch.randn(shape, dtype=dtype))
