"""The time of a call on a CUDA device, for `truenorm bench` and `truenorm.tune`."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

import torch

Run = Callable[[], object]


class Clock(Protocol):
    """Seconds of one call; tests put another in the device's place."""

    def __call__(self, run: Run, *, small: bool) -> float: ...


class DeviceClock:
    """Events around one call, or the wall clock around many."""

    def __init__(self) -> None:
        l2 = torch.cuda.get_device_properties(0).L2_cache_size
        self._flush = torch.zeros(max(2**28, 4 * l2) // 4, device="cuda")
        self._start = torch.cuda.Event(enable_timing=True)
        self._end = torch.cuda.Event(enable_timing=True)

    def __call__(self, run: Run, *, small: bool) -> float:
        if small:
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(100):
                run()
            torch.cuda.synchronize()
            return (time.perf_counter() - start) / 100
        # read, not written: what a call meets in the cache then need not go to memory first
        self._flush.sum()
        # the host queues the call meanwhile: some half a millisecond
        torch.cuda._sleep(1_000_000)
        self._start.record()
        run()
        self._end.record()
        self._end.synchronize()
        return float(self._start.elapsed_time(self._end)) * 1e-3
