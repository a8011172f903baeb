"""The command `truenorm verify`."""

from __future__ import annotations

import argparse
import functools
import json
from pathlib import Path
from typing import Any

import torch

from ..._core.library import info
from .. import files
from . import bits, gradients, sections, table
from .cases import LAYERS, SPECS
from .measure import Check
from .sections import DTYPES, Options, Section

SECTIONS: tuple[Section, ...] = (*sections.SECTIONS, *gradients.SECTIONS, *bits.SECTIONS)


def add_parser(subparsers: Any) -> None:
    """Add `verify` to the commands; its `func(args)` returns the exit status."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "verify",
        help="check the numerical promises on this machine, and measure torch beside them",
        description=(
            "Measures every layer of truenorm and of torch against float64, and holds truenorm "
            "to its promises. Exit status: 0 where all hold, 1 where one is broken."
        ),
    )
    parser.add_argument("--quick", action="store_true", help="fewer shapes and layouts")
    parser.add_argument(
        "--layer", nargs="+", metavar="NAME", choices=LAYERS,
        help="only these layers: " + ", ".join(LAYERS),
    )  # fmt: skip
    parser.add_argument(
        "--dtype", nargs="+", metavar="DTYPE", choices=tuple(DTYPES),
        help="only these input dtypes: " + ", ".join(DTYPES),
    )  # fmt: skip
    parser.add_argument("--json", metavar="FILE", type=Path, help="write every measurement")
    parser.add_argument("--force", action="store_true", help="replace a file that exists (--json)")
    parser.add_argument(
        "--against-torch", action="store_true",
        help="instead, the table of where the installed torch differs, in Markdown",
    )  # fmt: skip
    parser.add_argument(
        "--write", metavar="FILE", type=Path,
        help="with --against-torch: put the table into this page, between its markers",
    )  # fmt: skip
    parser.set_defaults(func=functools.partial(_run, parser))


def measure(options: Options, *, show: bool = True) -> list[Check]:
    """Every check of the options, each section's table shown as soon as it is measured."""
    checks: list[Check] = []
    threads = torch.get_num_threads()
    try:
        # thousands of small calls: on a busy machine they would wait for each other's threads; that
        # the number of threads changes no bit of truenorm's is a check of its own, in `bits`
        torch.set_num_threads(1)
        for section in SECTIONS:
            found = list(section.checks(options))
            checks += found
            if show:
                table.show(section, found)
    finally:
        torch.set_num_threads(threads)
    return checks


def _about() -> dict[str, Any]:
    about = info()
    return {
        "truenorm": about.version,
        "torch": about.torch_version,
        "cpu": about.cpu,
        "instruction_set": about.instruction_set,
        "threads": torch.get_num_threads(),
    }


def _write_json(path: Path, contents: dict[str, Any], *, force: bool) -> None:
    text = json.dumps({**_about(), **contents}, indent=1) + "\n"
    files.write_option("--json", path, text, force=force)


def _run(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    files.check_option("--json", args.json, force=args.force)
    if args.against_torch:
        if args.layer or args.dtype or args.quick:
            parser.error("--against-torch has its own cases: leave out --layer, --dtype, --quick")
        return _against_torch(parser, args)
    if args.write is not None:
        parser.error("--write puts the table of --against-torch into a page: add --against-torch")
    options = Options(
        specs=tuple(s for s in SPECS if not args.layer or s.layer in args.layer),
        dtypes=tuple(d for d in DTYPES if not args.dtype or d in args.dtype),
        quick=args.quick,
    )
    print(f"{info()}\n", flush=True)
    checks = measure(options)
    print(table.summary(checks))
    failed = sum(not c.passed for c in checks)
    if args.json is not None:
        counts = {
            "checks": len(checks),
            "failed": failed,
            "torch_failed": sum(not c.torch_passed for c in checks),
            "torch_refused": sum(c.torch is None for c in checks),
        }
        _write_json(
            args.json,
            {"summary": counts, "checks": [c.as_dict() for c in checks]},
            force=args.force,
        )
    return 1 if failed else 0


def _against_torch(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    from . import differs

    page = None
    if args.write is not None:
        try:
            page = args.write.read_text(encoding="utf-8")
            differs.replace(page, "")
        except (OSError, ValueError) as error:
            parser.error(f"--write {args.write}: {error}")
    found = differs.measure()
    text = differs.markdown(found)
    if page is None:
        print(text)
    else:
        files.write_option("--write", args.write, differs.replace(page, text), force=True)
    if args.json is not None:
        _write_json(args.json, {"differences": [d.as_dict() for d in found]}, force=args.force)
    return 0 if all(d.passed for d in found) else 1
