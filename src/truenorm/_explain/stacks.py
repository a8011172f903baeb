"""A tensor drawn as stacks of slabs: a stack for each sample, a slab for each channel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from string import ascii_letters

from matplotlib.axes import Axes
from matplotlib.patches import Polygon

from .groups import Sharing
from .palette import COLORS, FAINT, INK, QUIET, ink_on, mix

# a cell one wide runs this far towards the reader, drawn down and to the left
DEPTH_X, DEPTH_Y = -0.42, -0.46
THIN, LAYER = 0.26, 0.5
BETWEEN_SLABS, BETWEEN_STACKS = 0.62, 1.3

Color = Callable[[int, int, int, int, int], str]


@dataclass(frozen=True)
class Extent:
    """How much of a tensor is drawn: samples, channels, and layers × rows × columns of positions.

    total: the same five sizes in full; place: the tensor's own index of a drawn cell.
    """

    drawn: tuple[int, int, int, int, int]
    total: tuple[int, int, int, int, int]
    dim: int

    def place(self, n: int, c: int, d: int, r: int, q: int) -> tuple[int, ...]:
        if self.dim <= 2:
            return ((), (q,), (n, q))[self.dim] if self.features else (n, c)[: self.dim]
        return (n, c, *[0] * (self.dim - 5), *(d, r, q)[-min(self.dim - 2, 3) :])

    features: bool = False


def extent(shape: tuple[int, ...], features: bool) -> Extent:
    """What of this shape to draw. features: the last dimension is drawn as columns (LayerNorm)."""
    dim = len(shape)
    if dim == 1:
        total = (1, 1, 1, 1, shape[0])
    elif dim == 2:
        total = (shape[0], 1, 1, 1, shape[1]) if features else (*shape, 1, 1, 1)
    else:
        positions = (1, 1, *shape[2:])[-3:]
        total = (shape[0], shape[1], *positions)
    n, c, d, r, q = total
    wide = q if r * d == 1 else min(q, 6)
    samples = 6 if q == 1 else 2 if min(wide, 8) > 6 else 3
    drawn = (min(n, samples), min(c, 4 if r * d > 1 else 6), min(d, 3), min(r, 5), min(wide, 8))
    return Extent(drawn, total, dim, features)


class Stacks:
    """Draws the stacks on `ax`, whose data coordinates are cells."""

    def __init__(self, ax: Axes, ext: Extent, color: Color) -> None:
        self.ax, self.ext, self.color = ax, ext, color
        samples, channels, layers, rows, columns = ext.drawn
        self.thick = layers * LAYER if ext.total[2] > 1 else THIN
        self.slab_height = -rows * DEPTH_Y + self.thick
        self.pitch_x = columns - rows * DEPTH_X + BETWEEN_STACKS
        self.pitch_y = self.slab_height + BETWEEN_SLABS
        self.width = samples * self.pitch_x - BETWEEN_STACKS
        self.height = channels * self.pitch_y - BETWEEN_SLABS

    def _corner(self, n: int, c: int) -> tuple[float, float]:
        """Back left corner of a slab's top."""
        return n * self.pitch_x - self.ext.drawn[3] * DEPTH_X, -c * self.pitch_y

    def _face(self, points: list[tuple[float, float]], color: str) -> None:
        self.ax.add_patch(
            Polygon(points, facecolor=color, edgecolor="white", linewidth=0.9, joinstyle="round")
        )

    def _slab(self, n: int, c: int) -> None:
        left, top = self._corner(n, c)
        _, _, layers, rows, columns = self.ext.drawn
        step = self.thick / layers

        def at(q: float, r: float, d: float) -> tuple[float, float]:
            return left + q + r * DEPTH_X, top + r * DEPTH_Y - d * step

        for r in range(rows):
            for q in range(columns):
                corners = [at(q, r, 0), at(q + 1, r, 0), at(q + 1, r + 1, 0), at(q, r + 1, 0)]
                self._face(corners, self.color(n, c, 0, r, q))
        for d in range(layers):
            for q in range(columns):
                corners = [
                    at(q, rows, d), at(q + 1, rows, d), at(q + 1, rows, d + 1), at(q, rows, d + 1)
                ]  # fmt: skip
                self._face(corners, mix(self.color(n, c, d, rows - 1, q), INK, 0.18))
            for r in range(rows):
                corners = [
                    at(columns, r, d), at(columns, r + 1, d),
                    at(columns, r + 1, d + 1), at(columns, r, d + 1),
                ]  # fmt: skip
                self._face(corners, mix(self.color(n, c, d, r, columns - 1), INK, 0.32))

    def draw(self, column_name: str, slab_name: str) -> None:
        """All slabs with their names; bottom to top, so that nearer faces cover farther ones."""
        samples, channels, _, rows, columns = self.ext.drawn
        ax = self.ax
        for n in range(samples):
            for c in reversed(range(channels)):
                self._slab(n, c)
            left, top = self._corner(n, 0)
            ax.text(
                left + columns / 2, top + 0.34, column_name.format(n),
                ha="center", va="bottom", fontsize=9.5, color=INK,
            )  # fmt: skip
        if slab_name:
            for c in range(channels):
                _, top = self._corner(0, c)
                ax.text(
                    -0.45, top - self.slab_height / 2, slab_name.format(c),
                    ha="right", va="center", fontsize=9.5, color=INK,
                )  # fmt: skip
        self._rest()
        ax.set_xlim(-self._label_width() if slab_name else -0.4, self.width + 0.5)
        ax.set_ylim(-self.height - 1.0, 1.3)
        ax.set_aspect("equal")
        ax.axis("off")

    def _label_width(self) -> float:
        return max(2.6, 0.2 * self.width)

    def _rest(self) -> None:
        """Says what is not drawn."""
        total, drawn = self.ext.total, self.ext.drawn
        hidden = []
        if prod(drawn) < prod(total):
            shown = f"{prod(drawn):,} of {prod(total):,} values drawn"
            hidden.append(shown)
        if hidden:
            self.ax.text(
                self.width / 2, -self.height - 0.45, "; ".join(hidden),
                ha="center", va="top", fontsize=8.5, color=QUIET,
            )  # fmt: skip

    def write(self, n: int, c: int, r: float, text: str, color: str, cell_points: float) -> None:
        """A letter in the middle of a slab's top, or of its row r."""
        left, top = self._corner(n, c)
        columns = self.ext.drawn[4]
        self.ax.text(
            left + columns / 2 + r * DEPTH_X, top + r * DEPTH_Y, text,
            ha="center", va="center_baseline", color=color, fontweight="bold",
            fontsize=max(6.0, min(13.0, 0.36 * cell_points)),
        )  # fmt: skip


