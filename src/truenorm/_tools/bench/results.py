"""Results: of a case, of a family, and all of them as JSON."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..._core.library import info
from .cases import FAMILIES, GOALS, LARGE_BYTES, Case
from .timing import COMPILE, DIRECTIONS, FLOOR_NOTE, FORWARD, TENSORS_MOVED, TORCH, Timing


@dataclass(frozen=True)
class Result:
    """One case at one number of threads: its timings, or what was wrong with truenorm's results."""

    case: Case
    dtype: str
    threads: int
    wrong: str
    timings: dict[str, Timing]
    bytes: int

    def as_dict(self) -> dict[str, Any]:
        case = self.case
        return {
            "case": case.name,
            "family": case.family,
            "layer": case.layer,
            "kwargs": dict(case.kwargs),
            "shape": list(case.shape),
            "memory_format": str(case.memory_format).removeprefix("torch."),
            "mode": "train" if case.training else "eval",
            "network": case.network,
            "dtype": self.dtype,
            "threads": self.threads,
            "bytes": self.bytes,
            "wrong": self.wrong,
            **{
                direction: {
                    **timing.as_dict(),
                    "bytes_moved": TENSORS_MOVED[direction] * self.bytes,
                    "copy_bytes_per_second": timing.copy_rate(self.bytes),
                }
                for direction, timing in self.timings.items()
            },
        }


class Row(NamedTuple):
    """A family at one dtype and number of threads; ratios of medians, None where none is known."""

    family: str
    dtype: str
    threads: int
    cases: int
    forward: float | None
    both: float | None
    worst: float | None
    worst_case: str
    of_clone: float | None
    compile: float | None
    compile_worst: float | None


def _mean(values: Sequence[float]) -> float | None:
    return statistics.geometric_mean(values) if values else None


def _medians(results: Sequence[Result], direction: str, contender: str) -> list[tuple[float, str]]:
    found = ((r.timings[direction].ratio(contender), r.case.name) for r in results)
    return [(ratio.median, name) for ratio, name in found if ratio is not None]


def families(results: Sequence[Result]) -> list[Row]:
    """Geometric means and the worst case, by family, dtype and threads."""
    rows = []
    timed = [r for r in results if not r.wrong]
    for dtype, threads in dict.fromkeys((r.dtype, r.threads) for r in timed):
        for family in FAMILIES:
            here = [
                r for r in timed
                if (r.case.family, r.dtype, r.threads) == (family, dtype, threads)
            ]  # fmt: skip
            if not here:
                continue
            large = [r for r in here if r.bytes >= LARGE_BYTES]
            by = {d: _medians(here, d, TORCH) for d in DIRECTIONS}
            compiled = [m for d in DIRECTIONS for m, _ in _medians(large, d, COMPILE)]
            every = [(m, f"{name}, {d}") for d in DIRECTIONS for m, name in by[d]]
            worst, worst_case = min(every) if every else (None, "")
            forward, both = (_mean([m for m, _ in by[d]]) for d in DIRECTIONS)
            rows.append(
                Row(
                    family, dtype, threads, len(here), forward, both, worst, worst_case,
                    _mean([r.timings[FORWARD].of_floor().median for r in large]),
                    _mean(compiled), min(compiled, default=None),
                )
            )  # fmt: skip
    return rows


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def machine() -> dict[str, Any]:
    """What the figures depend on, and nothing that names the machine."""
    about = info()
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "system": platform.system(),
        "instruction_set": about.instruction_set,
        "cpu": about.cpu,
        "truenorm": about.version,
        "torch": about.torch_version,
    }


def as_json(results: Sequence[Result], rows: Sequence[Row], **about: Any) -> dict[str, Any]:
    """Everything that was measured."""
    return {
        **machine(),
        **about,
        "ratios": "time over truenorm's, per round: [lower quartile, median, upper quartile]",
        "floor": FLOOR_NOTE,
        "families": [{**row._asdict(), "goal": GOALS[row.family]._asdict()} for row in rows],
        "results": [r.as_dict() for r in results],
    }
