"""What a kernel moves: sectors of memory and passes of shared memory, warp by warp.

A warp's access to memory moves whole sectors of 32 bytes. One to shared memory takes a pass for
every 128 bytes, and more where lanes meet in a bank (of 32, 4 bytes wide) with different words.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .values import WARP

SECTOR, BANKS, WORD = 32, 32, 4


class Access:
    """asked: bytes, each once for a warp. by_warps: those of the sectors that hold them.
    by_programs: the same, each sector once for a program, as if its cache held all it was given.
    """

    def __init__(self) -> None:
        self.asked = self.by_warps = 0
        self._sectors: list[Any] = []

    def add(self, lanes: Any, programs: Any, addresses: Any, size: int) -> None:
        warps = lanes.astype(np.uint64) // np.uint64(WARP) << np.uint64(48)
        at = addresses.astype(np.uint64) & np.uint64(2**48 - 1)
        sectors = at // np.uint64(SECTOR)
        self.asked += len(np.unique(warps | at)) * size
        self.by_warps += len(np.unique(warps | sectors)) * SECTOR
        self._sectors.append(np.unique(programs.astype(np.uint64) << np.uint64(44) | sectors))

    @property
    def by_programs(self) -> int:
        if not self._sectors:
            return 0
        self._sectors = [np.unique(np.concatenate(self._sectors))]
        return len(self._sectors[0]) * SECTOR


@dataclass
class Passes:
    """taken: by a warp's accesses to shared memory. least: as if no lanes met."""

    taken: int = 0
    least: int = 0

    def add(self, lanes: Any, addresses: Any, size: int) -> None:
        words = max(size // WORD, 1)
        # wide accesses go by halves and quarters of a warp
        together = WARP // words
        groups = np.repeat(lanes // together, words)
        at = (addresses.astype(np.int64) // WORD)[:, None] + np.arange(words)
        found = np.unique(np.stack([groups, at.ravel()]), axis=1)
        banks = found[0] * BANKS + found[1] % BANKS
        _, counts = np.unique(banks, return_counts=True)
        by_group = np.unique(banks) // BANKS
        firsts = np.flatnonzero(np.diff(by_group, prepend=-1))
        self.taken += int(np.maximum.reduceat(counts, firsts).sum()) if len(counts) else 0
        self.least += len(firsts)


class Traffic:
    """Of a launch. least: bytes of a tensor whose accesses count."""

    def __init__(self, least: int = 0) -> None:
        self.least = least
        self.read, self.written, self.shared = Access(), Access(), Passes()
