"""The command `truenorm survey`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .. import files
from ..extras import CommandError
from ..report import sources

EXAMPLES = """examples:
  truenorm survey torchvision.models:resnet50
  truenorm survey mynet:build --json norms.json
"""


def add_parser(subparsers: Any) -> None:
    """Add `survey` to the command's parsers."""
    parser = subparsers.add_parser(
        "survey",
        help="say which normalization layers of a model convert would swap, and why not the rest",
        description="Builds a model, and says of every normalization layer what it was recognised "
        "as and whether truenorm.convert swaps it. Other libraries' classes are run once each, on "
        "random weights, against the formula that they are taken for; the model is not run.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", help="module:factory, a function that returns the model")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every row too")
    parser.add_argument("--force", action="store_true", help="replace a file that exists")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Print the table, and write the rows."""
    from ..._models.surveying import survey

    if args.json is not None:
        files.check_option("--json", args.json, force=args.force)
    found = survey(sources.model(args.model))
    if args.json is not None:
        try:
            files.write(args.json, found.to_json() + "\n", force=args.force)
        except OSError as error:
            raise CommandError(
                f"--json (={str(args.json)!r}) cannot be written: {error.strerror or error}"
            ) from error
    print(found)
    return 0
