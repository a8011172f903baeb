"""The command `truenorm report`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..._models.inspecting.tables import SEVERITIES
from .. import files
from ..extras import CommandError, require
from ..progress import reporting
from . import sources

EXAMPLES = """examples:
  truenorm report mynet:build --data digits --shape 3 64 64
  truenorm report mynet:build --data images.npz --out mynet.html --force
  truenorm report mynet:build --data mynet:validation_loader --batches 20
"""


def add_parser(subparsers: Any) -> None:
    """Add `report` to the command's parsers."""
    parser = subparsers.add_parser(
        "report",
        help="look at every normalization layer of a model, and make a page about it",
        description="Runs a model on some batches, looks at the input of every normalization "
        "layer, says what is wrong there, and writes it as one page that needs no network.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", help="module:factory, a function that returns the model")
    parser.add_argument(
        "--data",
        required=True,
        help="digits (scikit-learn's scans), an .npz file (its x, images, inputs or data, or its "
        "first array, (N, …)), or module:loader",
    )
    parser.add_argument(
        "--shape", type=int, nargs="+", metavar="SIZE",
        help="C H W: bring images to this shape (of digits and .npz)",
    )  # fmt: skip
    parser.add_argument("--batches", type=int, default=8, help="the most that are run (default 8)")
    parser.add_argument(
        "--batch-size", type=int, default=16, help="of digits and .npz (default 16)"
    )
    parser.add_argument("--training", action="store_true", help="run it in training mode")
    parser.add_argument(
        "--out", type=Path, default=Path("report.html"), help="page (default: report.html)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number too")
    parser.add_argument("--force", action="store_true", help="replace files that exist")
    parser.set_defaults(func=run)


def _check(args: argparse.Namespace) -> None:
    require("jinja2", "plotly", purpose="truenorm report", extra="report")
    for name in ("batches", "batch_size"):
        if getattr(args, name) < 1:
            raise CommandError(
                f"--{name.replace('_', '-')} (={getattr(args, name)}) must be at least 1"
            )
    for option, path in (("--out", args.out), ("--json", args.json)):
        files.check_option(option, path, force=args.force)


def run(args: argparse.Namespace) -> int:
    """Make the page, say what was found, and what to open."""
    _check(args)
    from ..._models.inspecting import inspect
    from ..._models.inspecting.page.writing import save

    model = sources.model(args.model)
    data = sources.data(args.data, args.shape, args.batch_size)
    try:
        with reporting(args.batches) as report:
            report.begin("running the model")
            inspection = inspect(
                model,
                data,
                batches=args.batches,
                training=args.training,
                progress=lambda count: report.advance(1.0),
            )
            report.begin("writing the page")
            save(inspection, args.out, force=args.force)
            if args.json is not None:
                files.write(args.json, inspection.to_json() + "\n", force=args.force)
    except (ValueError, TypeError, RuntimeError) as error:
        text = " ".join(str(error).split()).replace("`data`", "--data")
        text, _, remedy = text.partition(" — ")
        if remedy:
            text += " — pass data that the model takes; --shape C H W brings images to a shape"
        raise CommandError(text) from error
    except OSError as error:
        raise CommandError(
            f"--out (={str(args.out)!r}) cannot be written: {error.strerror or error}"
        ) from error
    counts = [(s, sum(f.severity == s for f in inspection.findings)) for s in SEVERITIES]
    said = ", ".join(f"{n} {s}{'s' * (n != 1)}" for s, n in counts if n) or "nothing to report"
    print(f"{inspection.model}: {len(inspection.layers)} normalization layers, {said}")
    print(f"open {args.out}")
    return 0
