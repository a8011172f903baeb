"""The command `truenorm demo`."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from ..extras import CommandError, has, require
from ..progress import reporting
from .folder import MADE_BY, MARK, check, whole

SEED = 0
EPOCHS, QUICK_EPOCHS = 8, 1


def add_parser(subparsers: Any) -> None:
    """Add `demo` to the command's parsers."""
    parser = subparsers.add_parser(
        "demo",
        help="train, normalize photographs, and show the results as a page",
        description="Trains two small networks on real scans of digits, normalizes two "
        "photographs, measures truenorm beside torch.nn, and writes a page about it.",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("truenorm-demo"), help="folder (default: truenorm-demo)"
    )
    parser.add_argument("--quick", action="store_true", help="train for one epoch only")
    parser.add_argument(
        "--force", action="store_true", help="write into a folder that holds other files too"
    )
    parser.set_defaults(func=run)


def _environment() -> dict[str, Any]:
    from ..._core.library import info

    about = info()
    return {
        "truenorm": about.version,
        "torch": about.torch_version,
        "cpu": about.cpu,
        "instruction_set": about.instruction_set,
        "threads": torch.get_num_threads(),
    }


def _make(folder: Path, epochs: int) -> None:
    """Write every file of the demonstration into an empty folder."""
    # these need the optional packages
    from . import charts, library, photo, train
    from .examples import explain_all
    from .page import page
    from .results import EXAMPLES, Results

    start = time.perf_counter()
    digits = train.load(SEED)
    steps = epochs * train.steps_per_epoch(digits)
    # photographs and pictures take about as long as this many steps
    other = 0.4 * 2 * steps
    quick = epochs == QUICK_EPOCHS
    library_steps = (library.QUICK_STEPS if quick else library.STEPS) if has("transformers") else 0
    with reporting(2 * steps + library_steps + other) as report:
        trainings = []
        for layer in train.NORMS:
            report.begin(f"training with {layer}, torch.nn and truenorm")
            trainings.append(train.train(layer, digits, epochs, SEED, report.advance))
        borrowed = None
        if library_steps:
            report.begin("training a model of transformers, as it is and converted")
            borrowed = library.train(library_steps, SEED, report.advance)
        report.begin("normalizing photographs")
        x = photo.load()
        photo_errors = photo.errors(x)
        report.advance(other / 3)
        report.begin("drawing")
        charts.loss_curves(trainings, folder / "loss.png")
        charts.photographs(photo.normalize(x), folder / "photographs.png")
        report.advance(other / 3)
        report.begin("explaining")
        explained = explain_all(EXAMPLES, folder)
    results = Results(
        trainings, borrowed, photo_errors, explained, epochs, time.perf_counter() - start
    )
    contents = results.to_dict(MADE_BY, _environment())
    (folder / MARK).write_text(json.dumps(contents, indent=1) + "\n", encoding="utf-8")
    (folder / "index.html").write_text(page(results, _environment()), encoding="utf-8")


def run(args: argparse.Namespace) -> int:
    """Make the demonstration, say what was measured, and what to open."""
    require("matplotlib", "sklearn", "PIL", purpose="truenorm demo")
    check(args.out, force=args.force)
    try:
        with whole(args.out, force=args.force) as folder:
            _make(folder, QUICK_EPOCHS if args.quick else EPOCHS)
    except OSError as error:
        raise CommandError(
            f"--out (={str(args.out)!r}) cannot be written: {error.strerror or error}"
        ) from error
    results = json.loads((args.out / MARK).read_text(encoding="utf-8"))
    for t in results["training"]:
        print(
            f"{t['layer']}: accuracy {t['accuracy_torch']:.1%} with torch.nn, "
            f"{t['accuracy_truenorm']:.1%} with truenorm; losses at most "
            f"{t['largest_loss_difference']:.1e} apart; time per step {t['time_ratio']:.2f} of "
            "torch.nn's"
        )
    if (run := results["library"]) is None:
        print(
            "a model of another library: transformers is not installed: "
            'pip install "truenorm[models]"'
        )
    else:
        print(
            f"transformers' {run['model']}, {run['layers']} times {run['norm']}: losses at most "
            f"{run['largest_loss_difference']:.1e} apart; time per step {run['time_ratio']:.2f} "
            "of its own"
        )
    worst = max(results["photograph"], key=lambda e: float(e["torch"]))
    print(
        f"photograph + {worst['offset']:g}, {worst['layer']}, {worst['layout']}: largest error "
        f"{worst['truenorm']:.1e} with truenorm, {worst['torch']:.1e} with torch.nn"
    )
    print(f"open {args.out / 'index.html'}")
    return 0
