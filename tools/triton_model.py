"""What would bound the Triton kernels on a GPU, told from their machine code: a model, no measure.

    python tools/triton_model.py [--gpu h100] [--dtype bfloat16] [--only LayerNorm]

Each launch is compiled (triton_compile.py), and its machine code walked once as a warp meets it,
in order, branches to rare code left out: an instruction waits for the registers that it reads, by
the latencies below. That gives how long a tile takes; registers, threads and shared memory give how
many programs a multiprocessor holds, and so how many bytes it moves a cycle while it waits. Beside
that stand the instructions that each value takes of what a multiprocessor issues. The least of
these over the bytes that a copy moves is the share of its speed that a kernel could reach at most.

Latencies and rates are those that vendors' guides and published microbenchmarks give for the
architecture, the loaded memory's being a guess: what is compared are kernels with one another.
"""

from __future__ import annotations

import argparse
import re
import sys
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import triton_resources as cases
from triton_compile import Compiled, Launch, compile_for


class Gpu(NamedTuple):
    """clock: cycles a second; copy: bytes a second of a copy, read and written."""

    capability: int
    processors: int
    clock: float
    copy: float
    registers: int = 65536
    threads: int = 2048
    shared: int = 227 * 1024
    float64: float = 64.0
    conversions: float = 16.0
    issue: float = 128.0

    @property
    def bytes_per_cycle(self) -> float:
        """Of one multiprocessor, at the copy's speed."""
        return self.copy / self.clock / self.processors


GPUS = {
    "h100": Gpu(90, 132, 1.755e9, 3.0e12),
    "h200": Gpu(90, 132, 1.755e9, 4.2e12),
    "a100": Gpu(80, 108, 1.41e9, 1.75e12, shared=163 * 1024, float64=32.0),
}
MEMORY, BEGIN = 800, 400
# cycles until a result can be read; the first name that begins an instruction counts
LATENCY = {
    "LDG": MEMORY, "LDGDEPBAR": 1, "LDGSTS": 1, "LDS": 30, "LDC": 30, "ULDC": 10, "SHFL": 24,
    "F2F": 24, "I2F": 24, "F2I": 24, "MUFU": 24, "DADD": 16, "DMUL": 16, "DFMA": 16, "DSETP": 16,
    "S2R": 30, "BAR": 30, "CALL": 60,
}  # fmt: skip
OTHERS = 5
_WIDE = ("DADD", "DMUL", "DFMA", "DSETP")
_CONVERSIONS = "F2F.F64", "F2F.BF16.F64", "F2F.F32.F64", "I2F.F64", "MUFU"
# by how their names begin
KINDS: dict[str, tuple[str, ...]] = {
    "all": ("",),
    "float64": _WIDE,
    "conversions": _CONVERSIONS,
    "barriers": ("BAR",),
    "loads": ("LDG",),
}
# a region of so few instructions is not worth a branch, and counts as met
_SMALL = 12
_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);")


class Instruction(NamedTuple):
    at: int
    guard: str
    name: str
    operands: str

    @property
    def target(self) -> int | None:
        """Where it branches; not where only a warp whose threads part does."""
        if self.name.startswith("BRA.DIV"):
            return None
        found = re.search(r"0x([0-9a-f]+)", self.operands)
        return int(found.group(1), 16) if self.name.startswith("BRA") and found else None


def instructions(sass: str) -> list[Instruction]:
    return [
        Instruction(int(at, 16), guard, name, operands.strip())
        for at, guard, name, operands in _LINE.findall(sass)
    ]


def _registers(operand: str, count: int) -> list[str]:
    found = re.match(r"[-|~!]*(U?R)(\d+)(\.64)?", operand.strip())
    if not found:
        return []
    first, count = int(found.group(2)), max(count, 2 if found.group(3) else 1)
    return [f"{found.group(1)}{first + i}" for i in range(count)]


@dataclass
class Walk:
    """What one warp meets on its way through a tile.

    loop: how many cycles one turn of the loop takes that loads, 0 where there is none.
    """

    cycles: float = 0.0
    loop: float = 0.0
    counts: dict[str, int] = field(default_factory=dict)
    in_loop: dict[str, int] = field(default_factory=dict)

    @property
    def met(self) -> dict[str, int]:
        """Instructions for a tile, by kind."""
        return self.in_loop if self.loop else self.counts


