"""A tensor drawn as stacks of slabs: a stack for each sample, a slab for each channel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from string import ascii_letters
from typing import Any

from matplotlib.axes import Axes
from matplotlib.patches import Polygon

from ..palette import COLORS, INK, QUIET, ink_on, mix
from .groups import Sharing

# how much darker than the top a slab's front is
FRONT = 0.16

Color = Callable[[int, int, int, int, int], str]


@dataclass(frozen=True)
class Extent:
    """What of a tensor is drawn: samples, channels, and layers × rows × columns of positions.

    total: all five sizes in full. drawn: how many are drawn of samples, layers, rows and columns,
    the first ones of each; of the channels, those in `channels`.
    """

    total: tuple[int, int, int, int, int]
    samples: int
    channels: tuple[int, ...]
    layers: int
    rows: int
    columns: int

    @property
    def num_drawn(self) -> int:
        return self.samples * len(self.channels) * self.layers * self.rows * self.columns


def _five_sizes(sharing: Sharing) -> tuple[int, int, int, int, int]:
    shape = sharing.shape
    if sharing.kind == "instance" and sharing.leading == 1:
        shape = (1, *shape)
    if sharing.kind in ("layer", "rms") and len(shape) <= 2:
        return 1, (1, *shape)[-2], 1, 1, shape[-1]
    d, r, q = (1, 1, 1, *shape[2:])[-3:]
    return shape[0], shape[1], d, r, q


def extent(sharing: Sharing) -> Extent:
    """What of this input to draw: enough to see the pattern, few enough to see each cell."""
    n, c, d, r, q = total = _five_sizes(sharing)
    columns = min(q, 6)
    samples = min(n, 6 if q == 1 else 2 if columns > 4 else 3)
    most = 4 if r * d > 1 else 6
    if sharing.kind == "group":
        per_group = c // sharing.num_groups
        each = min(per_group, 2 if sharing.num_groups > 1 else most)
        groups = min(sharing.num_groups, most // each)
        channels = [g * per_group + i for g in range(groups) for i in range(each)]
    else:
        channels = list(range(min(c, most)))
    return Extent(total, samples, tuple(channels), min(d, 3), min(r, 5), columns)


def place(sharing: Sharing, n: int, c: int, d: int, r: int, q: int) -> tuple[int, ...]:
    """The tensor's own index of a cell that is drawn."""
    dim = len(sharing.shape)
    if sharing.kind in ("layer", "rms") and dim <= 2:
        return (c, q)[-dim:]
    if sharing.kind == "instance" and sharing.leading == 1:
        return (c, *(d, r, q)[4 - dim :])
    positions = (d, r, q)[max(5 - dim, 0) :]
    return (n, c, *[0] * (dim - 2 - len(positions)), *positions)


