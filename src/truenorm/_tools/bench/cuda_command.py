"""`truenorm bench --device cuda`: its cases, its lines, its file."""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
from collections.abc import Sequence
from typing import Any

import torch

from ..._core.library import info
from .. import files
from ..clock import Clock
from ..verify.sections import DTYPES
from . import cuda, report
from .cases import COMPILE_GOAL, FAMILIES, Case
from .cuda import CONTENDERS, CUDA_DIRECTIONS, CUDA_GOALS, GOAL_BYTES, eager
from .results import Result
from .subject import Subject, validate
from .timing import BACKWARD, BOTH, COMPILE, FORWARD

# inputs, outputs and gradients of a step, and the float64 pieces of the oracle
_TENSORS_HELD = 10
_COLUMNS = ("forward", "of floor", "backward", "of floor", "both")


def _against(result: Result, direction: str, contender: str | None = None) -> float | None:
    """That contender's time over truenorm's, or of torch's faster way."""
    timing = result.timings[direction]
    ratio = timing.ratio(contender or eager(timing))
    return None if ratio is None else ratio.median


def _share(result: Result, direction: str) -> float:
    return result.timings[direction].of_floor().median


def line(result: Result, width: int) -> str:
    """One case: torch's time over truenorm's, shares of the floor, others on both directions."""
    label = f"  {result.case.label}"
    if result.wrong:
        return f"{label}: WRONG, not timed: {result.wrong}"
    cells = []
    for direction in (FORWARD, BACKWARD):
        cells += [report.times(_against(result, direction)), f"{_share(result, direction):.2f}"]
    cells.append(report.times(_against(result, BOTH)))
    others = [
        f"{name} {report.times(_against(result, BOTH, name))}"
        for name in CONTENDERS[2:]
        if name in result.timings[BOTH].seconds
    ]
    return f"{label:<{width}}" + "".join(f"{c:>10}" for c in cells) + "   " + ", ".join(others)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.geometric_mean(known) if known else None


def summary(results: Sequence[Result]) -> list[dict[str, Any]]:
    """By family and dtype: shares of the floor on large tensors, and geometric means, and goals."""
    rows = []
    timed = [r for r in results if not r.wrong]
    for dtype in dict.fromkeys(r.dtype for r in timed):
        for family in FAMILIES:
            here = [r for r in timed if (r.case.family, r.dtype) == (family, dtype)]
            if not here:
                continue
            large = [r for r in here if r.bytes >= GOAL_BYTES]
            every = [
                (ratio, f"{r.case.name}, {d}")
                for r in here
                for d in CUDA_DIRECTIONS
                if (ratio := _against(r, d)) is not None
            ]
            worst, worst_case = min(every, default=(None, ""))
            goal = CUDA_GOALS.get(family)
            rows.append(
                {
                    "family": family,
                    "dtype": dtype,
                    "cases": len(here),
                    "forward_of_floor": _mean([_share(r, FORWARD) for r in large]),
                    "backward_of_floor": _mean([_share(r, BACKWARD) for r in large]),
                    "both_over_truenorm": _mean([_against(r, BOTH) for r in here]),
                    "compile_over_truenorm": _mean([_against(r, BOTH, COMPILE) for r in here]),
                    "worst": worst,
                    "worst_case": worst_case,
                    "goal": None if goal is None else goal._asdict(),
                }
            )
    return rows


def _beside(value: float | None, goal: Any, name: str) -> str:
    text = report.times(value)
    return text if goal is None else f"{text} ({goal[name]:g})"


def table(rows: Sequence[dict[str, Any]]) -> str:
    head = ["", "cases", "forward of floor", "backward", "torch, both", "compile", "worst"]
    lines = [[*head, "  worst case"]]
    for row in rows:
        goal = row["goal"]
        lines.append(
            [
                f"{row['family']}, {row['dtype']}",
                str(row["cases"]),
                _beside(row["forward_of_floor"], goal, "forward"),
                _beside(row["backward_of_floor"], goal, "backward"),
                _beside(row["both_over_truenorm"], goal, "both"),
                _beside(row["compile_over_truenorm"], {"least": 1.2}, "least"),
                _beside(row["worst"], {"least": COMPILE_GOAL[1]}, "least"),
                f"  {row['worst_case']}",
            ]
        )
    widths = [max(len(cells[i]) for cells in lines) + 2 for i in range(len(lines[0]))]
    return "\n".join(
        "".join(
            text.ljust(width) if i in (0, len(cells) - 1) else text.rjust(width)
            for i, (text, width) in enumerate(zip(cells, widths, strict=True))
        ).rstrip()
        for cells in lines
    )


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse what cannot be measured here."""
    if not torch.cuda.is_available():
        parser.error(
            "--device cuda: torch sees no CUDA device on this machine; run it where there is one, "
            "or leave --device out to measure the CPU"
        )
    if info().cuda != "triton":
        parser.error(f"--device cuda: truenorm has no kernels to measure here: {info().cuda_words}")
    if args.threads:
        parser.error(f"--threads (={args.threads[0]}) is for the CPU: leave it out")


def measure(
    case: Case, dtype: str, args: argparse.Namespace, clock: Clock, rate: float, l2_bytes: int,
    device: str,
) -> Result:  # fmt: skip
    """One case, validated on the device and then timed there."""
    subject = Subject(case, DTYPES[dtype], device)
    wrong = validate(subject)
    timings = {}
    if not wrong:
        timings = cuda.time_case(
            subject, cuda.plan(args.quick), clock, rate, l2_bytes, compiled=args.compile
        )
    return Result(case, dtype, 1, wrong, timings, subject.x.nbytes)


def run(
    args: argparse.Namespace, cases: Sequence[Case], clock: Clock, about: dict[str, Any],
    device: str = "cuda",
) -> int:  # fmt: skip
    """Measure the cases and report; the exit status."""
    rate = cuda.copy_rate(clock, device)
    print(f"{about['device']}: copies {rate / 1e12:.3g} TB/s, read and written\n{info()}\n")
    width = max(len(case.label) for case in cases) + 4
    print("Times faster than torch.nn's faster way (cuDNN on or off), and of the floor's speed.")
    print(" " * width + "".join(f"{column:>10}" for column in _COLUMNS), flush=True)
    results: list[Result] = []
    heading = ""
    for dtype in dict.fromkeys(args.dtype):
        for case in cases:
            if heading != (heading := f"{case.family}, {dtype}"):
                print(heading)
            need = case.numel * DTYPES[dtype].itemsize * _TENSORS_HELD
            if device == "cuda" and need > torch.cuda.mem_get_info()[0]:
                print(f"  {case.label}: left out, this device has too little memory")
                continue
            found = measure(case, dtype, args, clock, rate, about["l2_bytes"], device)
            results.append(found)
            print(line(found, width), flush=True)
    rows = summary(results)
    wrong = sum(bool(r.wrong) for r in results)
    print(f"\n{table(rows)}\n{len(results)} measurements, {wrong} wrong")
    if args.json is not None:
        found_all = {
            **about,
            "date": str(datetime.date.today()),
            "copy_bytes_per_second": rate,
            "families": rows,
            "results": [{k: v for k, v in r.as_dict().items() if k != "threads"} for r in results],
        }
        text = json.dumps(found_all, indent=1, ensure_ascii=False)
        files.write_option("--json", args.json, text + "\n", force=args.force)
    if args.chart is not None:
        from .chart import draw

        dtypes = ", ".join(dict.fromkeys(args.dtype))
        where = f"{about['device']}, {dtypes}, torch {about['torch']}"
        draw(results, args.chart, where, force=args.force)
    return 1 if wrong else 0