def draw_groups(ax: Axes, sharing: Sharing, letters: dict[int, int], inches: float) -> None:
    """The tensor with each group in its colour and letter.

    letters: filled with the groups drawn, numbered as they appear. inches: the width of `ax`.
    """
    features = sharing.kind in ("layer", "rms")
    ext = extent(sharing.shape, features)

    def group(n: int, c: int, d: int, r: int, q: int) -> int:
        g = sharing.group_of(ext.place(n, c, d, r, q))
        return letters.setdefault(g, len(letters))

    samples, channels, _, rows, columns = ext.drawn
    order = [(n, c, 0, r, 0) for n in range(samples) for c in range(channels) for r in range(rows)]
    for cell in order:
        group(*cell)
    stacks = Stacks(ax, ext, lambda *cell: COLORS[group(*cell) % len(COLORS)])
    names = ("sample {}", "channel {}" if ext.total[1] > 1 or not features else "")
    if features:
        names = ("x[{}]" if len(sharing.shape) > 1 else "x", "x[n, {}]" if ext.dim > 2 else "")
    elif sharing.kind == "instance" and sharing.leading == 1:
        names = ("channel {}", "row {}" if ext.dim > 2 else "")
    stacks.draw(*names)
    low, high = ax.get_xlim()
    points = 72.0 * inches / (high - low)
    for n in range(samples):
        for c in range(channels):
            of_rows = [group(n, c, 0, r, 0) for r in range(rows)]
            whole = len(set(of_rows)) == 1
            for r, g in enumerate(of_rows[:1] if whole else of_rows):
                ink = ink_on(COLORS[g % len(COLORS)])
                middle = rows / 2 if whole else r + 0.5
                stacks.write(n, c, middle, ascii_letters[(g + 26) % 52], ink, points)


__all__ = ["FAINT", "Stacks", "draw_groups", "extent"]
