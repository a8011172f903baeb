"""LocalResponseNorm's picture: one window of channels, and what it does to its middle value."""

from __future__ import annotations

from typing import TYPE_CHECKING

from matplotlib.axes import Axes

from ..palette import FAINT, INK, QUIET, mix
from .stacks import Extent, Stacks, extent, place

if TYPE_CHECKING:
    from .explanation import Explanation

MIDDLE, NEIGHBOUR, OTHER = "#CC6677", "#EDB996", "#DDE1E6"


def _cell(e: Explanation) -> tuple[Extent, int, int, int, int]:
    """What is drawn, and of it the middle of the window: line of its slab, layer, row, column."""
    ext = extent(e.sharing)
    line = min(e.sharing.size // 2, len(ext.channels) - 1)
    return ext, line, 0, ext.rows - 1, ext.columns // 2


def draw_window(ax: Axes, e: Explanation, inches: tuple[float, float]) -> None:
    """The tensor with one window in colour."""
    ext, line, *middle = _cell(e)
    first, last = e.sharing.window(ext.channels[line])

    def color(n: int, c: int, d: int, r: int, q: int) -> str:
        if n or [d, r, q] != middle or not first <= c <= last:
            return OTHER
        return MIDDLE if c == ext.channels[line] else NEIGHBOUR

    Stacks(ax, ext, color, inches).draw("sample {}", "channel {}")


def _bars(ax: Axes, e: Explanation, title: str) -> None:
    ax.set_title(title, loc="left", fontsize=10, color=INK, pad=6)
    ax.set_facecolor("none")
    for side in ("left", "right", "top"):
        ax.spines[side].set_visible(False)
    ax.spines["bottom"].set_color(FAINT)
    ax.tick_params(axis="both", colors=QUIET, labelsize=8, length=0)
    ax.grid(axis="y", color=FAINT, linewidth=0.8)
    ax.set_axisbelow(True)
    ax.set_xticks(range(min(e.x.shape[1], 12)))


def draw_energy(before: Axes, after: Axes, e: Explanation) -> None:
    """x² of the window's channels, and the values before and after, at the coloured position."""
    ext, line, *cell = _cell(e)
    middle = ext.channels[line]
    positions = place(e.sharing, 0, 0, *cell)[2:]
    channels = range(min(e.x.shape[1], 12))
    x = [e.x[0, c][positions].item() for c in channels]
    y = [e.by_hand[0, c][positions].item() for c in channels]
    first, last = e.sharing.window(middle)
    colors = [
        MIDDLE if c == middle else NEIGHBOUR if first <= c <= last else OTHER for c in channels
    ]
    before.bar(channels, [v * v for v in x], color=colors, width=0.7)
    total = sum(e.x[0, c][positions].item() ** 2 for c in range(first, last + 1))
    _bars(before, e, f"x² by channel; Σ in the window = {total:.4g}")
    width = 0.38
    pale = [mix(color, "#FFFFFF", 0.5) for color in colors]
    after.bar([c - width / 2 for c in channels], x, color=pale, width=width)
    after.bar([c + width / 2 for c in channels], y, color=colors, width=width)
    after.axhline(0.0, color=QUIET, linewidth=0.8)
    _bars(after, e, "before (pale) and after")
