"""The page: what was measured, as tables and pictures, in one HTML file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from typing import Any

from ..._core.library import WITHOUT
from .results import EXAMPLES, PICTURES, Results
from .style import CSS
from .train import Training


def _number(value: float) -> str:
    """Two digits; as a power of ten where it is small or large."""
    if value == 0.0 or 0.01 <= abs(value) < 1000.0:
        return f"{value:.2g}".replace("-", "−")
    digits, exponent = f"{value:.1e}".split("e")
    return f"{digits} × 10<sup>{int(exponent)}</sup>".replace("-", "−")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The first column holds words, the others numbers; cells are HTML."""

    def cells(row: Sequence[str], tag: str) -> str:
        kinds = ['<{0} class="word">' if i == 0 else "<{0}>" for i in range(len(row))]
        return "".join(k.format(tag) + c + f"</{tag}>" for k, c in zip(kinds, row, strict=True))

    body = "\n".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    return (
        f'<div class="table"><table>\n<thead><tr>{cells(head, "th")}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )


def _figure(file: str, alt: str, caption: str = "") -> str:
    below = f"<figcaption>{caption}</figcaption>" if caption else ""
    return f'<figure><a href="{file}"><img src="{file}" alt="{escape(alt)}"></a>{below}</figure>'


def _tile(number: str, label: str) -> str:
    return f'<div class="tile"><b>{number}</b><span>{label}</span></div>'


def _speed(ratio: float) -> str:
    """In words, whichever way it went."""
    if abs(ratio - 1.0) < 0.02:
        return "as fast as torch.nn"
    return "faster than torch.nn" if ratio < 1.0 else "slower than torch.nn"


def _tiles(r: Results) -> str:
    contiguous = [e for e in r.photo_errors if e.layout == "contiguous"]
    plain, shifted = contiguous[0].offset, contiguous[-1].offset
    at = {offset: [e for e in r.photo_errors if e.offset == offset] for offset in (plain, shifted)}
    tiles = [
        _tile(
            f"{t.ratio:.2f}×",
            f"time of a training step with {t.layer}: {_speed(t.ratio)}",
        )
        for t in r.trainings
    ]
    for offset, errors in at.items():
        worst_ours = max(e.truenorm for e in errors)
        worst_theirs = max(e.torch for e in errors)
        what = "photographs" if offset == 0 else f"photographs + {offset:,.0f}"
        label = f"truenorm's largest error on the {what}; torch.nn's: {_number(worst_theirs)}"
        tiles.append(_tile(_number(worst_ours), label))
    return '<div class="tiles">' + "".join(tiles) + "</div>"


def _training_table(r: Results) -> str:
    def ratio(t: Training) -> str:
        low, high = t.ratio_quartiles
        return f"{t.ratio:.2f} <small>({low:.2f} to {high:.2f})</small>"

    measures: list[tuple[str, Callable[[Training], str]]] = [
        ("test accuracy, torch.nn", lambda t: f"{t.accuracy_torch:.1%}"),
        ("test accuracy, truenorm", lambda t: f"{t.accuracy_truenorm:.1%}"),
        ("largest difference in loss", lambda t: _number(t.largest_loss_difference)),
        ("for scale: torch.nn, nudged", lambda t: _number(t.largest_nudged_difference)),
        ("time per step, truenorm / torch.nn", ratio),
    ]
    rows = [[name, *(measure(t) for t in r.trainings)] for name, measure in measures]
    return _table(["network with", *(t.layer for t in r.trainings)], rows)


def _library(r: Results) -> str:
    run = r.library
    if run is None:
        return (
            "<p>transformers is not installed here: with <code>pip install "
            "&quot;truenorm[models]&quot;</code> this page shows one of its models.</p>"
        )
    low, high = run.ratio_quartiles
    rows = [
        ["largest difference in loss", _number(run.largest_loss_difference)],
        ["for scale: transformers, nudged", _number(run.largest_nudged_difference)],
        [
            "time per step, converted / transformers",
            f"{run.ratio:.2f} <small>({low:.2f} to {high:.2f})</small>",
        ],
    ]
    return f"""<p>transformers’ {run.model}, small and untrained, learns to write on, letter by
letter. Its {run.layers} norms are of a class of its own, {run.norm}, and keep their own order of
roundings after <code>truenorm.convert(model)</code>.</p>
{_table([f"{run.model}, {len(run.losses_library)} steps", ""], rows)}"""


def _photo_table(r: Results) -> str:
    rows = [
        [
            f"{e.layer}, {e.layout}",
            f"+ {e.offset:,.0f}" if e.offset else "none",
            _number(e.torch),
            _number(e.truenorm),
        ]
        for e in r.photo_errors
    ]
    head = ["layer, memory", "offset", "torch.nn’s error", "truenorm’s error"]
    return _table(head, rows)


def _explained(r: Results) -> str:
    figures = []
    for file, name, shape in EXAMPLES:
        title, ours, theirs = r.explained[file]
        command = f"truenorm explain {name} {' '.join(map(str, shape))}"
        caption = (
            f"<code>{command}</code> Largest difference from the result by hand: truenorm "
            f"{_number(ours)}, torch.nn {_number(theirs)}."
        )
        figures.append(_figure(file, title, caption))
    return "\n".join(figures)


def page(r: Results, environment: dict[str, Any]) -> str:
    """The whole page."""
    cpu = WITHOUT.get(environment["cpu"], "")
    if environment["cpu"] == "native":
        cpu = f"native kernels ({environment['instruction_set']})"
    loss, photographs = PICTURES
    threads = f"{environment['threads']} thread" + "s" * (environment["threads"] != 1)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>truenorm beside torch.nn</title>
<style>{CSS}</style>
</head>
<body>
<main>
<header>
<h1>truenorm beside torch.nn</h1>
<p class="lead">The same networks, the same data, the same seeds: once with PyTorch’s own
normalization layers, once after <code>truenorm.convert(model)</code>. Measured on this machine in
{r.seconds:.0f} seconds.</p>
</header>
{_tiles(r)}

<section>
<h2>Training on real scans</h2>
<p>A network of three convolutions learns scikit-learn’s 1,797 scans of digits, {r.epochs}
epoch{"s" * (r.epochs != 1)} of batches of 64. Steps of torch.nn and of truenorm alternate in one
process; the ratio is the median over pairs of steps, with its quartiles.</p>
{_training_table(r)}
<p class="note">Training amplifies roundings. The nudged run shows by how much: it is torch.nn
again, from weights one floating point number away.</p>
{_figure(loss, PICTURES[loss])}
</section>

<section>
<h2>A model of another library</h2>
{_library(r)}
</section>

<section>
<h2>Photographs</h2>
<p>Batch statistics are shared by both photographs, so each keeps some of its own brightness and
contrast; instance statistics take both away. Grey is zero; black and white are 2.5 standard
deviations away from it.</p>
{_figure(photographs, PICTURES[photographs])}
<p>The largest error of one pixel against the formula in float64, in standard deviations. An offset
added to every pixel does not change the true result, as the mean is subtracted.</p>
{_photo_table(r)}
</section>

<section>
<h2>Which values share a mean and a variance</h2>
<p>Values of one colour and letter are normalized together.</p>
{_explained(r)}
</section>

<footer>
<p>truenorm {environment["truenorm"]} on {cpu}, PyTorch {environment["torch"]}, {threads}. All
numbers are in <a href="results.json">results.json</a>. Made by <code>truenorm demo</code>.</p>
</footer>
</main>
</body>
</html>
"""
