"""The tests of the promises, once more for each other instruction set of the machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import truenorm

HERE = Path(__file__).parent
INSTRUCTION_SETS = ("baseline", "avx2", "avx512", "neon")
# this machine's best is what the rest of the suite runs on
OTHERS = [name for name in INSTRUCTION_SETS if name != truenorm.info().instruction_set]

only_native = pytest.mark.skipif(
    truenorm.info().cpu != "native", reason="instruction sets are the native kernels' matter"
)


def chosen(name: str) -> subprocess.CompletedProcess[str]:
    code = "import truenorm; print(truenorm.info().instruction_set)"
    environment = {**os.environ, "TRUENORM_ISA": name}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )


@only_native
@pytest.mark.parametrize("name", OTHERS)
def test_the_promises_on_every_other_instruction_set(name: str) -> None:
    here = chosen(name)
    if here.returncode:
        # not this machine's: asking for it must be refused by name
        assert f"TRUENORM_ISA (={name!r})" in here.stderr
        assert "is not an instruction set of this machine" in here.stderr
        return
    assert here.stdout.strip() == name
    options = ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [sys.executable, *options, "test_kernels.py", "test_half.py"],
        cwd=HERE,
        env={**os.environ, "TRUENORM_ISA": name},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]
