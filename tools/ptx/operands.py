"""Operands of instructions: registers by numbers, constants, addresses."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from .memory import State
from .values import UNSIGNED, PtxError, constant

WIDTHS = {"p": 1, "rs": 16, "r": 32, "f": 32, "rd": 64, "fd": 64}

Step = Callable[[State, Any], None]


class Operands:
    """Numbers registers as it meets them."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}

    def number(self, register: str) -> int:
        return self.numbers.setdefault(register, len(self.numbers))

    @staticmethod
    def width(register: str) -> int:
        found = re.match(r"%([a-z]+)\d+$", register)
        if not found or found.group(1) not in WIDTHS:
            raise PtxError(f"a register that is not known: {register}")
        return WIDTHS[found.group(1)]

    def get(self, operand: str, bits: int) -> Callable[[State], Any]:
        """What reads an operand, as unsigned numbers of that many bits or as bools."""
        if re.match(r"%[a-z]+\d+$", operand):
            place = self.number(operand)
            return lambda s: s.registers[place]
        if operand.startswith("%"):
            return lambda s: s.special(operand)
        value = constant(operand, bits)
        return lambda s: value

    def put(self, register: str) -> Callable[[State, Any, Any], None]:
        if not register.startswith("%"):
            return lambda s, mask, value: None
        place, bits = self.number(register), self.width(register)
        kind = np.bool_ if bits == 1 else UNSIGNED[bits]

        def put(s: State, mask: Any, value: Any) -> None:
            if np.ndim(value) == 0:
                value = np.full(s.lanes, value, kind)
            if mask is not None:
                before = s.registers[place]
                if before is None:
                    before = np.full(s.lanes, np.array(-1).astype(kind), kind)
                value = np.where(mask, value, before)
            s.registers[place] = value

        return put

    def address(self, operand: str) -> Callable[[State], Any]:
        """[%rd8 + 16], [global_smem + 8], [%r3]."""
        base, _, offset = (part.strip() for part in operand.strip("[] ").partition("+"))
        more = int(offset or 0)
        if not base.startswith("%"):
            value = np.uint32(int(constant(base, 32)) + more)
            return lambda s: np.full(s.lanes, value)
        place = self.number(base)

        def address(s: State) -> Any:
            held = s.registers[place]
            return held + held.dtype.type(more & np.iinfo(held.dtype).max)

        return address

    def several(self, operand: str) -> list[str]:
        return [part.strip() for part in operand.strip("{} ").split(",")]
