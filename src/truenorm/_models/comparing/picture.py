"""A comparison as a PNG: the difference along the layers, and where the models part."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ..._tools.files import write_picture
from ..._tools.palette import FAINT, INK, PAPER, QUIET

if TYPE_CHECKING:
    from .comparison import Comparison

DPI = 160
LINE, PART = "#2F4B9B", "#CC3311"
# more names than this do not fit along the axis
NAMED = 60


def draw(c: Comparison) -> Figure:
    """The figure: one point for each layer, on a logarithmic scale."""
    rows = c.layers
    named = len(rows) <= NAMED
    figure = Figure(figsize=(max(7.0, 0.22 * len(rows) if named else 11.0), 5.0), dpi=DPI)
    figure.set_facecolor(PAPER)
    FigureCanvasAgg(figure)
    ax = figure.add_subplot()
    ax.set_facecolor("none")
    finite = [r.relative for r in rows if 0.0 < r.relative < float("inf")]
    low, high = (min(finite), max(finite)) if finite else (1e-9, 1.0)
    # what is equal is drawn at the bottom, what has no number at the top
    floor, top = low / 10.0, high * 10.0
    values = [min(max(r.relative, floor), top) for r in rows]
    ax.plot(range(len(rows)), values, color=LINE, linewidth=1.2, alpha=0.5)
    colors = [PART if r.parts else LINE for r in rows]
    ax.scatter(range(len(rows)), values, c=colors, s=16, zorder=3)
    ax.set_yscale("log")
    ax.set_ylim(floor / 2.0, top * 2.0)
    if named:
        ax.set_xticks(range(len(rows)), [r.label for r in rows], rotation=90, fontsize=7)
    else:
        ax.set_xlabel("layers, in the order of their calls", color=QUIET)
    if c.first is None:
        title = "The two models do not part"
    else:
        title = f"The two models part at {c.first.label} ({c.first.kind_a})"
        ax.axvline(rows.index(c.first), color=PART, linewidth=1.0, linestyle=":")
    ax.set_title(title, loc="left", color=INK, fontsize=12, fontweight="bold")
    ax.set_ylabel("‖a − b‖ / ‖a‖", color=QUIET)
    ax.tick_params(colors=QUIET)
    ax.grid(axis="y", color=FAINT, linewidth=0.8)
    ax.set_axisbelow(True)
    for side in ("right", "top"):
        ax.spines[side].set_visible(False)
    figure.tight_layout()
    return figure


def save(c: Comparison, path: str | Path, *, force: bool) -> None:
    """Write the figure as a PNG, whole or not at all."""
    write_picture(path, draw(c), force=force)
