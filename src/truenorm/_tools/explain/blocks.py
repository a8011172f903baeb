"""What an explanation says, in order, as blocks that a terminal or a plain text can lay out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice, product
from math import prod
from typing import TYPE_CHECKING

from torch import Tensor

from .groups import Sharing

if TYPE_CHECKING:
    from .explanation import Explanation

MAX_GROUPS = 24
MAX_ROWS = 12
MAX_COLUMNS = 6


@dataclass(frozen=True)
class Heading:
    text: str


@dataclass(frozen=True)
class Paragraph:
    text: str


@dataclass(frozen=True)
class Code:
    text: str
    python: bool = True


@dataclass(frozen=True)
class Table:
    """The first `words` columns are left-aligned words, the others numbers."""

    columns: list[str]
    rows: list[list[str]]
    words: int = 1


@dataclass(frozen=True)
class Map:
    """Rows of cells, each with the number of its group; None ends a line's block of cells."""

    rows: list[tuple[str, list[int | None]]]
    more: str


Block = Heading | Paragraph | Code | Table | Map


def number(value: float) -> str:
    """Four decimals where they say enough, else scientific."""
    if value == 0.0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:.4f}"
    return f"{value:.3e}"


def _corner(x: Tensor) -> list[tuple[int, ...]]:
    """Leading indices of all rows, or of a few along each dimension so that the pattern shows."""
    leading = tuple(x.shape[:-1])
    if prod(leading) > MAX_ROWS and len(leading) > 1:
        leading = (min(leading[0], 2), *(min(size, 3) for size in leading[1:]))
    return list(islice(product(*map(range, leading)), MAX_ROWS))


def _values(x: Tensor) -> Table:
    width = min(x.shape[-1], MAX_COLUMNS)
    cut = x.shape[-1] > width
    rows = []
    corner = _corner(x)
    for index in corner:
        row = [number(v) for v in x[index][:width].double().tolist()]
        rows.append([f"x[{', '.join(map(str, (*index, ':')))}]", *row, *["…"] * cut])
    if len(corner) < prod(x.shape[:-1]):
        rows.append(["…", *["…"] * (width + cut)])
    return Table(["", *map(str, range(width)), *["…"] * cut], rows)


def _names(sharing: Sharing) -> tuple[str, str]:
    """What a line of the map is called, and what is said of the blocks beside each other."""
    if sharing.kind in ("layer", "rms"):
        return "x[n, {}]", "n ="
    if sharing.kind == "instance" and sharing.leading == 1:
        return "position {}", "channel"
    return "channel {}", "sample"


def _map(sharing: Sharing) -> Map:
    """Lines: the first few of dimension 1 (channels); side by side: of dimension 0 (samples)."""
    shape = sharing.shape
    if len(shape) == 1:
        shape = (1, 1, *shape)
    line, beside = _names(sharing)
    columns = list(islice(product(*map(range, shape[2:])), 6))
    samples, lines = range(min(shape[0], 3)), range(min(shape[1], 6))

    def group(n: int, c: int, position: tuple[int, ...]) -> int:
        return sharing.group_of((n, c, *position)[-len(sharing.shape) :])

    drawn = sorted({group(n, c, p) for n in samples for c in lines for p in columns})
    # lettered from A on, so that no two of those drawn look the same
    number = {g: i for i, g in enumerate(drawn)}
    rows: list[tuple[str, list[int | None]]] = []
    for c in lines:
        cells: list[int | None] = []
        for n in samples:
            cells += [number[group(n, c, position)] for position in columns]
            cells.append(None)
        rows.append((line.format(c) if len(sharing.shape) > 1 else "x", cells[:-1]))
    notes = [f"side by side: {beside} 0 to {samples[-1]}"] if len(samples) > 1 else []
    num_drawn = len(samples) * len(lines) * len(columns)
    if num_drawn < prod(shape):
        notes.append(f"{num_drawn:,} of {prod(shape):,} values drawn")
    return Map(rows, "; ".join(notes))


