"""Results as lines while they come, as a summary beside the goals, and as JSON."""

from __future__ import annotations

import os
import platform
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from .._extras import has
from .._library import info
from .cases import COMPILE_GOAL, FAMILIES, GOALS, LARGE_BYTES, Case
from .timing import BOTH, COMPILE, DIRECTIONS, FLOOR_NOTE, FORWARD, TORCH, Quartiles, Timing

_MISSING = "–"


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
            **{direction: timing.as_dict() for direction, timing in self.timings.items()},
        }


def times(value: float | None) -> str:
    """A ratio in three digits."""
    if value is None:
        return _MISSING
    return f"{value:.0f}" if value >= 99.5 else f"{value:.3g}" if value >= 0.01 else f"{value:.4f}"


def _spread(ratio: Quartiles | None) -> list[str]:
    if ratio is None:
        return [_MISSING, ""]
    return [times(ratio.median), f"{times(ratio.low)}–{times(ratio.high)}"]


class Lines:
    """The table of cases, line by line: columns as wide as the widest case that will come."""

    def __init__(self, cases: Sequence[Case], *, compiled: bool, write: Callable[[str], None]):
        self._label = max(len(case.label) for case in cases) + 2
        self._compiled, self._write, self._family = compiled, write, ""

    def _line(self, label: str, threads: str, cells: Sequence[str]) -> str:
        widths = [7, 14, *([8] if self._compiled else []), 7] * len(DIRECTIONS)
        text = "".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
        return f"{label:<{self._label}}{threads:>7}{text}"

    def head(self) -> None:
        cells: list[str] = []
        for name in ("forward", "+ backw."):
            compiled = ["compile"] if self._compiled else []
            cells += [name, "quartiles", *compiled, "floor"]
        self._write(self._line("times faster than torch.nn", "threads", cells))

    def result(self, result: Result) -> None:
        heading = f"{result.case.family}, {result.dtype}"
        if heading != self._family:
            self._family = heading
            self._write(f"{heading}")
        label = f"  {result.case.label}"
        if result.wrong:
            self._write(f"{label}: WRONG, not timed: {result.wrong}")
            return
        cells = []
        for direction in DIRECTIONS:
            timing = result.timings[direction]
            cells += _spread(timing.ratio(TORCH))
            if self._compiled:
                cells.append(_spread(timing.ratio(COMPILE))[0])
            cells.append(times(timing.of_floor().median))
        self._write(self._line(label, str(result.threads), cells))


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
            worst = min(
                ((m, f"{name}, {d}") for d in DIRECTIONS for m, name in by[d]),
                default=(None, ""),
            )
            rows.append(
                Row(
                    family, dtype, threads, len(here),
                    _mean([m for m, _ in by[FORWARD]]), _mean([m for m, _ in by[BOTH]]), *worst,
                    _mean([r.timings[FORWARD].of_floor().median for r in large]),
                    _mean(compiled), min(compiled, default=None),
                )
            )  # fmt: skip
    return rows


def _beside(value: float | None, goal: float | None) -> str:
    return times(value) if goal is None else f"{times(value)} ({goal:g})"


def summary(rows: Sequence[Row]) -> str:
    """The families beside their goals, which stand in brackets."""
    compiled = any(row.compile is not None for row in rows)
    head = ["(goal)", "cases", "forward", "+ backw.", "worst", "of clone()"]
    head += ["compile", "worst"] * compiled
    lines = []
    for dtype, threads in dict.fromkeys((row.dtype, row.threads) for row in rows):
        plural = "s" if threads > 1 else ""
        table = [[f"{dtype}, {threads} thread{plural}", *head, "  worst case"]]
        for row in rows:
            if (row.dtype, row.threads) != (dtype, threads):
                continue
            goal = GOALS[row.family]
            cells = [
                row.family, "", str(row.cases), _beside(row.forward, goal.forward),
                _beside(row.both, goal.both), _beside(row.worst, goal.worst),
                _beside(row.of_clone, goal.of_clone),
            ]  # fmt: skip
            if compiled:
                cells += [_beside(row.compile, COMPILE_GOAL[0])]
                cells += [_beside(row.compile_worst, COMPILE_GOAL[1])]
            table.append([*cells, f"  {row.worst_case}"])
        widths = [max(len(line[i]) for line in table) + 2 for i in range(len(table[0]))]
        for line in table:
            last = len(line) - 1
            cells = [
                text.ljust(width) if i in (0, last) else text.rjust(width)
                for i, (text, width) in enumerate(zip(line, widths, strict=True))
            ]
            lines.append("".join(cells).rstrip())
        lines.append("")
    return "\n".join(lines).rstrip()


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


class Progress(NamedTuple):
    """Says what is done now; `write` puts a line above the bar."""

    begin: Callable[[str], None]
    write: Callable[[str], None]


@contextmanager
def progress(total: int) -> Iterator[Progress]:
    """A bar with rich on a terminal; otherwise the lines alone."""
    if not (has("rich") and sys.stdout.isatty()):
        yield Progress(lambda what: None, lambda line: print(line, flush=True))
        return
    from rich import progress as rich

    columns = (
        rich.BarColumn(bar_width=24),
        rich.MofNCompleteColumn(),
        rich.TimeElapsedColumn(),
        rich.TextColumn("{task.description}"),
    )
    with rich.Progress(*columns, transient=True) as bars:
        task = bars.add_task("", total=total, completed=-1)

        def begin(what: str) -> None:
            bars.update(task, advance=1, description=what)

        def write(line: str) -> None:
            bars.console.print(line, markup=False, highlight=False, soft_wrap=True)

        yield Progress(begin, write)
