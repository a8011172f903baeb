"""What bounds a kernel, by tools/triton_model.py: its walk on code made for it, and a table."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from on_triton import needs_triton

pytestmark = needs_triton

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "tools"))


def code(*lines: str) -> str:
    """Instructions as cuobjdump writes them, 16 bytes apart."""
    return "\n".join(f"        /*{16 * i:04x}*/  {line} ;" for i, line in enumerate(lines))


LOAD = "LDG.E.128 R4, desc[UR4][R2.64]"


@pytest.fixture
def model() -> Any:
    import triton_model

    return triton_model


def test_a_result_is_waited_for(model: Any) -> None:
    memory = model.MEMORY
    apart = model.walk(code(LOAD, "FADD R8, R9, R10", "EXIT")).cycles
    used = model.walk(code(LOAD, "FADD R8, R7, R10", "EXIT")).cycles
    after = model.walk(code(LOAD, "LDG.E R20, desc[UR4][R4.64]", "FADD R8, R20, R7", "EXIT"))
    assert (apart, used, after.cycles) == (2, memory + 1, 2 * memory + 1)
    assert after.counts["loads"] == 2
    # float64 takes two registers
    wide = model.walk(code("DADD R4, R2, R6", "FADD R8, R5, R9", "EXIT")).cycles
    assert wide == 1 + model.LATENCY["DADD"]


def test_what_is_rare_is_left_out(model: Any) -> None:
    step = "FADD R8, R8, R9"
    # over a call, over much, and over little
    called = code(step, "@P0 BRA 0x40", "CALL.REL.NOINC 0x100", step, step, "EXIT")
    assert model.walk(called).counts["all"] == 2
    much = code("@!P0 BRA 0x110", *[step] * 16, step, "EXIT")
    assert model.walk(much).counts["all"] == 1
    little = code("@!P0 BRA 0x30", step, step, step, "EXIT")
    assert model.walk(little).counts["all"] == 4


def test_a_loop_that_loads(model: Any) -> None:
    loop = [LOAD, "FADD R8, R7, R8", "@P0 BRA 0x10"]
    found = model.walk(code("FADD R8, R9, R9", *loop, "STG.E [R2.64], R8", "EXIT"))
    assert found.in_loop["all"] == 3
    assert model.MEMORY <= found.loop <= model.MEMORY + 3
    # read ahead, no sooner than memory gives it
    ahead = ["LDGSTS.E.BYPASS.128 [R2], desc[UR4][R2.64]", "FADD R8, R7, R8", "@P0 BRA 0x10"]
    for turns in (1, 2):
        found = model.walk(code("FADD R8, R9, R9", *ahead, "EXIT"), turns)
        assert found.loop == model.MEMORY / turns


def test_programs_of_a_multiprocessor(model: Any) -> None:
    """By registers, threads, and shared memory, whichever is least."""
    from triton_compile import Compiled, Launch

    gpu = model.GPUS["h100"]
    for registers, shared, warps, programs in (
        (64, 0, 4, 8), (65, 0, 4, 7), (16, 0, 4, 16), (16, 0, 1, 32), (16, 100 * 1024, 4, 2),
        (255, 0, 16, 1),
    ):  # fmt: skip
        compiled = Compiled(registers, 0, shared, 16, 16, (), "")
        launch = Launch(None, (1,), {}, {"num_warps": warps})
        assert model.resident(launch, compiled, gpu) == programs


def test_its_table() -> None:
    """Of kernels as they are: half precision of a layer norm is not bound by float64."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "triton_model.py", "--only", "^LayerNorm$"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith(CASE)]
    forward, backward = (dict(zip(KEYS, line[34:].split(), strict=True)) for line in lines)
    assert (forward["kernel"], backward["kernel"]) == ("forward", "backward")
    # a sum, one of squares, and what a statistic takes, by 16 values of a thread
    assert 2 < float(forward["float64"]) < 8
    assert float(backward["float64"]) < 2
    for line in (forward, backward):
        assert min(float(line[bound]) for bound in BOUNDS) > 1


CASE = "LayerNorm (16384, 4096)"
BOUNDS = "waits", "issue", "of float64", "of conversions"
KEYS = (
    "kernel", "tile", "warps", "registers", "shared", "programs", "KiB", "cycles", "barriers",
    "instructions", "float64", "conversions", *BOUNDS, "share",
)  # fmt: skip
