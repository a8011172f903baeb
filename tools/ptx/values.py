"""Bits of registers and the numbers that they are; what instructions do with these."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

WARP = 32
UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
_SIGNED = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
_FLOATS = {16: np.float16, 32: np.float32, 64: np.float64}
ROUNDING = {"rni": np.rint, "rmi": np.floor, "rpi": np.ceil, "rzi": np.trunc}


class PtxError(Exception):
    """What a GPU would not do, or this machine cannot."""


def width(kind: str) -> int:
    """Bits of `f32`, `s64`, `b16`, `pred`, ..."""
    named = {"pred": 1, "bf16": 16, "bf16x2": 32, "f16x2": 32}
    return named[kind] if kind in named else int(kind[1:])


def numpy_type(kind: str) -> Any:
    """Of numbers of that kind; bfloat16 has none."""
    if kind == "pred":
        return np.bool_
    return {"f": _FLOATS, "s": _SIGNED, "u": UNSIGNED, "b": UNSIGNED}[kind[0]][width(kind)]


def _from_bfloat16(bits: Any) -> Any:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _to_bfloat16(value: Any) -> Any:
    bits = np.asarray(value, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(value), np.uint32(0x7FFF), rounded).astype(np.uint16)


def as_number(value: Any, kind: str) -> Any:
    """The number that a register's bits are."""
    if kind == "bf16":
        return _from_bfloat16(value)
    return value.view(numpy_type(kind))


def as_bits(value: Any, kind: str) -> Any:
    """The bits of a number, as a register has them."""
    if kind == "bf16":
        return _to_bfloat16(value)
    value = np.asarray(value).astype(numpy_type(kind), copy=False)
    return value if kind == "pred" else value.view(UNSIGNED[width(kind)])


def _two_sum(a: Any, b: Any) -> tuple[Any, Any]:
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


def fused(a: Any, b: Any, c: Any) -> Any:
    """a b + c, rounded once; in float64 but for what decides a tie."""
    if a.dtype == np.float32 or b.dtype == np.float32:
        product = a.astype(np.float64) * b.astype(np.float64)
        total, rest = _two_sum(product, c.astype(np.float64))
        # to odd, so that rounding again to float32 does not round twice
        bits = np.asarray(total).view(np.int64)
        even = (bits & 1) == 0
        outwards = np.where((rest > 0) == (total > 0), 1, -1)
        odd = np.where(even & (rest != 0) & np.isfinite(rest), bits + outwards, bits)
        return odd.view(np.float64).astype(np.float32)
    product = a * b
    split = 134217729.0
    high_a, high_b = a * split - (a * split - a), b * split - (b * split - b)
    low_a, low_b = a - high_a, b - high_b
    lost = ((high_a * high_b - product) + high_a * low_b + low_a * high_b) + low_a * low_b
    total, rest = _two_sum(product, c)
    whole = total + (rest + lost)
    return np.where(np.isfinite(whole), whole, product + c)


def erring(value: Any, most: int) -> Any:
    """The value, up to that many last places off, as its bits have it."""
    unsigned = UNSIGNED[value.itemsize * 8]
    bits = np.asarray(value).view(unsigned)
    mixed = (bits.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(40)
    off = (mixed % np.uint64(2 * most + 1)).astype(np.int64) - most
    moved = (bits.astype(np.int64) + off).astype(np.int64).astype(unsigned).view(value.dtype)
    return np.where(np.isfinite(value) & (value != 0), moved, value)


def flushed(value: Any) -> Any:
    """Without numbers below the least normal one."""
    return np.where(np.abs(value) < np.finfo(value.dtype).tiny, value * 0, value)


def quotient(a: Any, b: Any) -> Any:
    """Of integers, cut off; of nothing is whatever."""
    some = np.where(b == 0, np.ones_like(b), b)
    sign = (np.sign(a) * np.sign(some)).astype(a.dtype)
    return (np.abs(a) // np.abs(some) * sign).astype(a.dtype)


def unsigned_quotient(a: Any, b: Any) -> Any:
    return a // np.where(b == 0, np.ones_like(b), b)


def constant(text: str, bits: int) -> Any:
    if bits == 1:
        return np.bool_(int(text, 0))
    if text.startswith("0f"):
        return np.uint32(int(text[2:], 16))
    if text.startswith("0d"):
        return np.uint64(int(text[2:], 16))
    if text == "global_smem":
        return UNSIGNED[bits](0)
    return UNSIGNED[bits](int(text.rstrip("U"), 0) & (2**bits - 1))


def _unordered(a: Any, b: Any) -> Any:
    return np.isnan(a) | np.isnan(b)


COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "eq": np.equal, "ne": lambda a, b: (a < b) | (a > b), "lt": np.less, "le": np.less_equal,
    "gt": np.greater, "ge": np.greater_equal, "lo": np.less, "ls": np.less_equal,
    "hi": np.greater, "hs": np.greater_equal, "equ": lambda a, b: ~((a < b) | (a > b)),
    "neu": np.not_equal, "ltu": lambda a, b: ~(a >= b), "leu": lambda a, b: ~(a > b),
    "gtu": lambda a, b: ~(a <= b), "geu": lambda a, b: ~(a < b), "nan": _unordered,
    "num": lambda a, b: ~_unordered(a, b),
}  # fmt: skip
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "_add": np.add, "_sub": np.subtract, "_and": np.bitwise_and, "_or": np.bitwise_or,
    "_xor": np.bitwise_xor, "_not": np.invert, "_neg": np.negative, "_abs": np.abs,
    "_min": np.fmin, "_max": np.fmax,
}  # fmt: skip
