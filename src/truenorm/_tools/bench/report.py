"""Results as text: a line per case while they come, then the families beside their goals."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from ..extras import has
from .cases import COMPILE_GOAL, GOALS, Case
from .results import Result, Row
from .timing import COMPILE, DIRECTIONS, TENSORS_MOVED, TORCH, Quartiles

_MISSING = "–"


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
        widths = [11, 12, *([9] if self._compiled else []), 9, 7, 10] * len(DIRECTIONS)
        text = "".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
        return f"{label:<{self._label}}{threads:>7}{text}"

    def head(self) -> None:
        cells: list[str] = []
        for name in ("forward", "+backward"):
            compiled = ["compile"] if self._compiled else []
            cells += [name, "quartiles", *compiled, "MiB", "GB/s", "of floor"]
        moved = ", ".join(str(TENSORS_MOVED[direction]) for direction in DIRECTIONS)
        self._write(
            "Times faster than torch.nn (compile: than torch.compile); what must be moved (tensors "
            f"of the input's size, each once: {moved}), the rate of copying in the same rounds, "
            "and the share of that floor which is reached."
        )
        self._write(self._line("", "threads", cells))

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
            cells.append(times(TENSORS_MOVED[direction] * result.bytes / 2**20))
            cells.append(times(timing.copy_rate(result.bytes) / 1e9))
            cells.append(times(timing.of_floor().median))
        self._write(self._line(label, str(result.threads), cells))


def _beside(value: float | None, goal: float | None) -> str:
    return times(value) if goal is None else f"{times(value)} ({goal:g})"


def summary(rows: Sequence[Row]) -> str:
    """The families beside their goals, which stand in brackets."""
    compiled = any(row.compile is not None for row in rows)
    head = ["(goal)", "cases", "forward", "+backward", "worst", "of clone()"]
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