def _groups(e: Explanation) -> Table:
    shown = e.groups[:MAX_GROUPS]
    if e.sharing.kind == "local response":
        columns = ["at the first position", "values", "sum of squares"]
        rows = [[g.label, f"{g.count:,}", number(g.sum_of_squares or 0.0)] for g in shown]
    elif e.sharing.kind == "rms":
        columns = ["group", "values", "mean of squares"]
        rows = [[g.label, f"{g.count:,}", number(g.mean_square or 0.0)] for g in shown]
    else:
        columns = ["group", "values n", "mean", "variance (÷ n)", "unbiased (÷ n−1)"]
        rows = []
        for g in shown:
            unbiased = "–" if g.unbiased_variance is None else number(g.unbiased_variance)
            mean, variance = number(g.mean or 0.0), number(g.variance or 0.0)
            rows.append([g.label, f"{g.count:,}", mean, variance, unbiased])
    if len(e.groups) > len(shown):
        rows.append([f"… {len(e.groups) - len(shown):,} more", *[""] * (len(columns) - 1)])
    return Table(columns, rows)


def _results(e: Explanation) -> Table:
    columns = ["", "x", "by hand", "truenorm", "torch"]
    tensors = [e.x, e.by_hand, e.truenorm, e.torch]
    if e.mistake is not None:
        columns.append("unbiased")
        tensors.append(e.mistake.result)
    rows = []
    for place in islice(product(*map(range, e.x.shape)), MAX_COLUMNS):
        values = (t[place].item() for t in tensors)
        rows.append([f"y[{', '.join(map(str, place))}]", *(f"{v:.6f}" for v in values)])
    if e.x.numel() > len(rows):
        rows.append(["…"] * len(columns))
    return Table(columns, rows)


def _running(e: Explanation) -> Iterator[Block]:
    if not e.running:
        return
    first = e.running[0]
    yield Heading("Running statistics, after this batch in training")
    yield Paragraph(
        f"running = (1 − momentum) · running + momentum · seen, momentum = {first.momentum:g}. "
        "What is stored is the unbiased variance (÷ n−1), though the batch is normalized by the "
        "biased one."
    )
    yield Code(
        f"running_var[0] = (1 − {first.momentum:g}) · {first.var_before:.6g} + "
        f"{first.momentum:g} · {first.var_seen:.6g} = {first.var_after:.6g}",
        python=False,
    )
    rows = [
        [
            f"channel {r.channel}",
            f"{number(r.mean_before)} → {number(r.mean_after)}",
            number(r.layer_mean),
            f"{number(r.var_before)} → {number(r.var_after)}",
            number(r.layer_var),
        ]
        for r in e.running[:MAX_ROWS]
    ]
    if len(e.running) > MAX_ROWS:
        rows.append([f"… {len(e.running) - MAX_ROWS:,} more", "", "", "", ""])
    yield Table(["", "running_mean", "layer's", "running_var", "layer's"], rows)


def blocks(e: Explanation) -> Iterator[Block]:
    """The whole explanation, top to bottom."""
    dtype = str(e.x.dtype).removeprefix("torch.")
    settings = ", ".join(f"{name} = {value:g}" for name, value in e.settings.items())
    yield Heading(e.title)
    yield Paragraph(f"{e.formula}, {settings}")
    yield Paragraph(f"{e.layer} on an input of shape {tuple(e.x.shape)}, {dtype}")

    yield Heading("Input")
    yield _values(e.x)

    share = "Values that share a mean and a variance"
    if e.sharing.kind == "rms":
        share = "Values that share a mean of squares"
    if e.sharing.kind != "local response":
        yield Heading(share)
        yield _map(e.sharing)
    else:
        yield Heading("Windows of channels")
    yield Paragraph(f"{e.sharing.how_many_statistics}; each has {e.sharing.how_many_values}.")
    yield _groups(e)

    yield Heading("By hand, in float64")
    yield Code(e.code)
    yield Code("\n    ".join(e.worked), python=False)

    yield Heading("Results")
    yield _results(e)
    yield Table(
        ["largest difference of", ""],
        [[pair, f"{value:.2e}"] for pair, value in e.differences.items()],
    )
    if e.mistake is not None:
        yield Heading("A common mistake")
        yield Paragraph(
            "torch.var(x) divides by n − 1 unless told correction=0. With that variance every "
            f"normalized value would shrink by sqrt((n−1)/n) = {e.mistake.factor:.6g}, and be off "
            f"by up to {e.mistake.largest_error:.2e}. Layers divide by n."
        )
    yield from _running(e)
