"""Checks as tables: with rich where it is installed and someone watches, else in plain text."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence

import torch

from ..extras import has
from .measure import Check
from .sections import Section

_MISSING = "–"


def number(value: float | None) -> str:
    """Short: 3e-7, 0.02, 4.7, 120; a dash where there is none."""
    if value is None:
        return _MISSING
    if not math.isfinite(value):
        return "inf"
    if value == 0 or 0.01 <= value < 1000:
        return f"{value:.2g}" if value < 10 else f"{value:.0f}"
    return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e").replace("e+", "e")


def _largest(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return max(known) if known else None


def rows(section: Section, checks: Sequence[Check]) -> list[list[str]]:
    """One row per layer and layout: the largest errors of both, the promise, the result."""
    grouped: dict[tuple[str, str], list[Check]] = {}
    for check in checks:
        grouped.setdefault(section.row(check), []).append(check)
    result = []
    for labels, group in grouped.items():
        cells = []
        for of_torch in (False, True):
            for condition in section.conditions:
                # "1e4, float32 parameters" belongs to the column "1e4"
                here = [
                    c for c in group
                    if c.condition == condition or c.condition.startswith(condition + ", float32")
                ]  # fmt: skip
                cells.append(number(_largest([c.torch if of_torch else c.truenorm for c in here])))
        promise = number(max(c.promise for c in group))
        passed = all(c.passed for c in group)
        result.append([*labels, *cells, promise, "pass" if passed else "FAIL"])
    return result


def header(section: Section) -> list[str]:
    conditions = section.conditions
    ours = [f"truenorm {conditions[0]}", *conditions[1:]]
    theirs = [f"torch {conditions[0]}", *conditions[1:]]
    return ["layer", "", *ours, *theirs, "promised", "result"]


def _plain(title: str, head: list[str], body: list[list[str]]) -> None:
    widths = [max(len(line[i]) for line in (head, *body)) for i in range(len(head))]
    print(title)
    for line in (head, *body):
        cells = [
            text.ljust(width) if i < 2 else text.rjust(width)
            for i, (text, width) in enumerate(zip(line, widths, strict=True))
        ]
        print("  " + "  ".join(cells).rstrip())
    print(flush=True)


def _rich(title: str, head: list[str], body: list[list[str]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for i, text in enumerate(head):
        table.add_column(text, justify="left" if i < 2 else "right", no_wrap=True)
    for line in body:
        style = "bold red" if line[-1] == "FAIL" else None
        table.add_row(*line, style=style)
    Console().print(table)


def _width(head: list[str], body: list[list[str]]) -> int:
    return sum(max(len(line[i]) for line in (head, *body)) + 3 for i in range(len(head)))


def show(section: Section, checks: Sequence[Check]) -> None:
    head, body = header(section), rows(section, checks)
    if not body:
        return
    if sys.stdout.isatty() and has("rich"):
        import shutil

        # rich cuts what does not fit; a terminal wraps plain text, and nothing is lost
        if shutil.get_terminal_size().columns >= _width(head, body):
            _rich(section.title, head, body)
            return
    _plain(section.title, head, body)


def summary(checks: Sequence[Check]) -> str:
    failed = sum(not c.passed for c in checks)
    of_torch = sum(not c.torch_passed for c in checks)
    refused = sum(c.torch is None for c in checks)
    lines = [
        f"{len(checks)} checks, {failed} failed. "
        f"torch {torch.__version__} would fail {of_torch} of them"
        + (f", and does not take {refused}." if refused else ".")
    ]
    broken = [c for c in checks if not c.passed]
    lines += [f"FAIL  {c}" for c in broken[:20]]
    if len(broken) > 20:
        lines.append(f"… and {len(broken) - 20} more: --json FILE lists them all")
    return "\n".join(lines)
