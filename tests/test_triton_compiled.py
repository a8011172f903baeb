"""The Triton kernels as they are compiled for a GPU, on a machine without one: see on_ptx.py.

Triton's interpreter knows no threads: this is where a barrier that lacks, a value in the wrong lane
or a product that was fused would be seen. Some of the other files' tests run in a process of their
own, since Triton either compiles or interprets; `make ptx` runs all of them.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from on_triton import COMPILES, HAS_CUDA, PRETENDS, needs_triton, triton_kernels

import truenorm

pytestmark = [
    needs_triton,
    pytest.mark.skipif(HAS_CUDA or PRETENDS, reason="a GPU runs them itself"),
]
ROOT = Path(__file__).parent.parent
compiles = pytest.mark.skipif(not COMPILES, reason="run by test_on_the_machine, compiled")
CHOSEN = {
    "90": ["tests/test_triton_layers.py", "tests/test_triton_compiled.py"],
    "80": ["tests/test_triton_layers.py::test_more_than_one_tile"],
}


@pytest.mark.skipif(bool(COMPILES), reason="starts what compiles")
@pytest.mark.parametrize("capability", CHOSEN)
def test_on_the_machine(capability: str) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-n0",
            "-p",
            "no:cacheprovider",
            *CHOSEN[capability],
        ],
        env=environment | {"TRUENORM_TESTS_PTX": capability},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None and int(passed.group(1)) > 20


def _without(ptx: str, instruction: str) -> list[str]:
    """The kernel without each of these instructions in turn."""
    found = [*re.finditer(rf"(?m)^\s*{re.escape(instruction)}\b[^;]*;", ptx)]
    return [ptx[: m.start()] + ptx[m.end() :] for m in found]


@compiles
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_barrier_less_is_seen(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or changes nothing: not one of these kernels with a barrier or a wait less is wrong unseen."""
    import on_ptx
    import ptx

    torch.manual_seed(0)
    seen = passed = 0
    layers: list[tuple[Any, tuple[int, ...]]] = [
        (truenorm.nn.LayerNorm(1030), (5, 1030)),
        (truenorm.nn.InstanceNorm1d(20, affine=True), (2, 20, 3000)),
        (truenorm.nn.GroupNorm(2, 6), (2, 6, 1500)),
    ]
    for layer, shape in layers:
        x = torch.randn(shape).to(dtype).requires_grad_()
        layer = layer.to(dtype)

        def results(layer: Any = layer, x: Any = x) -> list[torch.Tensor]:
            x.grad = layer.weight.grad = None
            y = layer(x)
            y.backward(torch.ones_like(y).cumsum(0))
            return [y.detach(), x.grad, layer.weight.grad]

        original = on_ptx.program_of
        broken: list[tuple[str, ptx.Program]] = []

        def collect(launch: Any, capability: int) -> Any:
            made, shared = original(launch, capability)
            broken.extend(
                (made.ptx, ptx.Program(less, made.name))
                for what in ("bar.sync", "cp.async.wait_group")
                for less in _without(made.ptx, what)
            )
            return made, shared

        with triton_kernels():
            right = results()
            monkeypatch.setattr(on_ptx, "program_of", collect)
            results()
            for whole, less in broken:

                def instead(
                    launch: Any, capability: int, whole: str = whole, less: Any = less
                ) -> Any:
                    made, shared = original(launch, capability)
                    return (less if made.ptx == whole else made), shared

                monkeypatch.setattr(on_ptx, "program_of", instead)
                try:
                    made = results()
                except ptx.PtxError:
                    seen += 1
                else:
                    passed += 1
                    assert all(torch.equal(a, b) for a, b in zip(made, right, strict=True))
        monkeypatch.setattr(on_ptx, "program_of", original)
    assert seen > 2 * passed