def _met(code: list[Instruction]) -> tuple[list[Instruction], tuple[int, int] | None]:
    """(the instructions on the way, first and last of the loop that loads)."""
    way: list[Instruction] = []
    loop: tuple[int, int] | None = None
    i = 0
    while i < len(code):
        step = code[i]
        target = step.target
        if step.name.startswith("EXIT") and not step.guard:
            break
        if target is not None and target <= step.at:
            inside = [each for each in way if each.at >= target]
            loads = sum(each.name.startswith(("LDG", "STG")) for each in inside)
            if loop is None and loads and target < step.at:
                loop = target, step.at
        elif target is not None and (step.guard or "P" in step.operands):
            skipped = [each for each in code if step.at < each.at < target]
            moves = any(each.name.startswith(("LDG", "STG")) for each in skipped)
            if moves:
                rare = loop is not None
            else:
                rare = len(skipped) > _SMALL or any(s.name.startswith("CALL") for s in skipped)
            if rare:
                i = next(j for j, each in enumerate(code) if each.at >= target)
                continue
        elif target is not None:
            i = next(j for j, each in enumerate(code) if each.at >= target)
            continue
        way.append(step)
        i += 1
    return way, loop


def walk(sass: str, ahead: int = 1) -> Walk:
    """By the latencies above, twice through the loop: the second turn is what each turn takes.

    ahead: how many turns before what a pipeline reads is asked for.
    """
    way, loop = _met(instructions(sass))
    found = Walk()
    inside = [s for s in way if loop and loop[0] <= s.at <= loop[1]]
    found.counts, found.in_loop = (
        {kind: sum(s.name.startswith(begins) for s in steps) for kind, begins in KINDS.items()}
        for steps in (way, inside)
    )
    if inside:
        before = [s for s in way if s.at < inside[0].at]
        found.loop = _cycles(before + inside * 2) - _cycles(before + inside)
        if any(s.name.startswith("LDGSTS") for s in inside):
            # what is read ahead comes no sooner
            found.loop = max(found.loop, MEMORY / ahead)
    found.cycles = _cycles(way)
    return found


def _cycles(way: list[Instruction]) -> float:
    ready: dict[str, float] = {}
    now = copied = 0.0
    for step in way:
        base = step.name.split(".")[0]
        latency = next((n for key, n in LATENCY.items() if base == key), OTHERS)
        wide = 2 if step.name.startswith((*_WIDE, "F2F.F64", "F2F.F32.F64", "F2F.BF16.F64")) else 1
        count = 4 if ".128" in step.name else 2 if ".64" in step.name or "WIDE" in step.name else 1
        operands = step.operands.split(",")
        reads = operands if base in ("STG", "STS", "BRA", "BAR") else operands[1:]
        needs = [ready.get(r, 0.0) for each in re.findall(r"U?R\d+(?:\.64)?", ",".join(reads))
                 for r in _registers(each, wide)]  # fmt: skip
        now = max([now + 1, *needs])
        if base == "LDGSTS":
            copied = now + MEMORY
        elif base == "LDGDEPBAR":
            pass
        elif base == "DEPBAR":
            now = max(now, copied - MEMORY)
        elif base == "BAR":
            now += latency
        elif base not in ("STG", "STS", "BRA"):
            for r in _registers(operands[0], max(count, wide)):
                ready[r] = now + latency
    return now


class Bound(NamedTuple):
    """programs: that a multiprocessor holds. waits, issue, float64, conversions: bytes a cycle that
    each lets a multiprocessor move, over those of a copy.
    """

    programs: int
    in_flight: float
    found: Walk
    cycles: float
    waits: float
    issue: float
    float64: float
    conversions: float

    @property
    def share(self) -> float:
        return min(1.0, self.waits, self.issue, self.float64, self.conversions)


