"""The ratios as a picture: a line per case, grouped by family, forward beside both directions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator

from .. import files
from ..palette import COLORS, FAINT, INK, PAPER, QUIET
from .results import Result, families, machine
from .timing import BOTH, COMPILE, DIRECTIONS, FORWARD, TORCH

DPI = 150
_ROW, _WIDTH, _TOP, _BOTTOM = 0.185, 10.0, 1.55, 0.45
_OURS, _SLOWER, _FLOOR, _COMPILE = "#2F4B9B", COLORS[1], INK, COLORS[6]
_TITLES = {FORWARD: "forward", BOTH: "forward and backward"}
_LEFT, _RIGHT = 0.315, 0.985


def _shown(results: Sequence[Result]) -> list[Result]:
    """Those of one dtype and number of threads: float32 and the most threads, where measured."""
    timed = [r for r in results if not r.wrong]
    settings = {(r.dtype == "float32", r.threads, r.dtype) for r in timed}
    if not settings:
        return []
    _, threads, dtype = max(settings)
    return [r for r in timed if (r.threads, r.dtype) == (threads, dtype)]


def _rows(results: Sequence[Result]) -> list[tuple[str, Result | None]]:
    """(text, its result), top to bottom; a family's heading and the space above it have none."""
    rows: list[tuple[str, Result | None]] = []
    family = ""
    for result in results:
        if result.case.family != family:
            family = result.case.family
            rows += [("", None)] * bool(rows) + [(family, None)]
        rows.append((result.case.label, result))
    return rows


def _panel(ax: Axes, rows: Sequence[tuple[str, Result | None]], direction: str) -> None:
    ax.set_facecolor("none")
    ax.set_xscale("log")
    ax.set_ylim(len(rows) - 0.4, -0.6)
    ax.tick_params(axis="y", length=0, labelleft=False)
    ax.tick_params(axis="x", colors=QUIET, labelsize=8.5, color=FAINT, labeltop=True, top=True)
    ax.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
    ax.minorticks_off()
    ax.grid(axis="x", color=FAINT, linewidth=0.8)
    ax.set_axisbelow(True)
    for side in ax.spines.values():
        side.set_visible(False)
    ax.axvline(1.0, color=QUIET, linewidth=1.2)
    for at, (_, result) in enumerate(rows):
        ratio = result.timings[direction].ratio(TORCH) if result else None
        if result is None or ratio is None:
            continue
        color = _OURS if ratio.median >= 1.0 else _SLOWER
        ax.plot([1.0, ratio.median], [at, at], color=color, linewidth=1.0, alpha=0.35)
        ax.plot([ratio.low, ratio.high], [at, at], color=color, linewidth=3.2, alpha=0.5)
        ax.plot(ratio.median, at, "o", color=color, markersize=4.6)
        # where truenorm would stand if it took as long as moving the bytes
        floor = ratio.median / result.timings[direction].of_floor().median
        ax.plot(floor, at, "|", color=_FLOOR, markersize=8.5, markeredgewidth=1.3)
        compiled = result.timings[direction].ratio(COMPILE)
        if compiled is not None:
            at_compile = ratio.median / compiled.median
            ax.plot(at_compile, at, "D", color=_COMPILE, markersize=3.4, fillstyle="none")


def _limits(results: Sequence[Result], direction: str) -> tuple[float, float]:
    reached = [1.0]
    for result in results:
        ratio = result.timings[direction].ratio(TORCH)
        if ratio is not None:
            floor = result.timings[direction].of_floor().median
            reached += [ratio.low, ratio.high, ratio.median / floor]
            if compiled := result.timings[direction].ratio(COMPILE):
                reached.append(ratio.median / compiled.median)
    return min(reached) / 1.25, max(reached) * 1.25


def draw(results: Sequence[Result], path: Path, where: str = "", *, force: bool = False) -> None:
    """Write the chart as a PNG; where: what was measured on, if not this machine's processor."""
    shown = _shown(results)
    rows = _rows(shown)
    height = max(len(rows), 3) * _ROW + _TOP + _BOTTOM
    figure = Figure(figsize=(_WIDTH, height), dpi=DPI, facecolor=PAPER)
    FigureCanvasAgg(figure)
    figure.text(
        0.02, 1 - 0.3 / height, "How many times faster than torch.nn", fontsize=15,
        fontweight="bold", color=INK, va="center",
    )  # fmt: skip
    if shown:
        about, threads = machine(), shown[0].threads
        where = where or (
            f"{about['processor']}, {threads} thread{'s' if threads > 1 else ''}, "
            f"{shown[0].dtype}, {about['instruction_set'] or 'no kernels'}, "
            f"torch {about['torch']}; medians over rounds, and quartiles"
        )
        figure.text(0.02, 1 - 0.58 / height, where, fontsize=9, color=QUIET, va="center")
    compiled = any(t.ratio(COMPILE) for r in shown for t in r.timings.values())
    marks = [
        Line2D([], [], color=_OURS, marker="o", markersize=5, linestyle="", label="truenorm"),
        Line2D([], [], color=_SLOWER, marker="o", markersize=5, linestyle="", label="slower"),
        Line2D([], [], color=QUIET, linewidth=1.2, label="torch.nn"),
        Line2D(
            [], [], color=_FLOOR, marker="|", markersize=9, markeredgewidth=1.3, linestyle="",
            label="moving the bytes, at clone()’s rate",
        ),
    ]  # fmt: skip
    if compiled:
        marks.insert(
            3,
            Line2D(
                [], [], color=_COMPILE, marker="D", markersize=4, fillstyle="none", linestyle="",
                label="torch.compile",
            ),
        )  # fmt: skip
    figure.legend(
        handles=marks, loc="center left", bbox_to_anchor=(0.012, 1 - 0.84 / height),
        ncols=len(marks), frameon=False, fontsize=9, labelcolor=INK, handletextpad=0.4,
        columnspacing=1.6,
    )  # fmt: skip
    grid = figure.add_gridspec(
        1, len(DIRECTIONS), left=_LEFT, right=_RIGHT, wspace=0.06,
        top=1 - _TOP / height, bottom=_BOTTOM / height,
    )  # fmt: skip
    means = {row.family: row for row in families(shown)}
    for column, direction in enumerate(DIRECTIONS):
        ax = figure.add_subplot(grid[0, column])
        _panel(ax, rows, direction)
        ax.set_xlim(*_limits(shown, direction))
        ax.set_title(_TITLES[direction], loc="left", fontsize=10.5, color=INK, pad=8)
        for at, (text, result) in enumerate(rows):
            if result is None and text:
                row = means[text]
                mean = row.forward if direction == FORWARD else row.both
                label = "" if mean is None else f"mean {mean:.3g}×"
                ax.annotate(
                    label, (1.0, at), xycoords=("axes fraction", "data"), fontsize=8.5,
                    color=INK, ha="right", va="center", fontweight="bold",
                )  # fmt: skip
            if column == 0:
                ax.annotate(
                    text, (0.0, at), xytext=(-(_LEFT - 0.02) * _WIDTH * 72, 0),
                    xycoords=("axes fraction", "data"), textcoords="offset points",
                    fontsize=8.5 if result else 9.5, fontweight="normal" if result else "bold",
                    color=INK, va="center",
                )  # fmt: skip
    files.write_picture(path, figure, force=force)
