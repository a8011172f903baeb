"""`truenorm bench`: what it measures and refuses to measure. No test looks at a speed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import truenorm
from truenorm._core import eager
from truenorm._tools.bench import cases, command
from truenorm._tools.bench.cases import CASES, FAMILIES, Case
from truenorm._tools.bench.chart import draw
from truenorm._tools.bench.report import Lines, summary
from truenorm._tools.bench.results import Result, families
from truenorm._tools.bench.subject import Subject, validate
from truenorm._tools.bench.timing import BOTH, DIRECTIONS, FORWARD, Plan, Quartiles, Timing, in_turn
from truenorm._tools.cli import main

TINY = Plan(minimum=2, maximum=2, seconds=0.0, round_seconds=1e-6)
SMALL = (
    Case("InstanceNorm2d", {"num_features": 3, "affine": True}, (2, 3, 4, 5), "", True),
    Case("BatchNorm2d", {"num_features": 3}, (2, 3, 5, 6), ""),
    Case("BatchNorm2d", {"num_features": 3}, (2, 3, 5, 6), "", training=False),
    Case("GroupNorm", {"num_groups": 2, "num_channels": 6}, (3, 6, 4), ""),
    Case("LayerNorm", {"normalized_shape": 16}, (3, 4, 16), ""),
    Case("RMSNorm", {"normalized_shape": 16}, (8, 16), ""),
    Case("LocalResponseNorm", {"size": 5, "alpha": 0.1}, (2, 7, 4, 4), ""),
)


def _times(monkeypatch: pytest.MonkeyPatch, *which: Case) -> None:
    """Only these cases, in the least of time."""
    monkeypatch.setattr(command, "CASES", which)
    monkeypatch.setattr(command, "FULL", TINY)


def test_every_family_has_cases() -> None:
    assert len({case.name for case in CASES}) == len(CASES)
    assert {case.family for case in CASES} == set(FAMILIES)
    for family in FAMILIES:
        here = [case for case in CASES if case.family == family]
        assert sum(case.quick for case in here) >= 2
        assert len({case.label for case in here}) == len(here)
    assert all(case.network for case in CASES)
    for case in CASES:
        layer = case.build(torch.nn)
        assert layer.training == case.training
        # the smallest of the family is cheap enough to check the arguments on
        if case.numel <= 2**16:
            layer(torch.randn(case.shape).to(memory_format=case.memory_format))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_validation(case: Case, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = Subject(case, dtype)
    assert validate(subject) == ""
    # cut into pieces, as large cases are
    monkeypatch.setattr("truenorm._tools.bench.subject._PIECE", 40)
    assert validate(subject) == ""
    for mine, other in zip(subject.ours.buffers(), subject.theirs.buffers(), strict=True):
        assert torch.equal(mine.to(other.dtype), other)


def _off(by: float) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    def breakage(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def wrapped(*args: Any, **kwargs: Any) -> Tensor:
            y = original(*args, **kwargs)
            # the last value alone
            y.data.view(-1)[-1] += by
            return y

        return wrapped

    return breakage


def _wrong_gradient(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def wrapped(*args: Any, **kwargs: Any) -> Tensor:
        y = original(*args, **kwargs)
        if y.requires_grad:
            y.register_hook(lambda grad: grad * 1.001)
        return y

    return wrapped


def _raises(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def wrapped(*args: Any, **kwargs: Any) -> Tensor:
        raise RuntimeError("no kernel\nfor this")

    return wrapped


def _other_layout(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *args, **kwargs: original(*args, **kwargs).transpose(0, 1).contiguous().mT


@pytest.mark.parametrize(
    ("breakage", "message"),
    [
        (_off(1e-4), "output is off by"),
        (_off(float("nan")), "output is off by inf"),
        (_wrong_gradient, "input gradient is off by 0.001"),
        (_raises, "it raised RuntimeError: no kernel"),
        (_other_layout, "the output lies in memory as"),
    ],
)
def test_a_wrong_result_is_not_timed(
    breakage: Callable[..., Any],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    square = Case("RMSNorm", {"normalized_shape": 8}, (8, 8), "")
    _times(monkeypatch, SMALL[4], square)
    layer = truenorm.RMSNorm
    monkeypatch.setattr(layer, "_normalized", breakage(layer._normalized))
    # the layers then go through what is broken
    monkeypatch.setattr(eager, "call", lambda *_: None)
    path = tmp_path / "bench.json"
    assert main(["bench", "--json", str(path), "--threads", "1"]) == 1
    out = capsys.readouterr().out
    assert f"RMSNorm (8, 8): WRONG, not timed: {message}" in out
    assert out.endswith("2 measurements, 1 wrong\n")
    whole, wrong = json.loads(path.read_text(encoding="utf-8"))["results"]
    assert (whole["wrong"], FORWARD in whole) == ("", True)
    assert message in wrong["wrong"]
    assert not set(DIRECTIONS) & set(wrong)


def test_wrong_running_statistics_are_found() -> None:
    def moves(layer: Any, *_: Any) -> None:
        layer.running_var.mul_(1.0001)

    subject = Subject(SMALL[1], torch.float32)
    subject.ours.register_forward_hook(moves)
    assert validate(subject).startswith("running statistics are off by 0.0001")


def test_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _times(monkeypatch, *SMALL)
    files = tmp_path / "bench.json", tmp_path / "bench.png"
    threads = torch.get_num_threads()
    argv = ["--threads", "1", "2", "--json", str(files[0]), "--chart", str(files[1])]
    assert main(["bench", *argv]) == 0
    assert torch.get_num_threads() == threads
    out = capsys.readouterr().out
    assert "\nfloat32, 2 threads" in out
    assert f"{2 * len(SMALL)} measurements, 0 wrong\n" in out
    assert files[1].read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    text = files[0].read_text(encoding="utf-8")
    found = json.loads(text)
    assert str(Path(__file__).parent.parent) not in text
    assert found["threads"] == [1, 2]
    assert found["torch"] == torch.__version__
    assert {row["family"] for row in found["families"]} == {case.family for case in SMALL}
    first = found["results"][0]
    assert (first["case"], first["memory_format"], first["bytes"]) == (
        "InstanceNorm2d (2, 3, 4, 5) channels_last", "channels_last", 480,
    )  # fmt: skip
    for direction in DIRECTIONS:
        timing = first[direction]
        assert timing["rounds"] == TINY.minimum
        assert set(timing["median_seconds"]) == {"truenorm", "torch", "clone"}
        low, median, high = timing["torch_over_truenorm"]
        assert 0 < low <= median <= high


def test_torch_may_refuse_a_case() -> None:
    # no LocalResponseNorm in float16 on CPU: its share of the table is empty
    timings = {d: Timing(d, {"truenorm": [2.0], "clone": [1.0]}) for d in DIRECTIONS}
    result = Result(SMALL[-1], "float16", 1, "", timings, 100)
    written: list[str] = []
    lines = Lines([SMALL[-1]], compiled=True, write=written.append)
    lines.head()
    lines.result(result)
    assert "–" in written[-1]
    rows = families([result])
    assert (rows[0].forward, rows[0].worst) == (None, None)
    assert "– (8)" in summary(rows)


def test_ratios_are_taken_within_a_round(tmp_path: Path) -> None:
    # the machine slows down threefold between the rounds, and the ratios stay
    seconds = {"truenorm": [1.0, 3.0], "torch": [2.0, 6.0], "clone": [0.5, 1.5]}
    timings = {d: Timing(d, seconds) for d in DIRECTIONS}
    assert timings[FORWARD].ratio("torch") == Quartiles(2.0, 2.0, 2.0)
    assert timings[FORWARD].ratio("compile") is None
    assert timings[FORWARD].of_floor().median == 0.5
    # read once and written once, in the time of a clone
    assert timings[FORWARD].copy_rate(600) == 1200 / timings[FORWARD].median("clone")
    # five tensors are moved, where clone() moves two
    assert timings[BOTH].of_floor().median == 1.25
    rows = families([Result(SMALL[0], "float32", 2, "", timings, 2**20)])
    assert (rows[0].forward, rows[0].both, rows[0].of_clone) == pytest.approx((2.0, 2.0, 0.5))
    draw([], tmp_path / "empty.png")


def test_everyone_takes_a_turn_and_a_refusal_is_left_out() -> None:
    calls: list[str] = []

    def refuses() -> None:
        raise NotImplementedError("no such dtype")

    names = ("truenorm", "torch", "clone")
    runs = {name: (lambda name=name: calls.append(name)) for name in names}
    plan = Plan(minimum=3, maximum=3, seconds=0.0, round_seconds=0.0)
    found = in_turn({**runs, "compile": refuses}, plan)
    assert {name: len(v) for name, v in found.items()} == dict.fromkeys(names, 3)
    rounds = [tuple(calls[i : i + 3]) for i in range(6, 15, 3)]
    assert all(set(order) == set(names) for order in rounds)
    assert len({order[0] for order in rounds}) > 1
    with pytest.raises(NotImplementedError, match="no such dtype"):
        in_turn({"truenorm": refuses}, plan)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--layer Dropout", "invalid choice: 'Dropout'"),
        ("--family InstanceNorm", "invalid choice: 'instancenorm'"),
        ("--dtype int8", "invalid choice: 'int8'"),
        ("--threads 0", "--threads (=0) must be at least 1"),
        ("--threads two", "invalid int value: 'two'"),
        ("--layer RMSNorm --family layernorm", "leave no case"),
        ("--json no/where/x.json", "no/where' does not exist, make it first"),
        ("--chart no/where/x.png", "no/where' does not exist, make it first"),
        ("--chart x.svg", "--chart (='x.svg') must be a PNG"),
    ],
)
def test_bad_arguments(argv: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *argv.split()]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert err.count("\n") == 1


def test_a_case_without_memory_is_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _times(monkeypatch, SMALL[4])
    monkeypatch.setattr(command, "_TENSORS_HELD", 2**50)
    assert main(["bench"]) == 0
    assert "left out, this machine has too little memory" in capsys.readouterr().out


def test_the_command_is_listed_without_the_optional_packages() -> None:
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('matplotlib', 'rich')));"
        "from truenorm._tools.cli import main; main(['bench', '--help'])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert all(name in out.stdout for name in cases.LAYERS)