class Stacks:
    """Draws the stacks on `ax`, an empty one of the given size in inches."""

    LABELS, HEADS = 0.78, 0.34
    LARGEST_CELL = 0.62

    def __init__(self, ax: Axes, ext: Extent, color: Color, inches: tuple[float, float]) -> None:
        self.ax, self.ext, self.color = ax, ext, color
        # a single row of cells looks better as bricks than as tiles
        self.flat = flat = ext.rows == 1 and ext.layers == 1
        self.dx, self.dy = (-0.5, -0.5) if flat else (-0.42, -0.46)
        layer = 0.5 if ext.total[2] > 1 else 0.62 if flat else 0.26
        self.thick = ext.layers * layer
        self.slab_height = -ext.rows * self.dy + self.thick
        self.pitch_x = ext.columns - ext.rows * self.dx + (0.9 if flat else 1.1)
        self.pitch_y = self.slab_height + (0.4 if flat else 0.55)
        self.width = ext.samples * self.pitch_x - (0.9 if flat else 1.1)
        self.height = len(ext.channels) * self.pitch_y - (0.4 if flat else 0.55)
        wide, high = inches
        self.cell = min(
            (wide - self.LABELS - 0.1) / self.width,
            (high - 2 * self.HEADS) / self.height,
            self.LARGEST_CELL,
        )
        spare = (wide - self.LABELS) / self.cell - self.width
        left = -self.LABELS / self.cell - spare / 2
        bottom = -self.height - (high / self.cell - self.height) / 2
        ax.set_xlim(left, left + wide / self.cell)
        ax.set_ylim(bottom, bottom + high / self.cell)
        ax.axis("off")

    def _corner(self, n: int, line: int) -> tuple[float, float]:
        """Back left corner of a slab's top."""
        return n * self.pitch_x - self.ext.rows * self.dx, -line * self.pitch_y

    def _face(self, points: list[tuple[float, float]], color: str) -> None:
        self.ax.add_patch(
            Polygon(points, facecolor=color, edgecolor="white", linewidth=0.9, joinstyle="round")
        )

    def _slab(self, n: int, line: int) -> None:
        ext, c = self.ext, self.ext.channels[line]
        left, top = self._corner(n, line)
        step = self.thick / ext.layers

        def at(q: int, r: int, d: int) -> tuple[float, float]:
            return left + q + r * self.dx, top + r * self.dy - d * step

        for r in range(ext.rows):
            for q in range(ext.columns):
                corners = [at(q, r, 0), at(q + 1, r, 0), at(q + 1, r + 1, 0), at(q, r + 1, 0)]
                self._face(corners, self.color(n, c, 0, r, q))
        for d in range(ext.layers):
            r, right = ext.rows, ext.columns
            for q in range(ext.columns):
                corners = [at(q, r, d), at(q + 1, r, d), at(q + 1, r, d + 1), at(q, r, d + 1)]
                self._face(corners, mix(self.color(n, c, d, r - 1, q), INK, FRONT))
            for r in range(ext.rows):
                corners = [at(right, r, d), at(right, r + 1, d)]
                corners += [at(right, r + 1, d + 1), at(right, r, d + 1)]
                self._face(corners, mix(self.color(n, c, d, r, right - 1), INK, 0.3))

    def draw(self, sample: str, channel: str) -> None:
        """All slabs, from the bottom up, and their names."""
        ext, ax = self.ext, self.ax
        for n in range(ext.samples):
            for line in reversed(range(len(ext.channels))):
                self._slab(n, line)
            left, top = self._corner(n, 0)
            head: dict[str, Any] = {"ha": "center", "va": "bottom", "fontsize": 10, "color": INK}
            ax.text(left + ext.columns / 2, top + 0.09 / self.cell, sample.format(n), **head)
        if channel:
            for line, c in enumerate(ext.channels):
                middle = self._corner(0, line)[1] - self.slab_height / 2
                side: dict[str, Any] = {"ha": "right", "va": "center", "fontsize": 10, "color": INK}
                ax.text(-0.08 / self.cell, middle, channel.format(c), **side)
        if ext.num_drawn < prod(ext.total):
            ax.text(
                self.width / 2,
                -self.height - 0.1 / self.cell,
                f"{ext.num_drawn:,} of {prod(ext.total):,} values drawn",
                ha="center",
                va="top",
                fontsize=8.5,
                color=QUIET,
            )

    def write(self, n: int, line: int, row: float, rows: int, text: str, color: str) -> None:
        """A letter in the middle of so many rows of a slab's top; of a brick, on its front."""
        left, top = self._corner(n, line)
        columns = self.ext.columns
        x, y = left + columns / 2 + row * self.dx, top + row * self.dy
        # hides the edges of the cells behind the letter
        box: dict[str, Any] = {
            "boxstyle": "square,pad=0.15",
            "facecolor": color,
            "edgecolor": "none",
        }
        if self.flat:
            x, y = left + (columns - 1) // 2 + 0.5 + self.dx, top + self.dy - self.thick / 2
            box, color = {"alpha": 0.0}, mix(color, INK, FRONT)
        size = min(13.0, 0.42 * 72 * self.cell * min(max(rows, 1.2), 3))
        self.ax.text(
            x, y, text,
            ha="center", va="center_baseline", color=ink_on(color), fontweight="bold",
            fontsize=max(size, 6.5), bbox=box,
        )  # fmt: skip


def _names(sharing: Sharing) -> tuple[str, str]:
    dim = len(sharing.shape)
    if sharing.kind in ("layer", "rms"):
        return ("x[{}]", "x[n, {}]") if dim > 2 else ("x", "x[{}]" if dim > 1 else "")
    return (
        "x" if sharing.kind == "instance" and sharing.leading == 1 else "sample {}"
    ), "channel {}"


def draw_groups(
    ax: Axes, sharing: Sharing, letters: dict[int, int], inches: tuple[float, float]
) -> None:
    """The tensor, each group in its colour and with its letter.

    letters: receives the groups drawn, numbered as they appear.
    """
    ext = extent(sharing)

    def number(*cell: int) -> int:
        g = sharing.group_of(place(sharing, *cell))
        return letters.setdefault(g, len(letters))

    for n in range(ext.samples):
        for c in ext.channels:
            for r in range(ext.rows):
                number(n, c, 0, r, 0)
    stacks = Stacks(ax, ext, lambda *cell: COLORS[number(*cell) % len(COLORS)], inches)
    stacks.draw(*_names(sharing))
    for n in range(ext.samples):
        for line, c in enumerate(ext.channels):
            of_rows = [number(n, c, 0, r, 0) for r in range(ext.rows)]
            whole = len(set(of_rows)) == 1
            for r, g in enumerate(of_rows[:1] if whole else of_rows):
                middle, rows = (ext.rows / 2, ext.rows) if whole else (r + 0.5, 1)
                text, color = ascii_letters[(g + 26) % 52], COLORS[g % len(COLORS)]
                stacks.write(n, line, middle, rows, text, color)
