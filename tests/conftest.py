"""What every test file shares: truenorm imported once, and a seed for each test."""

from __future__ import annotations

import contextlib
import importlib
import os
import tempfile
import warnings
from collections.abc import Iterator

import counts
import processes
import pytest
import torch

# torch keeps compiled graphs on disk, by the operators' names: those of another version of truenorm
# must not be run in their stead
CACHE = tempfile.TemporaryDirectory(prefix="truenorm-tests-")
os.environ["TORCHINDUCTOR_CACHE_DIR"] = CACHE.name
# before anything imports Triton: without a GPU its kernels run in the interpreter (on_triton.py)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

with warnings.catch_warnings():
    # without the native library truenorm warns, and the suite runs on plain PyTorch ops
    warnings.filterwarnings("ignore", "truenorm runs on plain PyTorch ops", RuntimeWarning)
    import truenorm

with warnings.catch_warnings():
    # torch scripts its own formulas at the first forward derivative, and warns about scripting
    warnings.simplefilter("ignore", DeprecationWarning)
    importlib.import_module("torch._decomp.decompositions_for_jvp")
    # its test databases miss the optional hypothesis
    warnings.simplefilter("ignore", ImportWarning)
    # nor is expecttest everywhere: the tests of the Triton kernels do without
    with contextlib.suppress(ModuleNotFoundError):
        importlib.import_module("torch.testing._internal.common_utils")


def pytest_report_header() -> list[str]:
    return str(truenorm.info()).splitlines()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "large: needs many GiB of memory, skipped where absent")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for database in sorted({database for database, _ in counts.PASSED}):
        checks = {check: n for (d, check), n in counts.PASSED.items() if d == database}
        named = ", ".join(f"{check} {n}" for check, n in checks.items())
        terminalreporter.write_line(
            f"torch's {database} samples passed: {sum(checks.values())} ({named})"
        )


def pytest_sessionfinish() -> None:
    processes.close_all()


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    torch.manual_seed(20)
    if os.environ.get("TRUENORM_TESTS_PRETEND") == "1" and not torch.cuda.is_available():
        from pretended import pretending

        with pretending():
            yield
    else:
        yield
