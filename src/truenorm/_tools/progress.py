"""What the demonstration says while it works: a bar with rich on a terminal, lines otherwise."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from .extras import has


class Report(Protocol):
    """Where the work stands."""

    def begin(self, what: str) -> None:
        """Name what is done now."""

    def advance(self, amount: float = 1.0) -> None:
        """Move on by so much of the total."""


class _Lines:
    def begin(self, what: str) -> None:
        print(f"{what} …", flush=True)

    def advance(self, amount: float = 1.0) -> None:
        pass


@contextmanager
def reporting(total: float) -> Iterator[Report]:
    """A report on work of this total amount."""
    if not (has("rich") and sys.stdout.isatty()):
        yield _Lines()
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description:<48}"),
        BarColumn(bar_width=24),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
    )
    with Progress(*columns) as bars:
        task = bars.add_task("", total=total)

        class Bar:
            def begin(self, what: str) -> None:
                bars.update(task, description=what)

            def advance(self, amount: float = 1.0) -> None:
                bars.advance(task, amount)

        yield Bar()
        bars.update(task, description="done", completed=total)
