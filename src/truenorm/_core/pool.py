"""The recycled memory of large results: its cap, its statistics, and how to give it back."""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass

# what TRUENORM_POOL_MIB is without being set
DEFAULT_MIB = 256
# beyond this the number of bytes leaves 64 bits; nobody has the memory
LARGEST_MIB = 1 << 40
MIB = 1 << 20

_native: ctypes.CDLL | None = None


@dataclass(frozen=True)
class Pool:
    """What the pool holds, and what it was good for.

    cap_mib: the most idle memory that is kept; 0 where the pool is off.
    idle_mib: the idle memory that is kept now. It counts as the process's own.
    idle_buffers: in how many buffers.
    hits: how many large results got a recycled buffer.
    misses: how many got fresh memory, because no idle buffer was of their size.
    """

    cap_mib: int
    idle_mib: float
    idle_buffers: int
    hits: int
    misses: int

    def __str__(self) -> str:
        if self.cap_mib == 0:
            return "off"
        return (
            f"{self.idle_mib:.0f} of at most {self.cap_mib} MiB idle in {self.idle_buffers} "
            f"buffers, {self.hits} hits, {self.misses} misses"
        )


def cap_mib() -> int:
    """The cap that the environment asks for."""
    value = os.environ.get("TRUENORM_POOL_MIB") or str(DEFAULT_MIB)
    if not (value.isascii() and value.isdecimal()):
        raise ImportError(
            f"TRUENORM_POOL_MIB (={value!r}) is not a whole number of MiB: unset it (then it is "
            f"{DEFAULT_MIB}), or set it to the most idle memory to keep, 0 for none"
        )
    return min(int(value[:20]), LARGEST_MIB)


def attach(native: ctypes.CDLL, cap_mib: int) -> None:
    """Begin to recycle in a library that was just loaded."""
    global _native
    native.truenorm_pool_set_cap.argtypes = [ctypes.c_int64]
    native.truenorm_pool_set_cap.restype = None
    native.truenorm_pool_empty.restype = None
    native.truenorm_pool_statistics.argtypes = [ctypes.POINTER(ctypes.c_int64)]
    native.truenorm_pool_statistics.restype = None
    _native = native
    set_cap(cap_mib)


def set_cap(mib: int) -> None:
    """Change the cap of a running process; idle memory above it is given back at once."""
    if _native is not None:
        _native.truenorm_pool_set_cap(mib * MIB)


def statistics() -> Pool | None:
    """The pool as it is now, or None without the native library."""
    if _native is None:
        return None
    values = (ctypes.c_int64 * 5)()
    _native.truenorm_pool_statistics(values)
    cap, idle, buffers, hits, misses = values
    return Pool(cap // MIB, idle / MIB, buffers, hits, misses)


def empty_cache() -> None:
    """Give the idle memory of earlier results back to the system; live tensors keep theirs.

    Large results on the CPU are written to memory that earlier ones left behind, up to
    TRUENORM_POOL_MIB of it. `truenorm.info().pool` says how much there is.
    """
    if _native is not None:
        _native.truenorm_pool_empty()
