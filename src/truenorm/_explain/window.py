"""LocalResponseNorm's picture: one window of channels, and what it does to its middle value."""

from __future__ import annotations

from matplotlib.axes import Axes

from .explanation import Explanation
from .palette import FAINT, INK, QUIET, mix
from .stacks import Stacks, extent

MIDDLE, NEIGHBOUR, OTHER = "#CC6677", "#EBC1A4", "#E3E6EA"
OUTLINE = "#88CCEE"


def _shown_channel(e: Explanation, drawn: int) -> int:
    """A channel whose window lies inside what is drawn, if there is one."""
    return min((e.sharing.size) // 2, drawn - 1)


def draw_window(ax: Axes, e: Explanation) -> int:
    """The tensor with one window in colour; returns the channel in its middle."""
    ext = extent(e.sharing.shape, features=False)
    _, channels, _, rows, columns = ext.drawn
    middle = _shown_channel(e, channels)
    first, last = e.sharing.window(middle)

    def color(n: int, c: int, d: int, r: int, q: int) -> str:
        if (n, d, r, q) != (0, 0, rows - 1, columns // 2) or not first <= c <= last:
            return OTHER
        return MIDDLE if c == middle else NEIGHBOUR

    Stacks(ax, ext, color).draw("sample {}", "channel {}")
    return middle


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


def draw_energy(before: Axes, after: Axes, e: Explanation, middle: int) -> None:
    """x² of the window's channels, and the values before and after, at the coloured position."""
    ext = extent(e.sharing.shape, features=False)
    place = ext.place(0, 0, 0, ext.drawn[3] - 1, ext.drawn[4] // 2)
    channels = range(min(e.x.shape[1], 12))
    x = [e.x[(0, c, *place[2:])].item() for c in channels]
    y = [e.by_hand[(0, c, *place[2:])].item() for c in channels]
    first, last = e.sharing.window(middle)
    colors = [
        MIDDLE if c == middle else NEIGHBOUR if first <= c <= last else OTHER for c in channels
    ]
    before.bar(channels, [v * v for v in x], color=colors, width=0.7)
    total = sum(v * v for v in x[first : last + 1])
    _bars(before, e, f"energy x² by channel: Σ in the window = {total:.4g}")
    width = 0.38
    after.bar([c - width / 2 for c in channels], x, color=[mix(c, "#FFFFFF", 0.45) for c in colors],
              width=width)  # fmt: skip
    after.bar([c + width / 2 for c in channels], y, color=colors, width=width)
    after.axhline(0.0, color=QUIET, linewidth=0.8)
    _bars(after, e, "before (pale) and after, by channel")
