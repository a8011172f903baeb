"""`truenorm bench --device cuda`, on the CPU with another clock: no test looks at a speed."""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from truenorm._tools.bench import cuda, cuda_command
from truenorm._tools.bench.cases import CUDA_CASES, FAMILIES, Case
from truenorm._tools.bench.subject import Subject
from truenorm._tools.bench.timing import BACKWARD, BOTH, FORWARD, Plan
from truenorm._tools.cli import main

ABOUT = {"device": "a device", "torch": torch.__version__, "l2_bytes": 2**20}
SMALL = (
    Case("InstanceNorm2d", {"num_features": 3, "affine": True}, (2, 3, 4, 5), "", True),
    Case("BatchNorm2d", {"num_features": 3}, (2, 3, 5, 6), ""),
    Case("RMSNorm", {"normalized_shape": 16}, (8, 16), ""),
)


def clock(run: Callable[[], object], *, small: bool) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


@pytest.fixture(autouse=True)
def _quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "copy_rate", functools.partial(cuda.copy_rate, size=2**12))
    monkeypatch.setattr(cuda, "plan", lambda quick: Plan(2, 2, 0.0))


def arguments(**changed: Any) -> argparse.Namespace:
    given = {
        "dtype": ["float32"],
        "quick": True,
        "compile": False,
        "json": None,
        "chart": None,
        "force": False,
    }
    return argparse.Namespace(**{**given, **changed})


def test_the_cases_have_families_networks_and_names_of_their_own() -> None:
    every = cuda.ALL_CASES
    assert len({case.name for case in every}) == len(every)
    for case in CUDA_CASES:
        assert case.family in FAMILIES
        assert case.network
        # a goal speaks of tensors of 64 MiB and more: in bfloat16 too
        assert 2 * case.numel >= cuda.GOAL_BYTES / 4


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = tmp_path / "bench.json", tmp_path / "bench.png"
    args = arguments(json=files[0], chart=files[1], dtype=["float32", "bfloat16"])
    assert cuda_command.run(args, SMALL, clock, ABOUT, "cpu") == 0
    out = capsys.readouterr().out
    assert "6 measurements, 0 wrong\n" in out
    assert "a device: copies" in out
    assert files[1].read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    found = json.loads(files[0].read_text(encoding="utf-8"))
    assert found["device"] == "a device"
    assert found["copy_bytes_per_second"] > 0
    assert [row["family"] for row in found["families"][:3]] == [case.family for case in SMALL]
    first = found["results"][0]
    for direction in (FORWARD, BACKWARD, BOTH):
        assert set(first[direction]["median_seconds"]) == {
            "truenorm", "torch", "torch, cuDNN off", "clone",
        }  # fmt: skip
        low, median, high = first[direction]["torch_over_truenorm"]
        assert 0 < low <= median <= high


def test_a_wrong_result_is_not_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cuda_command, "validate", lambda subject: "output is off by 3")
    assert cuda_command.run(arguments(), SMALL[2:], clock, ABOUT, "cpu") == 1
    out = capsys.readouterr().out
    assert "RMSNorm (8, 16): WRONG, not timed: output is off by 3" in out
    assert "1 measurements, 1 wrong" in out


def test_a_contender_that_refuses_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(cuda, "_functional", lambda case, layer: {cuda.LIGER: refuses})
    subject = Subject(SMALL[2], torch.float32)
    found = cuda.time_case(subject, Plan(2, 2, 0.0), clock, 1e9, 2**20, compiled=False)
    assert set(found[BOTH].seconds) == {"truenorm", "torch", "clone"}


def test_the_floor_counts_bytes_that_must_move() -> None:
    def moved(case: Case, direction: str, l2: int = 2**20) -> float:
        return cuda.floor_bytes(case, 4, direction, l2) / (4 * case.numel)

    fits = Case("LayerNorm", {"normalized_shape": 4096}, (512, 4096), "")
    long = Case("InstanceNorm2d", {"num_features": 2}, (2, 2, 512, 512), "")
    batch = Case("BatchNorm2d", {"num_features": 8}, (8, 8, 128, 128), "")
    assert [moved(fits, d) for d in cuda.CUDA_DIRECTIONS] == [2, 3, 5]
    assert [moved(long, d) for d in cuda.CUDA_DIRECTIONS] == [3, 5, 8]
    assert [moved(batch, d) for d in cuda.CUDA_DIRECTIONS] == [3, 5, 8]
    # what the L2 cache holds is read from memory once
    assert moved(batch, FORWARD, 2**30) == moved(long, FORWARD, 2**30) == 2
    evaluation = Case("BatchNorm2d", {"num_features": 8}, (8, 8, 128, 128), "", training=False)
    assert moved(evaluation, FORWARD) == 2
    subject = Subject(SMALL[2], torch.float32)

    def two_seconds(run: Callable[[], object], *, small: bool) -> float:
        run()
        return 2.0

    plan = Plan(2, 2, 0.0)
    timing = cuda.time_case(subject, plan, two_seconds, 1e3, 2**20, compiled=False)[BACKWARD]
    # 3 tensors of 512 bytes at 1000 bytes a second
    assert timing.of_floor().median == pytest.approx(1.536 / 2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU would be measured")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--device", "cuda"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "--device cuda: torch sees no CUDA device on this machine" in err
    assert err.count("\n") == 1


def test_without_kernels_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    lacking = argparse.Namespace(cuda="torch", cuda_words="torch's own operators (no Triton)")
    monkeypatch.setattr(cuda_command, "info", lambda: lacking)
    assert main(["bench", "--device", "cuda"]) == 2
    assert (
        "no kernels to measure here: torch's own operators (no Triton)" in capsys.readouterr().err
    )


def test_threads_are_for_the_cpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda_command, "info", lambda: argparse.Namespace(cuda="triton"))
    assert main(["bench", "--device", "cuda", "--threads", "2"]) == 2
    assert "--threads (=2) is for the CPU" in capsys.readouterr().err


def test_models_are_measured_on_the_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--device", "cuda", "--models"]) == 2
    assert "--models is measured on the CPU" in capsys.readouterr().err
