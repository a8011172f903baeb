"""The demonstration's own pictures: loss curves, and the photographs before and after."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from ..palette import FAINT, INK, PAPER, QUIET
from .photo import NAMES, Photographs
from .train import Training

DPI = 160
TORCH, TRUENORM, NUDGED = "#F0A35E", "#2F4B9B", "#9AA3B2"
# normalized values are shown from this many standard deviations below zero to as many above
SHOWN = 2.5
# losses closer than this, the same ones among them, are drawn at the bottom
FLOOR = 1e-10


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor=PAPER)
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, format="png", metadata={"Software": None})


def _style(ax: Axes, **labels: str) -> None:
    ax.set_facecolor("none")
    for side in ("right", "top"):
        ax.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        ax.spines[side].set_color(FAINT)
    ax.tick_params(colors=QUIET, labelsize=8.5, color=FAINT)
    ax.grid(color=FAINT, linewidth=0.8)
    ax.set_axisbelow(True)
    ax.set(**labels)
    ax.xaxis.label.set(color=QUIET, fontsize=9.5)
    ax.yaxis.label.set(color=QUIET, fontsize=9.5)


def loss_curves(trainings: list[Training], path: Path) -> None:
    """One column for each network: the two losses on each other, and how far they are apart."""
    figure = _figure(10.0, 6.0)
    grid = figure.add_gridspec(
        2, len(trainings), height_ratios=(1.7, 1.0), left=0.08, right=0.975, top=0.83, bottom=0.09,
        hspace=0.3, wspace=0.18,
    )  # fmt: skip
    figure.text(
        0.03, 0.945, "Training on digits: the loss of each step, and how far apart", fontsize=15,
        fontweight="bold", color=INK, va="center",
    )  # fmt: skip
    # one scale for all networks, in each row
    low = min(min(t.losses_torch + t.losses_truenorm) for t in trainings)
    high = max(max(t.losses_torch + t.losses_truenorm) for t in trainings)
    apart_high = max(
        max(t.largest_loss_difference, t.largest_nudged_difference, FLOOR * 10) for t in trainings
    )
    for i, t in enumerate(trainings):
        upper, lower = figure.add_subplot(grid[0, i]), figure.add_subplot(grid[1, i])
        steps = range(1, len(t.losses_torch) + 1)
        upper.plot(steps, t.losses_torch, color=TORCH, linewidth=5, alpha=0.75, label="torch.nn")
        upper.plot(steps, t.losses_truenorm, color=TRUENORM, linewidth=1.3, label="truenorm")
        upper.set_title(f"with {t.layer}", loc="left", fontsize=11, color=INK)
        upper.set_yscale("log")
        upper.set_ylim(low / 1.5, high * 1.5)
        _style(upper, ylabel="loss" if i == 0 else "")
        upper.legend(frameon=False, fontsize=9.5, labelcolor=INK, loc="upper right")
        for losses, color, label in (
            (t.losses_nudged, NUDGED, "torch.nn from weights one rounding away"),
            (t.losses_truenorm, TRUENORM, "truenorm"),
        ):
            apart = [abs(a - b) for a, b in zip(t.losses_torch, losses, strict=True)]
            shown = [max(d, FLOOR) for d in apart]
            lower.plot(steps, shown, color=color, linewidth=1.2, label=label)
        lower.set_yscale("log")
        lower.set_ylim(FLOOR, apart_high * 3)
        _style(lower, xlabel="step", ylabel="from torch.nn’s loss" if i == 0 else "")
        lower.legend(
            frameon=False, fontsize=8.5, labelcolor=INK, ncols=2, loc="lower left",
            bbox_to_anchor=(-0.02, 0.98), columnspacing=1.2,
        )  # fmt: skip
        for ax in (upper, lower):
            ax.minorticks_off()
    _save(figure, path)


def _as_picture(y: Tensor) -> Any:
    """(3, H, W) normalized values as colours: zero is middle grey."""
    return ((y.double() + SHOWN) / (2 * SHOWN)).clamp(0.0, 1.0).permute(1, 2, 0).numpy()


def _statistics(x: Tensor) -> str:
    """Each colour's mean and standard deviation, in the terms of the formula."""
    flat = x.double().flatten(1)
    lines = []
    for name, values in (("mean", flat.mean(1)), ("std", flat.std(1, correction=0))):
        # + 0.0 makes a zero of a negative one
        shown = (f"{round(v, 2) + 0.0:6.2f}" for v in values.tolist())
        lines.append(f"{name:<5}" + "".join(shown).replace("-", "−"))
    return "\n".join(lines)


def photographs(photos: Photographs, path: Path) -> None:
    """Rows: photographs; columns: before, by batch statistics, by each one's own."""
    figure = _figure(10.0, 6.4)
    figure.text(
        0.03, 0.95, "The same two photographs, normalized together and each alone", fontsize=15,
        fontweight="bold", color=INK, va="center",
    )  # fmt: skip
    columns = (
        ("before", "pixels from 0 to 1; below: red, green, blue", photos.x),
        ("BatchNorm2d", "one mean and variance per colour, for both", photos.by_batch),
        ("InstanceNorm2d", "one per colour, for each photograph", photos.by_instance),
    )
    for column, (name, how, batch) in enumerate(columns):
        left = 0.03 + column * 0.318
        figure.text(left, 0.882, name, fontsize=12, fontweight="bold", color=INK, va="center")
        figure.text(left, 0.848, how, fontsize=9, color=QUIET, va="center")
        for row in range(len(NAMES)):
            ax = figure.add_axes((left, 0.5 - row * 0.415, 0.304, 0.325))
            picture = batch[row]
            shown = picture.permute(1, 2, 0).numpy() if column == 0 else _as_picture(picture)
            ax.imshow(shown, aspect="auto", interpolation="lanczos")
            ax.axis("off")
            figure.text(
                left, 0.492 - row * 0.415, _statistics(picture), fontsize=8.5, color=QUIET,
                va="top", linespacing=1.25, fontfamily="monospace",
            )  # fmt: skip
    _save(figure, path)
