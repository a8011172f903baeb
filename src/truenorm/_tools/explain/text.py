"""An explanation in a terminal: with rich where it is installed, plain text otherwise."""

from __future__ import annotations

import sys
import textwrap
from itertools import zip_longest
from string import ascii_letters
from typing import TYPE_CHECKING

from ..extras import has
from ..palette import COLORS, ink_on
from .blocks import Block, Code, Heading, Map, Paragraph, Table, blocks

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from .explanation import Explanation

WIDTH = 88


def letter(group: int) -> str:
    """A, B, … for the groups of a map."""
    return ascii_letters[(group + 26) % 52]


def _plain_table(table: Table) -> list[str]:
    rows = [table.columns, *table.rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(table.columns))]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if i < table.words else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  " + "  ".join(cells).rstrip())
    return [line for line in lines if line.strip()]


def _plain_block(block: Block) -> list[str]:
    if isinstance(block, Heading):
        return [block.text, "─" * min(len(block.text), WIDTH)]
    if isinstance(block, Paragraph):
        return textwrap.wrap(block.text, WIDTH, initial_indent="  ", subsequent_indent="  ")
    if isinstance(block, Code):
        return textwrap.indent(block.text, "    ").splitlines()
    if isinstance(block, Map):
        width = max(len(name) for name, _ in block.rows)
        lines = [
            f"  {name.ljust(width)}  "
            + " ".join("  " if cell is None else letter(cell) for cell in cells)
            for name, cells in block.rows
        ]
        return [*lines, *([f"  {' ' * width}  ({block.more})"] if block.more else [])]
    return _plain_table(block)


def plain(explanation: Explanation) -> str:
    """The explanation as plain text."""
    lines: list[str] = []
    for block in blocks(explanation):
        lines += [*_plain_block(block), ""]
    return "\n".join(lines).rstrip()


def _rich_block(block: Block) -> RenderableType:
    from rich import box
    from rich.padding import Padding
    from rich.syntax import Syntax
    from rich.table import Table as RichTable
    from rich.text import Text

    if isinstance(block, Heading):
        return Text(block.text, style="bold cyan")
    if isinstance(block, Paragraph):
        return Padding(Text(block.text), (0, 2))
    if isinstance(block, Code):
        if not block.python:
            return Padding(Text(block.text), (0, 4))
        code = Syntax(
            block.text, "python", theme="ansi_dark", background_color="default", word_wrap=True
        )
        return Padding(code, (0, 4))
    if isinstance(block, Map):
        width = max(len(name) for name, _ in block.rows)
        text = Text()
        for name, cells in block.rows:
            text.append(f"{name.ljust(width)}  ")
            for cell in cells:
                if cell is None:
                    text.append("   ")
                    continue
                color = COLORS[cell % len(COLORS)]
                text.append(f" {letter(cell)} ", style=f"{ink_on(color)} on {color}")
            text.append("\n")
        text.append(f"{' ' * width}  {block.more}", style="dim")
        return Padding(text, (0, 2))
    table = RichTable(box=box.SIMPLE_HEAD, header_style="dim", pad_edge=False)
    for i, column in enumerate(block.columns):
        table.add_column(column, justify="left" if i < block.words else "right", no_wrap=True)
    for row in block.rows:
        table.add_row(*row)
    return Padding(table, (0, 2))


def show(explanation: Explanation, console: Console | None = None) -> None:
    """Print the explanation: in colour to a terminal, where rich is installed."""
    if console is None:
        if not (has("rich") and sys.stdout.isatty()):
            print(explanation)
            return
        from rich.console import Console

        console = Console()
        console.width = min(console.width, 100)
    told = list(blocks(explanation))
    for block, after in zip_longest(told, told[1:]):
        console.print(_rich_block(block))
        # rich's tables bring an empty line before and after
        if not isinstance(block, Heading | Table) and not isinstance(after, Table):
            console.print()
