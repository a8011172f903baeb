"""The demonstration's own pictures: loss curves, and the photographs before and after."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from .._explain.palette import FAINT, INK, PAPER, QUIET
from .photo import NAMES, Photographs
from .train import Training

DPI = 160
TORCH, TRUENORM, NUDGED = "#F0A35E", "#2F4B9B", "#9AA3B2"
# normalized values are shown from this many standard deviations below zero to as many above
SHOWN = 2.5


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
    figure = _figure(10.0, 5.6)
    grid = figure.add_gridspec(
        2, len(trainings), height_ratios=(2.1, 1.0), left=0.075, right=0.975, top=0.83, bottom=0.1,
        hspace=0.18, wspace=0.2,
    )  # fmt: skip
    figure.text(
        0.03, 0.945, "Training on digits: the two losses lie on each other", fontsize=15,
        fontweight="bold", color=INK, va="center",
    )  # fmt: skip
    for i, t in enumerate(trainings):
        upper, lower = figure.add_subplot(grid[0, i]), figure.add_subplot(grid[1, i])
        steps = range(1, len(t.losses_torch) + 1)
        upper.plot(steps, t.losses_torch, color=TORCH, linewidth=5, alpha=0.75, label="torch.nn")
        upper.plot(steps, t.losses_truenorm, color=TRUENORM, linewidth=1.3, label="truenorm")
        upper.set_title(f"with {t.layer}", loc="left", fontsize=11, color=INK)
        _style(upper, ylabel="loss" if i == 0 else "")
        upper.set_ylim(bottom=0.0)
        upper.tick_params(labelbottom=False)
        upper.legend(frameon=False, fontsize=9.5, labelcolor=INK)
        for losses, color, label, width in (
            (t.losses_nudged, NUDGED, "torch.nn, weights one rounding away", 1.1),
            (t.losses_truenorm, TRUENORM, "truenorm", 1.3),
        ):
            apart = [abs(a - b) for a, b in zip(t.losses_torch, losses, strict=True)]
            lower.plot(steps, [max(d, 1e-9) for d in apart], color=color, linewidth=width, label=label)
        lower.set_yscale("log")
        _style(lower, xlabel="step", ylabel="apart from\ntorch.nn" if i == 0 else "")
        lower.legend(frameon=False, fontsize=8, labelcolor=INK, loc="lower right")
    _save(figure, path)


def _as_picture(y: Tensor) -> Any:
    """(3, H, W) normalized values as colours: zero is middle grey."""
    return ((y.double() + SHOWN) / (2 * SHOWN)).clamp(0.0, 1.0).permute(1, 2, 0).numpy()


def _statistics(x: Tensor) -> str:
    """Each colour's mean and standard deviation, in the terms of the formula."""
    flat = x.double().flatten(1)
    means = "  ".join(f"{m:+.2f}" for m in flat.mean(1).tolist())
    spreads = "  ".join(f"{s:.2f}" for s in flat.std(1, correction=0).tolist())
    return f"mean {means}\nstd   {spreads}".replace("-", "−")


def photographs(photos: Photographs, path: Path) -> None:
    """Rows: photographs; columns: before, by batch statistics, by each one's own."""
    figure = _figure(10.0, 6.4)
    figure.text(
        0.03, 0.95, "The same two photographs, normalized together and each alone", fontsize=15,
        fontweight="bold", color=INK, va="center",
    )  # fmt: skip
    columns = (
        ("before", "pixels from 0 to 1", photos.x),
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
                va="top", linespacing=1.25,
            )  # fmt: skip
    figure.text(
        0.97, 0.95, "mean and std: red, green, blue", fontsize=8.5, color=QUIET, ha="right",
        va="center",
    )  # fmt: skip
    _save(figure, path)
