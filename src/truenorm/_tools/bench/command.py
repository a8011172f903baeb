"""The command `truenorm bench`."""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import os
from pathlib import Path
from typing import Any

import torch

from ..._core.library import info
from .. import extras, files
from ..clock import DeviceClock
from ..verify.sections import DTYPES
from . import cuda, cuda_command, models, report
from .cases import CASES, FAMILIES, LAYERS, Case
from .results import Result, as_json, families, machine
from .subject import Subject, validate
from .timing import DIRECTIONS, FULL, MODELS, QUICK, Plan, time_case

# a step of torch's holds up to this many tensors of the input's size, hidden copies included
_TENSORS_HELD = 12


def _slug(family: str) -> str:
    return family.lower().replace(" ", "-")


def add_parser(subparsers: Any) -> None:
    """Add `bench` to the commands; its `func(args)` returns the exit status."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "bench",
        help="time every layer beside torch's, on the shapes of real networks",
        description=(
            "Validates each case against float64, then times truenorm, torch.nn and copying the "
            "tensor in turn, in one process. Ratios are medians over rounds; above 1, truenorm is "
            "faster. Exit status: 0, or 1 where a result was wrong (which is then not timed)."
        ),
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu",
        help="cuda: a GPU's cases, contenders, clock and floor",
    )  # fmt: skip
    parser.add_argument(
        "--layer", nargs="+", metavar="NAME", choices=LAYERS,
        help="only these layers: " + ", ".join(LAYERS),
    )  # fmt: skip
    slugs = [_slug(family) for family in FAMILIES]
    parser.add_argument(
        "--family", nargs="+", metavar="NAME", choices=slugs, type=_slug,
        help="only these families: " + ", ".join(slugs),
    )  # fmt: skip
    parser.add_argument(
        "--dtype", nargs="+", metavar="DTYPE", choices=tuple(DTYPES), default=["float32"],
        help="these input dtypes (float32): " + ", ".join(DTYPES),
    )  # fmt: skip
    parser.add_argument(
        "--threads", nargs="+", metavar="N", type=int,
        help=f"these numbers of threads (torch's own, now {torch.get_num_threads()})",
    )  # fmt: skip
    parser.add_argument(
        "--models", action="store_true",
        help="time whole training steps of networks of transformers and monai instead of layers",
    )  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="fewer cases and rounds")
    parser.add_argument("--compile", action="store_true", help="time torch.compile of torch's too")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write every measurement")
    parser.add_argument("--chart", metavar="FILE", type=Path, help="draw the ratios, as a PNG")
    parser.add_argument("--force", action="store_true", help="replace files that exist")
    parser.set_defaults(func=functools.partial(_run, parser))


def measure(
    case: Case, dtype: str, threads: list[int], plan: Plan, *, compiled: bool = False
) -> list[Result]:
    """One case, validated and then timed at each number of threads."""
    subject = Subject(case, DTYPES[dtype])
    results = []
    before = torch.get_num_threads()
    try:
        for count in threads:
            torch.set_num_threads(count)
            wrong = validate(subject)
            timings = {
                direction: time_case(subject, direction, plan, compiled=compiled)
                for direction in DIRECTIONS
                if not wrong
            }
            size = case.numel * subject.x.element_size()
            results.append(Result(case, dtype, count, wrong, timings, size))
    finally:
        torch.set_num_threads(before)
    return results


def _fits(case: Case, dtype: str) -> bool:
    """Whether this machine has the memory for the case."""
    if not hasattr(os, "sysconf"):
        return True
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return case.numel * DTYPES[dtype].itemsize * _TENSORS_HELD < total


def _check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    for name in ("json", "chart"):
        files.check_option(f"--{name}", getattr(args, name), force=args.force)
    if args.chart is not None:
        if args.chart.suffix.lower() != ".png":
            parser.error(f"--chart (='{args.chart}') must be a PNG: name a file that ends in .png")
        extras.require("matplotlib", purpose="a chart")
    if args.device == "cuda":
        if args.models:
            parser.error("--models is measured on the CPU: leave out --device cuda")
        cuda_command.check(parser, args)
    for count in args.threads or ():
        if count < 1:
            parser.error(f"--threads (={count}) must be at least 1")


def _run_models(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    """Whole training steps; by one number of threads."""
    for option in ("layer", "family", "compile", "chart"):
        if getattr(args, option):
            parser.error(f"--{option} is of layers: leave it out with --models")
    if args.dtype != ["float32"] or len(args.threads or [1]) > 1:
        parser.error("--models takes float32 and one number of --threads")
    print(f"{machine()['processor']}, {os.cpu_count()} cores\n{info()}\n", flush=True)
    before = torch.get_num_threads()
    threads = args.threads[0] if args.threads else before
    try:
        torch.set_num_threads(threads)
        steps = models.run(QUICK if args.quick else MODELS, functools.partial(print, flush=True))
    finally:
        torch.set_num_threads(before)
    if args.json is not None:
        about = {"date": str(datetime.date.today()), "quick": args.quick, "threads": threads}
        found = {**machine(), **about, "models": [step.as_dict() for step in steps]}
        text = json.dumps(found, indent=1) + "\n"
        files.write_option("--json", args.json, text, force=args.force)
    return 1 if any(step.wrong for step in steps) else 0


def _run(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    _check(parser, args)
    if args.models:
        return _run_models(parser, args)
    cases = [
        case for case in (cuda.ALL_CASES if args.device == "cuda" else CASES)
        if (not args.layer or case.layer in args.layer)
        and (not args.family or _slug(case.family) in args.family)
        and (case.quick or not args.quick)
    ]  # fmt: skip
    if not cases:
        parser.error("--layer, --family and --quick leave no case: leave one of them out")
    if args.device == "cuda":
        return cuda_command.run(args, cases, DeviceClock(), cuda.machine())
    threads = list(dict.fromkeys(args.threads or [torch.get_num_threads()]))
    dtypes = list(dict.fromkeys(args.dtype))
    plan = QUICK if args.quick else FULL
    print(f"{machine()['processor']}, {os.cpu_count()} cores\n{info()}\n", flush=True)
    results: list[Result] = []
    with report.progress(len(cases) * len(dtypes)) as progress:
        lines = report.Lines(cases, compiled=args.compile, write=progress.write)
        lines.head()
        for dtype in dtypes:
            for case in cases:
                progress.begin(f"{case.name} {dtype}, {case.network}")
                if not _fits(case, dtype):
                    progress.write(f"  {case.label}: left out, this machine has too little memory")
                    continue
                found = measure(case, dtype, threads, plan, compiled=args.compile)
                for result in found:
                    lines.result(result)
                results += found
    rows = families(results)
    wrong = sum(bool(r.wrong) for r in results)
    print(f"\n{report.summary(rows)}\n{len(results)} measurements, {wrong} wrong")
    if args.json is not None:
        about = {"date": str(datetime.date.today()), "quick": args.quick, "threads": threads}
        text = json.dumps(as_json(results, rows, **about), indent=1, ensure_ascii=False)
        files.write_option("--json", args.json, text + "\n", force=args.force)
    if args.chart is not None:
        from .chart import draw

        draw(results, args.chart, force=args.force)
    return 1 if wrong else 0
