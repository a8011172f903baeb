"""A kernel, and how its programs run."""

from __future__ import annotations

import re
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from .instructions import Decoder
from .lines import contracted, read
from .memory import Memory, Shared, State
from .traffic import Traffic
from .values import PtxError

LANES = 16384


class Jump(NamedTuple):
    guard: str
    target: int


class Program:
    """A kernel of a PTX file. contract: the assembler may fuse a product and a sum that are not
    rounded by name, and here it does wherever it may.
    """

    def __init__(self, ptx: str, name: str, *, contract: bool = True) -> None:
        self.name, self.ptx = name, ptx
        self.threads = int(_found(r"\.reqntid (\d+)", ptx))
        body = ptx[ptx.index("{", ptx.index(".reqntid")) : ptx.index("// -- End function")]
        self.parameters = re.findall(rf"\.param [^,)]*?({re.escape(name)}_param_\d+)", ptx)
        lines, labels = read(body)
        decoder = Decoder()
        if contract:
            jumps = {line.operands[0] for line in lines if line.name.startswith("bra")}
            lines = contracted(lines, {labels[name] for name in jumps})
        self.steps: list[Any] = []
        for line in lines:
            if line.name in ("bra", "bra.uni"):
                self.steps.append(Jump(line.guard, labels[line.operands[0]]))
            elif line.name == "ret":
                self.steps.append(Jump(line.guard, len(lines)))
            else:
                self.steps.append(decoder.step(line))
        self.guards = {
            step.guard: decoder.get(step.guard.lstrip("@!"), 1)
            for step in self.steps
            if isinstance(step, Jump) and step.guard
        }
        self.registers = len(decoder.numbers)

    def run(
        self, programs: int, shared: int, arguments: Sequence[Any], traffic: Traffic | None = None
    ) -> Memory:
        """arguments: tensors and integers, in the order of the kernel's parameters; what it lacks
        at the end (room that Triton may ask for) is zero. traffic: counts what is moved.
        """
        memory = Memory([a for a in arguments if isinstance(a, torch.Tensor)])
        given = [_argument(a) for a in arguments]
        given += [0] * (len(self.parameters) - len(given))
        parameters = dict(zip(self.parameters, given, strict=True))
        at_once = max(1, LANES // self.threads)
        with np.errstate(all="ignore"):
            for first in range(0, programs, at_once):
                count = min(at_once, programs - first)
                state = State(count * self.threads, self.threads, first, programs,
                              [None] * self.registers, parameters, memory,
                              Shared(count, shared), traffic)  # fmt: skip
                self._run(state)
        return memory

    def _run(self, s: State) -> None:
        end = len(self.steps)
        # lanes by where they are; None: all of them
        waiting: dict[int, Any] = {0: None}
        while waiting:
            at = min(waiting)
            mask = waiting.pop(at)
            while at < end:
                if at in waiting:
                    mask = mask | waiting.pop(at)
                    mask = None if mask.all() else mask
                step = self.steps[at]
                if not isinstance(step, Jump):
                    step(s, mask)
                    at += 1
                    continue
                at, mask = self._jump(s, step, at, mask, waiting)
                if waiting and min(waiting) < at:
                    _join(waiting, at, mask)
                    break

    def _jump(self, s: State, jump: Jump, at: int, mask: Any, waiting: dict[int, Any]) -> Any:
        """Where to go on, with which lanes; the others wait."""
        if not jump.guard:
            return jump.target, mask
        taken = self.guards[jump.guard](s)
        taken = ~taken if "!" in jump.guard else taken
        everyone = np.ones(s.lanes, np.bool_) if mask is None else mask
        taken = taken & everyone
        if (taken == everyone).all():
            return jump.target, mask
        if not taken.any():
            return at + 1, mask
        stay = everyone & ~taken
        first, then = ((at + 1, stay), (jump.target, taken))
        if first[0] > then[0]:
            first, then = then, first
        _join(waiting, *then)
        return first


def _join(waiting: dict[int, Any], at: int, mask: Any) -> None:
    waiting[at] = mask if at not in waiting else mask | waiting[at]


def _found(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    if found is None:
        raise PtxError(f"no {pattern} in the kernel")
    return found.group(1)


def _argument(argument: Any) -> int:
    if isinstance(argument, torch.Tensor):
        return argument.data_ptr()
    if isinstance(argument, float):
        return int.from_bytes(struct.pack("<f", argument), "little")
    return int(argument)
