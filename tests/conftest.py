"""What every test file shares: truenorm imported once, and a seed for each test."""

from __future__ import annotations

import contextlib
import importlib
import os
import tempfile
import warnings
from collections.abc import Iterator
from typing import Any

import counts
import processes
import pytest
import torch

# torch keeps compiled graphs on disk, by the operators' names: those of another version of truenorm
# must not be run in their stead
CACHE = tempfile.TemporaryDirectory(prefix="truenorm-tests-")
os.environ["TORCHINDUCTOR_CACHE_DIR"] = CACHE.name
# on_triton.py
PRETENDS = os.environ.get("TRUENORM_TESTS_PRETEND") == "1" and not torch.cuda.is_available()
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
    if torch.cuda.is_available():
        # torch's and Triton's own are others there, by version and GPU
        for line in ("default", "error:truenorm"):
            config.addinivalue_line("filterwarnings", line)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for database in sorted({database for database, _ in counts.PASSED}):
        checks = {check: n for (d, check), n in counts.PASSED.items() if d == database}
        named = ", ".join(f"{check} {n}" for check, n in checks.items())
        terminalreporter.write_line(
            f"torch's {database} samples passed: {sum(checks.values())} ({named})"
        )


def pytest_sessionfinish() -> None:
    processes.close_all()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """On a pretended GPU, which is slow, the first and the last of a test's cases."""
    if PRETENDS:
        of_test: dict[Any, list[pytest.Item]] = {}
        for item in items:
            of_test.setdefault(getattr(item, "function", item), []).append(item)
        items[:] = [case for cases in of_test.values() for case in cases[:: len(cases) - 1 or 1]]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(20)


if PRETENDS:

    @pytest.fixture(autouse=True)
    def _pretending() -> Iterator[None]:
        from pretended import pretending

        with pretending():
            yield
