"""Instructions that move values: to and from memory, between lanes; and those that wait."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from .lines import Line
from .memory import Copy, State
from .operands import Operands, Step
from .values import UNSIGNED, WARP, PtxError, as_bits, as_number, numpy_type, width


class Moves(Operands):
    def _ld(self, line: Line, modifiers: list[str]) -> Step:
        targets, source = line.operands[:2]
        count, bits = _shape(modifiers)
        puts = [(self.put(t), self.width(t)) for t in self.several(targets)]
        if modifiers[0] == "param":
            name, (put, wide) = source.strip("[]"), puts[0]
            signed = modifiers[-1].startswith("s")

            def parameter(s: State, mask: Any) -> None:
                value = int(s.parameters[name]) & (2**bits - 1)
                if signed and value >> (bits - 1):
                    value += 2**wide - 2**bits
                put(s, mask, UNSIGNED[wide](value))

            return parameter
        address, size = self.address(source), count * bits // 8
        is_shared = modifiers[0] == "shared"

        def load(s: State, mask: Any) -> None:
            lanes = s.where(mask)
            at, programs = address(s)[lanes], s.program[lanes]
            _count(s, "shared" if is_shared else "read", lanes, at, size)
            if is_shared:
                rows = s.shared.load(at, size, programs, s.warp[lanes], line.text)
            else:
                rows = s.memory.load(at, size, programs + s.first, line.text)
            values = np.ascontiguousarray(rows).view(UNSIGNED[bits])
            for i, (put, wide) in enumerate(puts):
                whole = np.zeros(s.lanes, UNSIGNED[wide])
                whole[lanes] = values[:, i]
                put(s, mask, whole)

        return load

    def _st(self, line: Line, modifiers: list[str]) -> Step:
        target, sources = line.operands[:2]
        _, bits = _shape(modifiers)
        gets = [self.get(operand, bits) for operand in self.several(sources)]
        address, is_shared = self.address(target), modifiers[0] == "shared"
        kind = UNSIGNED[bits]

        def store(s: State, mask: Any) -> None:
            lanes = s.where(mask)
            at, programs = address(s)[lanes], s.program[lanes]
            parts = [np.broadcast_to(get(s), s.lanes)[lanes].astype(kind) for get in gets]
            rows = np.stack(parts, axis=1).view(np.uint8)
            _count(s, "shared" if is_shared else "written", lanes, at, rows.shape[1])
            if is_shared:
                s.shared.store(at, rows, programs, s.warp[lanes], line.text)
            else:
                s.memory.store(at, rows, programs + s.first, line.text)

        return store

    def _cp(self, line: Line, modifiers: list[str]) -> Step:
        if modifiers[:2] == ["async", "commit_group"]:

            def commit(s: State, mask: Any) -> None:
                s.groups[s.where(mask)] += 1

            return commit
        if modifiers[:2] in (["async", "wait_group"], ["async", "wait_all"]):
            left = int(line.operands[0]) if line.operands else 0
            return lambda s, mask: _wait(s, mask, left)
        if modifiers[0] != "async" or modifiers[2:] != ["shared", "global"]:
            raise KeyError(line.name)
        to, source = self.address(line.operands[0]), self.address(line.operands[1])
        size = int(line.operands[2], 0)
        held = (
            self.get(line.operands[3], 32) if len(line.operands) > 3 else lambda s: np.uint32(size)
        )

        def copy(s: State, mask: Any) -> None:
            lanes = s.where(mask)
            programs, warps = s.program[lanes], s.warp[lanes]
            some = np.broadcast_to(held(s), s.lanes)[lanes]
            rows = np.zeros((len(lanes), size), np.uint8)
            for count in np.unique(some):
                if count:
                    which = np.flatnonzero(some == count)
                    at = source(s)[lanes][which]
                    _count(s, "read", lanes[which], at, int(count))
                    rows[which, :count] = s.memory.load(
                        at, int(count), programs[which] + s.first, line.text
                    )
            _count(s, "shared", lanes, to(s)[lanes], size)
            places = s.shared.expect(to(s)[lanes], size, programs, warps, line.text)
            s.copies.append(Copy(lanes, places, rows, s.groups[lanes].copy()))

        return copy

    def _shfl(self, line: Line, modifiers: list[str]) -> Step:
        target, source, by, clamp, *_ = line.operands
        register, _, also = target.partition("|")
        get, lane_of, put = self.get(source, 32), self.get(by, 32), self.put(register)
        put_found = self.put(also) if also else None
        if modifiers[1] not in ("bfly", "idx") or clamp != "31":
            raise KeyError(line.name)

        def shuffle(s: State, mask: Any) -> None:
            within = s.lane % WARP
            other = np.broadcast_to(lane_of(s), s.lanes).astype(np.int64) % WARP
            other = within ^ other if modifiers[1] == "bfly" else other
            at = s.lane - within + other
            if mask is not None and not mask[at[mask]].all():
                raise PtxError(f"{line.text}: reads a lane that is not there")
            put(s, mask, get(s)[at])
            if put_found is not None:
                put_found(s, mask, np.True_)

        return shuffle

    def _redux(self, line: Line, modifiers: list[str]) -> Step:
        function = {"max": np.max, "min": np.min, "add": np.sum}[modifiers[1]]
        kind = modifiers[-1]
        get, put = self.get(line.operands[1], 32), self.put(line.operands[0])

        def reduce(s: State, mask: Any) -> None:
            _whole_warps(s, mask, line)
            warps = as_number(get(s), kind).reshape(-1, WARP)
            made = np.repeat(function(warps, axis=1), WARP).astype(numpy_type(kind))
            put(s, mask, as_bits(made, kind))

        return reduce

    def _vote(self, line: Line, modifiers: list[str]) -> Step:
        if modifiers != ["sync", "ballot", "b32"]:
            raise KeyError(line.name)
        get, put = self.get(line.operands[1], 1), self.put(line.operands[0])

        def vote(s: State, mask: Any) -> None:
            _whole_warps(s, mask, line)
            warps = np.broadcast_to(get(s), s.lanes).reshape(-1, WARP)
            ballots = np.packbits(warps, axis=1, bitorder="little").view(np.uint32)
            put(s, mask, np.repeat(ballots[:, 0], WARP))

        return vote

    def _matrices(self, line: Line, modifiers: list[str], operand: str, at: str) -> Any:
        """Registers, and a function that tells where both halves of one of them lie.

        Lane 8 j + i has the address of row i of matrix j, 8 values of 16 bits. Register j of lane l
        has values 2 (l % 4) and the next of row l / 4; transposed, those of column l / 4.
        """
        if "m8n8" not in modifiers or modifiers[-1] != "b16":
            raise KeyError(line.name)
        registers, address = self.several(operand), self.address(at)

        def places(s: State, lanes: Any, which: int, half: int) -> Any:
            own = lanes % WARP
            row, column = own // 4, own % 4 * 2 + half
            if "trans" in modifiers:
                row, column = column, row
            base = address(s)[lanes - own + 8 * which + row]
            if (base % np.uint32(16)).any():
                raise PtxError(f"{line.text}: a row at an address that is no multiple of 16")
            return base + (2 * column).astype(np.uint32)

        return registers, places

    def _ldmatrix(self, line: Line, modifiers: list[str]) -> Step:
        registers, places = self._matrices(line, modifiers, *line.operands)
        puts = [self.put(register) for register in registers]

        def load(s: State, mask: Any) -> None:
            lanes = _whole_warps(s, mask, line)
            for which, put in enumerate(puts):
                halves = [
                    s.shared.load(places(s, lanes, which, half), 2, s.program[lanes],
                                  s.warp[lanes], line.text)
                    for half in (0, 1)
                ]  # fmt: skip
                whole = np.zeros(s.lanes, np.uint32)
                whole[lanes] = np.concatenate(halves, axis=1).view(np.uint32)[:, 0]
                put(s, mask, whole)

        return load

    def _stmatrix(self, line: Line, modifiers: list[str]) -> Step:
        registers, places = self._matrices(line, modifiers, line.operands[1], line.operands[0])
        gets = [self.get(register, 32) for register in registers]

        def store(s: State, mask: Any) -> None:
            lanes = _whole_warps(s, mask, line)
            for which, get in enumerate(gets):
                held = np.broadcast_to(get(s), s.lanes)[lanes]
                for half in (0, 1):
                    part = (held >> np.uint32(16 * half)).astype(np.uint16)[:, None].view(np.uint8)
                    s.shared.store(places(s, lanes, which, half), part, s.program[lanes],
                                   s.warp[lanes], line.text)  # fmt: skip

        return store

    def _bar(self, line: Line, modifiers: list[str]) -> Step:
        if modifiers[0] == "warp":
            return lambda s, mask: None
        if modifiers[-1] != "sync" or line.operands not in (("0",), ("0", "")):
            raise KeyError(line.name)

        def meet(s: State, mask: Any) -> None:
            by_program = None if mask is None else mask.reshape(-1, s.threads)
            if by_program is not None and (by_program.any(1) != by_program.all(1)).any():
                raise PtxError(f"{line.text}: not all threads of a program come to this barrier")
            s.shared.barriers += 1 if by_program is None else by_program.all(1)

        return meet


def _whole_warps(s: State, mask: Any, line: Line) -> Any:
    """Numbers of the lanes at work, of warps all of whose lanes are."""
    if mask is not None:
        warps = mask.reshape(-1, WARP)
        if (warps.any(axis=1) != warps.all(axis=1)).any():
            raise PtxError(f"{line.text}: not all lanes of a warp are there")
    return s.where(mask)


def _count(s: State, what: str, lanes: Any, addresses: Any, size: int) -> None:
    if s.traffic is None:
        return
    if what == "shared":
        s.traffic.shared.add(lanes, addresses, size)
        return
    there = s.memory.sizes(addresses) >= s.traffic.least
    if there.any():
        lanes = lanes[there]
        access = s.traffic.read if what == "read" else s.traffic.written
        access.add(lanes, s.program[lanes] + s.first, addresses[there], size)


def _wait(s: State, mask: Any, left: int) -> None:
    """All groups of copies but the last `left` arrive."""
    waits = np.ones(s.lanes, np.bool_) if mask is None else mask
    rest = []
    for copy in s.copies:
        here = waits[copy.lanes] & (copy.group < s.groups[copy.lanes] - left)
        if here.any():
            lanes = copy.lanes[here]
            s.shared.arrive(copy.places[here], copy.values[here], s.program[lanes], s.warp[lanes])
        if not here.all():
            rest.append(Copy(*(part[~here] for part in copy)))
    s.copies = rest


def _shape(modifiers: list[str]) -> tuple[int, int]:
    """How many values a load or store moves, and their bits."""
    count = next((int(m[1:]) for m in modifiers if re.fullmatch(r"v\d", m)), 1)
    return count, width(modifiers[-1])
