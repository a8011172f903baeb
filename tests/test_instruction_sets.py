"""Every instruction set of the machine gives the same bits, so that one's promises are all's.

The rest of the suite holds the promises on this machine's best set. `make test-all` runs those
tests once more under each of the others.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import digest
import pytest

import truenorm

HERE = Path(__file__).parent
INSTRUCTION_SETS = ("baseline", "avx2", "avx512", "neon")
BEST = truenorm.info().instruction_set

only_native = pytest.mark.skipif(
    truenorm.info().cpu != "native", reason="instruction sets are the native kernels' matter"
)
OTHERS = pytest.mark.parametrize("name", [name for name in INSTRUCTION_SETS if name != BEST])


def started(name: str, *command: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=HERE,
        env={**os.environ, "TRUENORM_ISA": name},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def chosen(name: str) -> str:
    """What truenorm says that it runs on where it is asked for this set; "" where it refuses."""
    process = started(name, "-c", "import truenorm; print(truenorm.info().instruction_set)")
    out, err = process.communicate()
    if process.returncode:
        assert f"TRUENORM_ISA (={name!r})" in err
        assert "is not an instruction set of this machine" in err
        return ""
    return out.strip()


@only_native
@OTHERS
def test_a_set_that_is_asked_for_runs_or_is_refused_by_name(name: str) -> None:
    assert chosen(name) in (name, "")


@only_native
def test_every_instruction_set_gives_the_same_bits() -> None:
    here = [name for name in INSTRUCTION_SETS if name == BEST or chosen(name)]
    assert BEST in here
    running = {name: started(name, "digest.py") for name in here}
    digests = {}
    for name, process in running.items():
        out, err = process.communicate()
        assert process.returncode == 0, err
        digests[name] = dict(line.split() for line in out.splitlines())
        assert list(digests[name]) == list(digest.KINDS)
    for name in here:
        assert digests[name] == digests[BEST], name


@only_native
@OTHERS
def test_the_promises_on_every_other_instruction_set(
    name: str, request: pytest.FixtureRequest
) -> None:
    if not request.config.getoption("--every-instruction-set"):
        pytest.skip("the digest is compared instead: make test-all")
    if not chosen(name):
        pytest.skip("not of this machine")
    options = ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    process = started(name, *options, "test_kernels.py", "test_half.py")
    out, err = process.communicate()
    assert process.returncode == 0, out[-3000:] + err[-1000:]
