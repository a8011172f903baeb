"""What every test file shares: truenorm imported once, a seed for each test, workers' groups."""

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
import workers

# pytest-xdist's workers share the processors: one thread of torch's each, but where a test sets it,
# and one for each process that a test starts
WORKER = os.environ.get("PYTEST_XDIST_WORKER", "")
if WORKER:
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
# workers and processes that are started from here: a thread that waits for others, of a test with
# more of them than processors, does not keep one busy
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# torch keeps compiled graphs on disk, by the operators' names: those of another version of truenorm
# must not be run in their stead
CACHE = tempfile.TemporaryDirectory(prefix="truenorm-tests-")
os.environ["TORCHINDUCTOR_CACHE_DIR"] = CACHE.name
# on_triton.py
PRETENDS = os.environ.get("TRUENORM_TESTS_PRETEND") == "1" and not torch.cuda.is_available()
# before anything imports Triton: without a GPU its kernels run in the interpreter (on_triton.py)
if not torch.cuda.is_available() and not os.environ.get("TRUENORM_TESTS_PTX"):
    os.environ["TRITON_INTERPRET"] = "1"

with warnings.catch_warnings():
    # without the native library truenorm warns, and the suite runs on torch's own operators
    warnings.filterwarnings("ignore", "truenorm runs on torch's own operators", RuntimeWarning)
    import truenorm

with warnings.catch_warnings():
    # torch scripts its own formulas at the first forward derivative, and warns about scripting: a
    # FutureWarning from 2.14 on
    warnings.simplefilter("ignore", DeprecationWarning)
    warnings.simplefilter("ignore", FutureWarning)
    importlib.import_module("torch._decomp.decompositions_for_jvp")
    # its test databases miss the optional hypothesis
    warnings.simplefilter("ignore", ImportWarning)
    # nor is expecttest everywhere: the tests of the Triton kernels do without
    with contextlib.suppress(ModuleNotFoundError):
        importlib.import_module("torch.testing._internal.common_utils")


def pytest_report_header() -> list[str]:
    return str(truenorm.info()).splitlines()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--every-instruction-set",
        action="store_true",
        help="the tests of the promises once more under each other instruction set (make test-all)",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "large: needs many GiB of memory, skipped where absent")
    if torch.cuda.is_available():
        # torch's and Triton's own are others there, by version and GPU
        for line in ("default", "error:truenorm"):
            config.addinivalue_line("filterwarnings", line)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if PRETENDS:
        # which is slow: the first and the last of a test's cases
        of_test: dict[Any, list[pytest.Item]] = {}
        for item in items:
            of_test.setdefault(getattr(item, "function", item), []).append(item)
        items[:] = [case for cases in of_test.values() for case in cases[:: len(cases) - 1 or 1]]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    return workers.scheduler(config, log) if config.getvalue("dist") == "loadgroup" else None


# what a worker counted, to the process that prints the summary
@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    for database, check, samples in getattr(node, "workeroutput", {}).get("counts", ()):
        counts.PASSED[database, check] += samples


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for database in sorted({database for database, _ in counts.PASSED}):
        checks = {check: n for (d, check), n in sorted(counts.PASSED.items()) if d == database}
        named = ", ".join(f"{check} {n}" for check, n in checks.items())
        terminalreporter.write_line(
            f"torch's {database} samples passed: {sum(checks.values())} ({named})"
        )


def pytest_sessionfinish(session: pytest.Session) -> None:
    processes.close_all()
    # none in a run that a test of a worker starts
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["counts"] = [(*key, samples) for key, samples in counts.PASSED.items()]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(20)


if PRETENDS:

    @pytest.fixture(autouse=True)
    def _pretending() -> Iterator[None]:
        from pretended import pretending

        with pretending():
            yield
