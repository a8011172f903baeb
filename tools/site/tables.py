"""The tables of speed and accuracy, from what `truenorm bench` and `truenorm verify` wrote."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from truenorm._tools.bench.report import times
from truenorm._tools.verify.cases import SPECS
from truenorm._tools.verify.command import SECTIONS
from truenorm._tools.verify.measure import Check
from truenorm._tools.verify.table import header, rows

ROOT = Path(__file__).resolve().parents[2]
verified: Path | None = None  # what `truenorm verify --json` wrote; build.py sets it


def results() -> list[Path]:
    """What the benchmark measured."""
    return sorted((ROOT / "benchmarks" / "results").glob("*.json"))


def _markdown(head: Sequence[str], body: Sequence[Sequence[str]], left: int = 1) -> str:
    rule = ["---"] * left + ["--:"] * (len(head) - left)
    lines = [head, rule, *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _beside(value: float | None, goal: float | None) -> str:
    return times(value) if goal is None or value is None else f"{times(value)} ({goal:g})"


def _families(measured: dict[str, Any]) -> str:
    compiled = any(row["compile"] is not None for row in measured["families"])
    head = ["family", "dtype", "threads", "cases"]
    head += ["forward", "forward + backward", "worst", "of `clone()`"]
    head += ["torch.compile", "worst"] * compiled
    body = []
    for row in measured["families"]:
        goal = row["goal"]
        cells = [row["family"], row["dtype"], str(row["threads"]), str(row["cases"])]
        cells += [_beside(row[k], goal[k]) for k in ("forward", "both", "worst", "of_clone")]
        cells += [times(row["compile"]), times(row["compile_worst"])] * compiled
        body.append(cells)
    return _markdown(head, body, left=2)


def _largest() -> dict[str, Any]:
    """The run with the most cases."""
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in results()]
    found: dict[str, Any] = max(runs, key=lambda run: len(run.get("results", ())))
    return found


def speed_in_short(
    head: Sequence[str] = ("", "forward", "forward + backward", "worst case"),
) -> str:
    """The largest run's families, on all of its threads: the two means, and the worst case."""
    measured = _largest()
    body = [
        [row["family"], *(times(row[key]) for key in ("forward", "both", "worst"))]
        for row in measured["families"]
        if (row["threads"], row["dtype"]) == (max(measured["threads"]), "float32")
    ]
    return _markdown(head, body)


def slowest(count: int = 12) -> str:
    """The cases of the largest run in which truenorm gains least, or loses."""
    measured = _largest()
    found = [
        (case[direction]["torch_over_truenorm"], case["case"], direction)
        for case in measured["results"]
        for direction in ("forward", "forward+backward")
        if case.get(direction, {}).get("torch_over_truenorm")
    ]
    found.sort(key=lambda entry: float(entry[0][1]))
    body = [[case, way, *map(times, ratio)] for ratio, case, way in found[:count]]
    return _markdown(["case", "", "lower quartile", "median", "upper quartile"], body, left=2)


def _check(stored: dict[str, Any]) -> Check:
    (spec,) = [
        s for s in SPECS if (s.layer, s.training) == (stored["layer"], stored["mode"] == "train")
    ]
    fields = {name: stored[name] for name in Check.__dataclass_fields__ if name != "spec"}
    for name in ("truenorm", "torch", "promise"):  # JSON has no infinity: it is a word there
        fields[name] = None if fields[name] is None else float(fields[name])
    return Check(spec=spec, **{**fields, "shape": tuple(fields["shape"])})


def _title(measured: dict[str, Any]) -> str:
    """What tells one run from another: "bfloat16, quick cases"."""
    dtypes = dict.fromkeys(row["dtype"] for row in measured["families"])
    compiled = any(row["compile"] is not None for row in measured["families"])
    cases = "quick cases" if measured["quick"] else "every case"
    return f"{' and '.join(dtypes)}{' and torch.compile' * compiled}, {cases}"


def speed() -> str:
    """One part for each file of results, the newest first."""
    parts = []
    for path in reversed(results()):
        measured = json.loads(path.read_text(encoding="utf-8"))
        if "families" not in measured or not measured["families"]:
            continue
        threads = " and ".join(map(str, measured["threads"]))
        threads += " thread" + "s" * (threads != "1")
        parts.append(
            f"### {_title(measured)}\n\n[Every number](results/{path.name}). "
            f"{measured['processor']}, {measured['cores']} cores, {measured['instruction_set']}, "
            f"{threads}, truenorm {measured['truenorm']}, torch {measured['torch']}, "
            f"{measured['date']}.\n\n" + _families(measured)
        )
    if not parts:
        raise LookupError("benchmarks/results/ holds no results: `make bench` writes them")
    return "\n\n".join(parts)


def accuracy() -> str:
    """One table for each section of `truenorm verify`."""
    if verified is None:
        raise LookupError("`tables.verified` names no file of `truenorm verify --json`")
    measured = json.loads(verified.read_text(encoding="utf-8"))
    summary = measured["summary"]
    parts = [
        f"{summary['checks']:,} checks, {summary['failed']} failed; torch {measured['torch']} "
        f"would fail {summary['torch_failed']:,} of them. "
        f"Instruction set: {measured['instruction_set']}."
    ]
    for section in SECTIONS:
        checks = [_check(c) for c in measured["checks"] if c["section"] == section.key]
        if not checks:
            continue
        # "what (unit)" and "what: in full": the heading is what comes first
        title, rest = re.match(r"([^:(]*)[:(]? ?(.*?)[).]*$", section.title).groups()
        parts += [f"### {title.strip()}", *([f"{rest[:1].upper()}{rest[1:]}."] * bool(rest))]
        parts += [_markdown(header(section), rows(section, checks), left=2)]
    return "\n\n".join(parts)


TABLES = {
    "speed": speed,
    "speed in short": speed_in_short,
    "speed in short, in Chinese": lambda: speed_in_short(["", "前向", "前向 + 反向", "最差情形"]),
    "slowest": slowest,
    "accuracy": accuracy,
}


def table(name: str) -> str:
    """The Markdown of a table, by the name that a page calls it."""
    if name not in TABLES:
        raise LookupError(f"no table {name!r}; there are {', '.join(TABLES)}")
    return TABLES[name]()
