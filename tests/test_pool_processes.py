"""Recycled memory across threads, forks and the interpreter's end; its environment variable."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import warnings

import pytest
import torch
from pooling import CAP, ONE, only_native, pooled, statistics  # noqa: F401
from torch import Tensor

import truenorm
import truenorm.functional as F
from truenorm._core import pool

pytestmark = [only_native, pytest.mark.usefixtures("pooled")]


def test_threads() -> None:
    x = torch.randn(2, 16, 256, 256)
    expected = F.instance_norm(x).clone()
    wrong: list[int] = []

    def work(seed: int) -> None:
        kept: list[Tensor] = []
        for i in range(60):
            at = x.clone().requires_grad_()
            y = F.instance_norm(at)
            if i % 3 == 0:
                # from the autograd thread and back
                y.backward(torch.ones_like(y))
            kept.append(y.detach())
            if (i + seed) % 4 == 0:
                wrong.extend(i for y in kept if not torch.equal(y, expected))
                kept.clear()
            if i % 20 == seed:
                truenorm.empty_cache()

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert 0 < statistics().idle_mib <= CAP


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_fork() -> None:
    x = torch.randn(ONE)
    y, expected = F.instance_norm(x), F.instance_norm(x).clone()
    assert statistics().idle_buffers > 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        signal.alarm(60)  # a lock that stays taken must not hang the suite
        status = 1
        try:
            # the parent's threads are not here: torch's own operations would wait for them too
            torch.set_num_threads(1)
            assert statistics().idle_buffers == 0
            assert torch.equal(y, expected)
            address = F.instance_norm(x).data_ptr()
            again = F.instance_norm(x)
            assert again.data_ptr() == address
            assert torch.equal(again, expected)
            y.zero_()
            truenorm.empty_cache()
            status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert statistics().idle_buffers > 0
    assert torch.equal(F.instance_norm(x), expected)
    assert torch.equal(y, expected)


def started(value: str | None, *code: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "TRUENORM_POOL_MIB"}
    if value is not None:
        environment["TRUENORM_POOL_MIB"] = value
    script = "\n".join(code) or "import truenorm; print(truenorm.info().pool.cap_mib)"
    return subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True
    )


@pytest.mark.parametrize("value", ["-1", "1.5", "lots", " ", "1_000", "٣"])
def test_a_bad_value_names_the_variable_and_the_remedy(value: str) -> None:
    done = started(value)
    assert done.returncode == 1
    assert f"ImportError: TRUENORM_POOL_MIB (={value!r}) is not a whole number" in done.stderr
    assert "unset it" in done.stderr


@pytest.mark.parametrize(
    ("value", "cap"),
    [
        (None, pool.DEFAULT_MIB),
        ("", pool.DEFAULT_MIB),
        ("0", 0),
        ("12", 12),
        ("9" * 30, pool.LARGEST_MIB),
    ],
)
def test_the_cap_from_the_environment(value: str | None, cap: int) -> None:
    done = started(value)
    assert (done.stdout, done.returncode) == (f"{cap}\n", 0), done.stderr


def test_results_that_die_with_the_interpreter() -> None:
    done = started(
        "64",
        "import torch, truenorm, builtins",
        "y = truenorm.functional.instance_norm(torch.randn(8, 4, 256, 256))",
        "builtins.kept = y, y[0]",
        "torch.kept = [y.view(-1)]",
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_without_the_native_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "_native", None)
    truenorm.empty_cache()
    assert truenorm.info().pool is None
    assert "pool: none" in str(truenorm.info())
