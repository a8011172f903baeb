"""The pretended GPU refuses what a real one refuses, and the tests of the kernels run on it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from on_triton import HAS_CUDA, needs_triton

HERE = Path(__file__).parent

REFUSED = """
import pytest, torch
from pretended import DEVICE, pretending

def test_refusals():
    x, y = torch.randn(3, 4), torch.randn(3, 4, device="cuda")
    assert x.to("cuda").device == x.cuda().device == y.device == (y + 1).device == DEVICE
    with pytest.raises(RuntimeError, match="all tensors to be on the same device"):
        x + y
    with pytest.raises(RuntimeError, match="all tensors to be on the same device"):
        torch.nn.Linear(4, 2)(y)
    with pytest.raises(TypeError, match="can't convert pretended:0 device type tensor to numpy"):
        y.numpy()
    with pytest.raises(RuntimeError, match="device type for generator but found 'cpu'"):
        torch.randn(3, device="cuda", generator=torch.Generator())
    # none of this is refused
    y.copy_(x)
    assert torch.equal(y.cpu(), x) and torch.equal(y[x > 0].cpu(), x[x > 0])
    assert (y * torch.tensor(2.0)).device == DEVICE
    torch.cuda.set_sync_debug_mode("error")
    for waits in (lambda: y.sum().item(), y.cpu, lambda: y.copy_(x), lambda: bool((y > 0).all())):
        with pytest.raises(RuntimeError, match="called a synchronizing CUDA operation"):
            waits()
    y.add_(1).sum()
    leaf = y.detach().requires_grad_()
    (leaf * y).sum().backward()
    assert leaf.grad.device == DEVICE
"""


def pretend(*args: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *args],
        cwd=HERE.parent,
        env={**os.environ, "TRUENORM_TESTS_PRETEND": "1", "PYTHONPATH": os.pathsep.join(
            [str(HERE), os.environ.get("PYTHONPATH", "")]
        )},
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


@pytest.mark.skipif(HAS_CUDA, reason="there is a real one")
def test_it_refuses_what_a_gpu_refuses(tmp_path: Path) -> None:
    file = tmp_path / "test_refused.py"
    file.write_text(REFUSED)
    pretend("-c", str(HERE.parent / "pyproject.toml"), "-p", "conftest", str(file))


# gradgradcheck makes a thousand calls, and a choice of tiles a hundred
SLOW = ("test_triton_layers.py::test_second_derivatives", "test_triton_tune.py::test_what_is")


@needs_triton
@pytest.mark.skipif(HAS_CUDA, reason="there is a real one")
@pytest.mark.parametrize("part", ["cuda", "host", "layers", "promises", "tune"])
def test_the_tests_of_a_gpu_run_on_a_pretended_one(part: str) -> None:
    """What fails here fails on a GPU, before it has tested any kernel."""
    slow = [f"--deselect=tests/{name}" for name in SLOW]
    slow.append("--deselect=tests/test_triton_host.py::test_every_kernel_compiles_without_spilling")
    pretend(f"tests/test_triton_{part}.py", *slow)
