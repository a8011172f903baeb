"""Each group's values before and after, on a line of its own."""

from __future__ import annotations

from string import ascii_letters
from typing import TYPE_CHECKING

import torch
from matplotlib.axes import Axes
from torch import Tensor

from ..palette import COLORS, FAINT, INK, QUIET, ink_on, mix

if TYPE_CHECKING:
    from .explanation import Explanation

MAX_STRIPS = 6
MAX_DOTS = 64


def _strip(ax: Axes, values: Tensor, line: float, color: str) -> None:
    """Dots for a few values, their density for many."""
    if values.numel() <= MAX_DOTS:
        # spread over a few heights so that near values stay apart
        heights = [line + (0.1, -0.1, 0.2, -0.2, 0.0)[i % 5] for i in range(values.numel())]
        ax.scatter(
            values.tolist(),
            heights,
            s=20,
            color=color,
            edgecolors="white",
            linewidths=0.5,
            zorder=3,
        )
        return
    low, high = values.min().item(), values.max().item()
    if low == high:
        high = low + 1.0
    counts = torch.histc(values, bins=60, min=low, max=high)
    middles = torch.linspace(low, high, 121)[1::2]
    heights = (line - 0.3 + 0.66 * counts / counts.max()).tolist()
    ax.fill_between(middles.tolist(), line - 0.3, heights, color=color, linewidth=0, zorder=3)


def _spread(ax: Axes, centre: float, spread: float, line: float) -> None:
    ax.plot(
        [centre - spread, centre + spread], [line - 0.34] * 2, color=INK, linewidth=1.3, zorder=4
    )
    ax.plot([centre] * 2, [line - 0.42, line + 0.3], color=INK, linewidth=1.3, zorder=4)


def _badge(ax: Axes, g: int, line: float) -> None:
    color = COLORS[g % len(COLORS)]
    ax.annotate(
        ascii_letters[(g + 26) % 52], (0.0, line), xycoords=("axes fraction", "data"),
        xytext=(-12, 0), textcoords="offset points", ha="center", va="center", fontsize=8.5,
        fontweight="bold", color=ink_on(color), annotation_clip=False,
        bbox={"boxstyle": "round,pad=0.28", "facecolor": color, "edgecolor": "none"},
    )  # fmt: skip


def _frame(ax: Axes, title: str, strips: int) -> None:
    ax.set_title(title, loc="left", fontsize=10, color=INK, pad=6)
    ax.set_ylim(-0.6, strips - 0.4)
    ax.set_yticks([])
    ax.set_facecolor("none")
    for side in ("left", "right", "top"):
        ax.spines[side].set_visible(False)
    ax.spines["bottom"].set_color(FAINT)
    ax.tick_params(axis="x", colors=QUIET, labelsize=8, length=3, color=FAINT)
    ax.grid(axis="x", color=FAINT, linewidth=0.8, zorder=0)
    ax.set_axisbelow(True)


def draw_strips(before: Axes, after: Axes, e: Explanation, letters: dict[int, int]) -> None:
    """Draw both panels, for the first of the groups in `letters` (group: number of its letter)."""
    x, y = e.x.double(), e.by_hand
    shown = sorted(letters.items(), key=lambda item: item[1])[:MAX_STRIPS]
    rms = e.sharing.kind == "rms"
    for i, (g, number) in enumerate(shown):
        line = len(shown) - 1 - i
        color, group = mix(COLORS[number % len(COLORS)], "#FFFFFF", 0.1), e.groups[g]
        values, result = x[e.sharing.index(g)].flatten(), y[e.sharing.index(g)].flatten()
        _strip(before, values, line, color)
        _strip(after, result, line, color)
        for ax in (before, after):
            _badge(ax, number, line)
        if rms:
            _spread(before, 0.0, (group.mean_square or 0.0) ** 0.5, line)
            _spread(after, 0.0, torch.mean(result**2).sqrt().item(), line)
        else:
            _spread(before, group.mean or 0.0, (group.variance or 0.0) ** 0.5, line)
            spread = torch.var(result, correction=0).sqrt().item()
            _spread(after, torch.mean(result).item(), spread, line)
    mark = "0 ± root mean square" if rms else "mean ± standard deviation"
    _frame(before, f"before: x, and {mark}", len(shown))
    _frame(after, f"after: y, and {mark}", len(shown))
