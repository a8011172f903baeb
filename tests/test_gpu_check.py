"""tools/gpu_check.py, whole in Triton's interpreter: no slip of its own may cost time on a GPU."""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from on_triton import HAS_CUDA, needs_triton

TOOLS = Path(__file__).parent.parent / "tools"

pytestmark = [needs_triton, pytest.mark.skipif(HAS_CUDA, reason="it would measure the GPU")]


def check(*args: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, TOOLS / "gpu_check.py", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True)


def test_all_of_it(tmp_path: Path) -> None:
    file = tmp_path / "check.json"
    done = check("--interpret", "--seconds", 500, "--json", file)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(file.read_text())
    assert list(found) == [
        "ended", "machine", "compiling", "correctness", "extras", "speed", "composed", "host",
        "compiled", "sweep",
    ]  # fmt: skip
    assert found["ended"] == "done"
    assert found["correctness"]["passed"] > 0
    cases = found["speed"]["cases"]
    assert len(cases) == 6
    for case in cases:
        assert case["wrong"] == ""
        assert case["forward of floor"] > 0
        assert set(case["both"]["median_seconds"]) >= {"truenorm", "torch"}
    composed = found["composed"]["cases"]
    assert len(composed) == 14
    assert set(composed["sum and norm, bfloat16"]) == {
        f"{name} {what} us" for name in ("truenorm", "torch") for what in ("forward", "both")
    }
    assert found["compiled"]["LayerNorm (4, 8)"].keys() == {"truenorm", "torch"}
    assert found["sweep"]["LayerNorm (4, 8)"]
    # the table comes last
    table = done.stdout.split("\n\n", 1)[1]
    assert table.count("LayerNorm (4, 8), ") == 2
    assert table.endswith(f"done: {file}\n")


def test_it_ends_in_time(tmp_path: Path) -> None:
    file = tmp_path / "check.json"
    start = time.monotonic()
    done = check("--interpret", "--seconds", 0.5, "--json", file)
    assert done.returncode == 3, done.stdout + done.stderr
    assert time.monotonic() - start < 120
    assert json.loads(file.read_text())["ended"].startswith("out of time in ")
    assert "out of time in " in done.stdout


@pytest.mark.parametrize(
    ("raised", "status", "ended", "later"),
    [
        ("WrongError", 1, "wrong in correctness: two tests", False),
        ("ValueError", 1, "failed in correctness", True),
    ],
)
def test_wrong_results_stop_it_and_other_failures_do_not(
    raised: str, status: int, ended: str, later: bool,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.syspath_prepend(str(TOOLS))
    gpu_check, stages = (importlib.import_module(name) for name in ("gpu_check", "gpu_stages"))
    ran = []

    def correctness(setup: Any, found: dict[str, Any]) -> None:
        found["failed tests"] = 2
        raise {"WrongError": stages.WrongError, "ValueError": ValueError}[raised]("two tests")

    def speed(setup: Any, found: dict[str, Any]) -> None:
        ran.append(True)

    monkeypatch.setattr(stages, "STAGES", ((correctness, False), (speed, False)))
    report = gpu_check.Report(tmp_path / "check.json")
    args = argparse.Namespace(interpret=True, device="cpu", seconds=60)
    assert gpu_check.run(args, report) == status
    assert report.ended == ended
    assert bool(ran) == later
    assert json.loads(report.path.read_text())["correctness"]["failed tests"] == 2
    if raised == "ValueError":
        assert "FAILED: ValueError: two tests" in report.table()


def test_without_a_gpu_it_says_so() -> None:
    done = check()
    assert done.returncode == 2
    assert (
        "torch sees no CUDA device here: run it where there is one, or --interpret" in done.stderr
    )
