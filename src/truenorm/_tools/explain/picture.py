"""An explanation as a PNG: which values share a statistic, and the values before and after."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ..files import write_picture
from ..palette import INK, PAPER, QUIET
from .stacks import draw_groups
from .strips import draw_strips
from .window import draw_energy, draw_window

if TYPE_CHECKING:
    from .explanation import Explanation

WIDTH, HEIGHT, DPI = 10.0, 6.0, 160
STACKS = (0.02, 0.13, 0.53, 0.67)
BEFORE = (0.625, 0.52, 0.345, 0.26)
AFTER = (0.625, 0.14, 0.345, 0.26)


def _caption(e: Explanation) -> str:
    shape = ", ".join(f"{size:,}" for size in e.x.shape)
    if e.sharing.kind == "local response":
        each = "one window for each value, of " + e.sharing.how_many_values
    else:
        each = f"{e.sharing.how_many_statistics}, each of {e.sharing.how_many_values}"
    return f"input ({shape}):  {each}"


def _formula(e: Explanation) -> str:
    parts = [e.formula]
    if e.mistake is not None:
        parts.append("variance divided by n, not n − 1")
    parts.append(f"truenorm's result is within {e.differences['truenorm and by hand']:.0e} of this")
    return "    ·    ".join(parts)


def draw(e: Explanation) -> Figure:
    """The figure, 10 by 6 inches."""
    figure = Figure(figsize=(WIDTH, HEIGHT), dpi=DPI, facecolor=PAPER)
    FigureCanvasAgg(figure)
    stacks, before, after = (figure.add_axes(box) for box in (STACKS, BEFORE, AFTER))
    size = min(16.0, 16.0 * 62 / len(e.title))  # one line, whatever the sizes in it
    figure.text(0.03, 0.94, e.title, fontsize=size, fontweight="bold", color=INK, va="center")
    figure.text(0.03, 0.88, _caption(e), fontsize=11, color=QUIET, va="center")
    figure.text(0.03, 0.042, _formula(e), fontsize=9.5, color=QUIET, va="center")
    inches = (STACKS[2] * WIDTH, STACKS[3] * HEIGHT)
    if e.sharing.kind == "local response":
        draw_window(stacks, e, inches)
        draw_energy(before, after, e)
    else:
        letters: dict[int, int] = {}
        draw_groups(stacks, e.sharing, letters, inches)
        draw_strips(before, after, e, letters)
    return figure


def save(e: Explanation, path: str | Path, *, force: bool) -> None:
    """Write the figure as a PNG, whole or not at all."""
    write_picture(path, draw(e), force=force)
