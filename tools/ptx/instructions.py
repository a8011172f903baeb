"""Instructions, turned into steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .lines import Line
from .memory import State
from .moves import Moves
from .operands import Step
from .values import (
    COMPARE,
    FUNCTIONS,
    ROUNDING,
    UNSIGNED,
    PtxError,
    as_bits,
    as_number,
    erring,
    flushed,
    fused,
    numpy_type,
    quotient,
    unsigned_quotient,
    width,
)


class Decoder(Moves):
    """Turns lines into steps: the method `_name` those of the instruction `name`."""

    def step(self, line: Line) -> Step:
        head, *modifiers = line.name.split(".")
        make = getattr(self, f"_{head}", None)
        if make is None:
            raise PtxError(f"an instruction that is not known: {line.text}")
        try:
            run: Step = make(line, modifiers)
        except (KeyError, ValueError, IndexError) as error:
            raise PtxError(f"an instruction that is not known: {line.text}") from error
        if not line.guard:
            return run
        allowed, wanted = self.get(line.guard.lstrip("@!"), 1), "!" not in line.guard

        def guarded(s: State, mask: Any) -> None:
            at_work = allowed(s) if wanted else ~allowed(s)
            at_work = at_work if mask is None else at_work & mask
            if at_work.any():
                run(s, at_work)

        return guarded

    def _of(
        self, line: Line, kinds: Sequence[str], made: str, function: Callable[..., Any]
    ) -> Step:
        """d = function(operands), of such kinds."""
        target, *sources = line.operands
        gets = [
            (self.get(operand, width(kind)), kind)
            for operand, kind in zip(sources, kinds, strict=True)
        ]
        put = self.put(target)

        def run(s: State, mask: Any) -> None:
            put(s, mask, as_bits(function(*(as_number(get(s), kind) for get, kind in gets)), made))

        return run

    def _plain(self, function: Callable[..., Any]) -> Any:
        def make(line: Line, modifiers: list[str]) -> Step:
            kind = modifiers[-1]
            if kind in ("bf16x2", "f16x2"):
                return self._pairs(line, kind, function)
            return self._of(line, [kind] * (len(line.operands) - 1), kind, function)

        return make

    def _pairs(self, line: Line, kind: str, function: Callable[..., Any]) -> Step:
        single = kind.removesuffix("x2")
        target, *sources = line.operands
        gets, put = [self.get(operand, 32) for operand in sources], self.put(target)

        def run(s: State, mask: Any) -> None:
            halves = []
            for shift in (0, 16):
                parts = [
                    as_number((get(s) >> np.uint32(shift)).astype(np.uint16), single)
                    for get in gets
                ]
                halves.append(as_bits(function(*parts), single).astype(np.uint32))
            put(s, mask, halves[0] | (halves[1] << np.uint32(16)))

        return run

    def __getattr__(self, name: str) -> Any:
        if name in FUNCTIONS:
            return self._plain(FUNCTIONS[name])
        raise AttributeError(name)

    def _mov(self, line: Line, modifiers: list[str]) -> Step:
        target, source = line.operands
        bits = width(modifiers[-1])
        if target.startswith("{"):
            parts, get = self.several(target), self.get(source, bits)
            puts, each = [self.put(part) for part in parts], bits // len(parts)

            def unpack(s: State, mask: Any) -> None:
                value = get(s)
                for i, put in enumerate(puts):
                    part = value >> value.dtype.type(i * each)
                    put(s, mask, part.astype(UNSIGNED[each]))

            return unpack
        put = self.put(target)
        if source.startswith("{"):
            parts = self.several(source)
            each = bits // len(parts)
            gets, whole = [self.get(part, each) for part in parts], UNSIGNED[bits]

            def pack(s: State, mask: Any) -> None:
                value = whole(0)
                for i, get in enumerate(gets):
                    value = value | (get(s).astype(whole) << whole(i * each))
                put(s, mask, value)

            return pack
        get = self.get(source, bits)
        return lambda s, mask: put(s, mask, get(s))

    def _setp(self, line: Line, modifiers: list[str]) -> Step:
        compare, kind = COMPARE[modifiers[0]], modifiers[-1]
        targets, *sources = line.operands
        puts = [self.put(target.strip()) for target in targets.split("|")]
        gets = [self.get(operand, width(kind)) for operand in sources[:2]]
        joined = next((m for m in modifiers[1:-1] if m in ("and", "or", "xor")), None)
        if kind.endswith("x2"):

            def run_pairs(s: State, mask: Any) -> None:
                for shift, put in zip((0, 16), puts, strict=True):
                    parts = [as_number((get(s) >> np.uint32(shift)).astype(np.uint16), kind[:-2])
                             for get in gets]  # fmt: skip
                    put(s, mask, compare(*parts))

            return run_pairs
        (put,) = puts
        more = self.get(sources[2], 1) if joined else None

        def run(s: State, mask: Any) -> None:
            found = compare(*(as_number(get(s), kind) for get in gets))
            if more is not None:
                found = FUNCTIONS[f"_{joined}"](found, more(s))
            put(s, mask, found)

        return run

    def _selp(self, line: Line, modifiers: list[str]) -> Step:
        target, a, b, which = line.operands
        bits = width(modifiers[-1])
        gets = self.get(a, bits), self.get(b, bits), self.get(which, 1)
        put = self.put(target)
        return lambda s, mask: put(s, mask, np.where(gets[2](s), gets[0](s), gets[1](s)))

    def _cvt(self, line: Line, modifiers: list[str]) -> Step:
        made, given = modifiers[-2:]
        if not {*modifiers[:-2]} <= {"rn", "ftz", *ROUNDING} or (made, given) == ("bf16", "f64"):
            raise KeyError(line.name)
        if made in ("bf16x2", "f16x2"):
            single = made.removesuffix("x2")
            target, high, low = line.operands
            gets, put = (self.get(high, 32), self.get(low, 32)), self.put(target)

            def run_pairs(s: State, mask: Any) -> None:
                above, below = (as_bits(as_number(get(s), given), single).astype(np.uint32)
                                for get in gets)  # fmt: skip
                put(s, mask, (above << np.uint32(16)) | below)

            return run_pairs
        whole = next((m for m in modifiers if m in ROUNDING), None)
        is_integer = not made.startswith(("f", "bf"))

        def convert(value: Any) -> Any:
            if whole:
                value = ROUNDING[whole](value)
            if is_integer and given.startswith(("f", "bf")):
                limits = np.iinfo(numpy_type(made))
                value = np.clip(np.nan_to_num(value), limits.min, limits.max)
            return value

        target = line.operands[0]
        # a register may be wider than what it is given
        wide = made if not is_integer else f"{made[0]}{self.width(target)}"
        source, put = self.get(line.operands[1], width(given)), self.put(target)
        narrow = UNSIGNED[width(given)]

        def run(s: State, mask: Any) -> None:
            # a source may be wider, too
            number = convert(as_number(source(s).astype(narrow, copy=False), given))
            if is_integer:
                number = np.asarray(number).astype(numpy_type(made))
            put(s, mask, as_bits(number, wide))

        return run

    def _mul(self, line: Line, modifiers: list[str]) -> Step:
        return self._product(line, modifiers, added=False)

    def _mad(self, line: Line, modifiers: list[str]) -> Step:
        return self._product(line, modifiers, added=True)

    def _product(self, line: Line, modifiers: list[str], *, added: bool) -> Step:
        kind = modifiers[-1]
        if kind.startswith(("f", "bf")):
            return self._plain(fused if added else np.multiply)(line, modifiers)
        bits = width(kind)
        wide = f"{kind[0]}{2 * bits}" if modifiers[0] == "wide" else kind
        made_of = numpy_type(wide)

        def product(a: Any, b: Any, c: Any = None) -> Any:
            if modifiers[0] == "hi":
                whole = numpy_type(f"{kind[0]}{2 * bits}")
                return (a.astype(whole) * b.astype(whole)) >> whole(bits)
            made = a.astype(made_of) * b.astype(made_of)
            return made if c is None else made + c

        kinds = [kind, kind] + [wide] * added
        return self._of(line, kinds, wide, product)

    def _fma(self, line: Line, modifiers: list[str]) -> Step:
        function = {
            # what an assembler may make of a difference (lines.py)
            "less": lambda a, b, c: fused(a, b, -c),
            "minus": lambda a, b, c: fused(-a, b, c),
        }.get(modifiers[0], fused)
        return self._plain(function)(line, modifiers)

    def _div(self, line: Line, modifiers: list[str]) -> Step:
        kind = modifiers[-1]
        if kind.startswith("s"):
            return self._plain(quotient)(line, modifiers)
        if kind.startswith("u"):
            return self._plain(unsigned_quotient)(line, modifiers)
        if "rn" in modifiers:
            return self._plain(np.divide)(line, modifiers)
        return self._plain(lambda a, b: erring(a / b, 2))(line, modifiers)

    def _rem(self, line: Line, modifiers: list[str]) -> Step:
        divide = quotient if modifiers[-1].startswith("s") else unsigned_quotient
        return self._plain(lambda a, b: a - divide(a, b) * b)(line, modifiers)

    def _approximate(self, function: Callable[[Any], Any], most: int) -> Any:
        def make(line: Line, modifiers: list[str]) -> Step:
            def run(a: Any) -> Any:
                if "ftz" in modifiers:
                    a = flushed(a)
                made = function(a.astype(np.float64)).astype(a.dtype)
                if "approx" in modifiers:
                    made = erring(made, most)
                return flushed(made) if "ftz" in modifiers else made

            return self._plain(run)(line, modifiers)

        return make

    def _sqrt(self, line: Line, modifiers: list[str]) -> Step:
        return self._approximate(np.sqrt, 1)(line, modifiers)

    def _rsqrt(self, line: Line, modifiers: list[str]) -> Step:
        return self._approximate(lambda a: 1 / np.sqrt(a), 2)(line, modifiers)

    def _rcp(self, line: Line, modifiers: list[str]) -> Step:
        return self._approximate(lambda a: 1 / a, 1)(line, modifiers)

    def _ex2(self, line: Line, modifiers: list[str]) -> Step:
        return self._approximate(np.exp2, 2)(line, modifiers)

    def _lg2(self, line: Line, modifiers: list[str]) -> Step:
        return self._approximate(np.log2, 2)(line, modifiers)

    def _shl(self, line: Line, modifiers: list[str]) -> Step:
        return self._shift(line, modifiers[-1], np.left_shift)

    def _shr(self, line: Line, modifiers: list[str]) -> Step:
        return self._shift(line, modifiers[-1], np.right_shift)

    def _shift(self, line: Line, kind: str, function: Callable[..., Any]) -> Step:
        bits = width(kind)

        def shift(a: Any, by: Any) -> Any:
            most = np.minimum(by, np.uint32(bits - 1)).astype(a.dtype)
            made = function(a, most)
            beyond = made if kind.startswith("s") else np.zeros_like(made)
            return np.where(by < bits, made, beyond)

        return self._of(line, [kind, "u32"], kind, shift)

    def _bfe(self, line: Line, modifiers: list[str]) -> Step:
        kind = modifiers[-1]
        bits = width(kind)

        def extract(a: Any, start: Any, length: Any) -> Any:
            left = a.dtype.type(bits - int(np.max(start)) - int(np.max(length)))
            return (a << left) >> a.dtype.type(bits - int(np.max(length)))

        return self._of(line, [kind, "u32", "u32"], kind, extract)

    def _popc(self, line: Line, modifiers: list[str]) -> Step:
        return self._of(line, [modifiers[-1]], "u32", np.bitwise_count)

    def _prmt(self, line: Line, modifiers: list[str]) -> Step:
        def permute(a: Any, b: Any, selector: Any) -> Any:
            both = a.astype(np.uint64) | (b.astype(np.uint64) << np.uint64(32))
            made = np.uint32(0)
            for i in range(4):
                chosen = (selector >> np.uint32(4 * i)) & np.uint32(15)
                byte = (both >> (np.uint64(8) * (chosen & np.uint32(7)))) & np.uint64(255)
                byte = np.where(
                    chosen & np.uint32(8), np.where(byte & np.uint64(128), 255, 0), byte
                )
                made = made | (byte.astype(np.uint32) << np.uint32(8 * i))
            return made

        return self._of(line, ["b32", "b32", "b32"], "b32", permute)