def resident(launch: Launch, compiled: Compiled, gpu: Gpu) -> int:
    threads = 32 * launch.options.get("num_warps", 4)
    # given out by 8 for each thread, and by 1 KiB of shared memory that each program takes besides
    registers = -(-compiled.registers // 8) * 8 * threads
    return max(1, min(gpu.registers // registers, gpu.threads // threads, 32,
                      gpu.shared // (compiled.shared + 1024)))  # fmt: skip


def turns_of(launch: Launch) -> int:
    """How often a program goes through its loop."""
    given = launch.arguments
    if "r_chunk" in given:
        return -(-given["k_chunk"] // given["BK"]) * int(given["r_chunk"])
    return -(-given.get("blocks", 1) // launch.grid[0])


def bound(launch: Launch, compiled: Compiled, gpu: Gpu, moved: int) -> Bound:
    """moved: bytes that a program moves for a tile."""
    found = walk(compiled.sass, launch.arguments.get("STAGES", 1) - 1 or 1)
    programs = resident(launch, compiled, gpu)
    threads = 32 * launch.options.get("num_warps", 4)
    counts = found.met
    cycles = found.cycles + BEGIN
    if found.loop:
        turns = turns_of(launch)
        cycles = (cycles + (turns - 1) * found.loop) / turns
    rates = {}
    for kind, each in (("all", gpu.issue), ("float64", gpu.float64),
                       ("conversions", gpu.conversions)):  # fmt: skip
        taken = counts[kind] * threads / each
        rates[kind] = moved / taken / gpu.bytes_per_cycle if taken else float("inf")
    return Bound(
        programs, programs * moved / 1024, found, cycles,
        programs * moved / cycles / gpu.bytes_per_cycle,
        rates["all"], rates["float64"], rates["conversions"],
    )  # fmt: skip


# of each kernel, how many tensors of x's kind it reads and writes
MOVES = {
    "forward": 2, "normalize": 2, "moments": 1, "backward": 3, "backward_sums": 2,
    "backward_apply": 3,
}  # fmt: skip
HEAD = (
    f"{'':<34}{'':<16}{'tile':>9}{'w':>3}{'reg':>5}{'smem':>7}{'progs':>6}{'KiB':>6}{'cycles':>8}"
    f"{'bar':>4}{'insn/value':>11}{'f64':>5}{'conv':>5}{'waits':>7}{'issue':>6}{'f64':>6}"
    f"{'conv':>6}{'share':>6}"
)


def filled(given: dict[str, Any]) -> int:
    """Values of a tile that there are."""
    runs = given["R"] if given.get("RUNS") else 1
    units = given["units"] if given.get("GROUPED") else given["BU"]
    return int(units * min(given["BK"], given["K"] * runs))


def line(what: str, launch: Launch, gpu: Gpu, itemsize: int) -> str:
    """By warps, registers, shared memory, programs of a multiprocessor, their KiB, cycles of a
    tile, barriers, what a value takes of instructions, and the bounds.
    """
    compiled = compile_for(launch, gpu.capability)
    given, name = launch.arguments, launch.kernel.__name__
    values, warps = filled(given), launch.options.get("num_warps", 4)
    b = bound(launch, compiled, gpu, values * itemsize * MOVES[name])
    counts = b.found.met
    each, conversions, wide = (
        counts[kind] * 32 * warps / values for kind in ("all", "conversions", "float64")
    )
    tile = f"{given['BU']}x{given['BK']}"
    return (
        f"{what:<34.33}{name:<16}{tile:>9}{warps:>3}{compiled.registers:>5}{compiled.shared:>7}"
        f"{b.programs:>6}{b.in_flight:>6.0f}{b.cycles:>8.0f}{counts['barriers']:>4}{each:>11.1f}"
        f"{wide:>5.1f}{conversions:>5.1f}{b.waits:>7.2f}{b.issue:>6.2f}{b.float64:>6.1f}"
        f"{b.conversions:>6.1f}{b.share:>6.2f}"
    )


def report(gpu: Gpu, dtype: torch.dtype, only: str) -> None:
    print(HEAD)
    for what, axes, shape, lay, _ in cases.CASES:
        if not re.search(only, what):
            continue
        for launch in cases._launches(axes, shape, dtype, lay):
            if launch.kernel.__name__ in MOVES:
                print(line(f"{what} {shape}", launch, gpu, dtype.itemsize), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpu", choices=GPUS, default="h100")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--only", default="", help="a regular expression of cases")
    args = parser.parse_args()
    report(GPUS[args.gpu], getattr(torch, args.dtype), args.only)
    return 0


if __name__ == "__main__":
    sys.exit(main())
