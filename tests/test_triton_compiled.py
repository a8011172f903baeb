"""The Triton kernels as they are compiled for a GPU, on a machine without one: see tools/on_ptx.py.

Triton's interpreter knows no threads: this is where a barrier that lacks, a value in the wrong lane
or a product that was fused would be seen. Some of the other files' tests run in a process of their
own, since Triton either compiles or interprets; `make ptx` runs all of them.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from on_triton import COMPILES, HAS_CUDA, PRETENDS, needs_triton, small_tiles, triton_kernels
from tolerances import assert_output
from torch.torch_version import TorchVersion

import truenorm

pytestmark = [
    needs_triton,
    pytest.mark.skipif(HAS_CUDA or PRETENDS, reason="a GPU runs them itself"),
]
ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "tools"))
compiles = pytest.mark.skipif(not COMPILES, reason="run by test_on_the_machine, compiled")
# passes of shared memory that take an H100 as long as a KiB of memory does
LEVEL = 71
CHOSEN = {
    "90": ["tests/test_triton_layers.py", "tests/test_triton_compiled.py"],
    "80": ["tests/test_triton_layers.py::test_more_than_one_tile"],
}


@pytest.mark.skipif(bool(COMPILES), reason="starts what compiles")
@pytest.mark.parametrize("capability", CHOSEN)
def test_on_the_machine(capability: str) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-n0", "-p", "no:cacheprovider", *CHOSEN[capability]],
        env=environment | {"TRUENORM_TESTS_PTX": capability},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed.group(1)) >= 20


@compiles
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", ["InstanceNorm, channels_last small", "LayerNorm of an image"])
def test_sectors_are_whole(case: str, dtype: torch.dtype) -> None:
    """Each byte of x is read and written once, in sectors that its program asks for whole."""
    import triton_resources
    import triton_traffic

    axes, shape, lay = next(each[1:] for each in triton_traffic.CASES if each[0] == case)
    run = triton_resources.passes(axes, shape, dtype, lay, device="cpu")
    size = dtype.itemsize * torch.Size(shape).numel()
    forward, backward = triton_traffic.moved(run, size, COMPILES)[:2]
    assert (forward.kernel, backward.kernel) == ("forward", "backward")
    assert forward.read == pytest.approx(1, abs=0.3)
    assert backward.read == pytest.approx(2, abs=0.3)
    for each in (forward, backward):
        assert each.written == pytest.approx(1, abs=0.3)
        assert each.by_programs == (1.0, 1.0)
        assert each.passes_a_kib < LEVEL / 2
        # older compilers lay tiles out in shared memory so that some lanes meet
        assert each.passes < 1.3 or TorchVersion(version("triton")) < (3, 8)


@compiles
@pytest.mark.parametrize(
    ("case", "shape", "dtype", "kernel"),
    [
        # of warps that share a channel's values
        ("InstanceNorm, channels_last", (1, 64, 64, 64), torch.bfloat16, "moments"),
        # of what is copied ahead value by value
        ("BatchNorm", (64, 64, 7, 7), torch.float32, "normalize"),
    ],
)
def test_shared_memory_is_no_bound(
    case: str, shape: tuple[int, ...], dtype: torch.dtype, kernel: str
) -> None:
    import triton_resources
    import triton_traffic

    axes, lay = next(
        (axes, lay)
        for name, axes, *rest, lay in triton_traffic.CASES
        if (name, *rest) == (case, shape)
    )
    run = triton_resources.passes(axes, shape, dtype, lay, device="cpu")
    size = dtype.itemsize * torch.Size(shape).numel()
    found = [m for m in triton_traffic.moved(run, size, COMPILES) if m.kernel == kernel]
    assert found
    for each in found:
        assert each.passes_a_kib < LEVEL / 2


@compiles
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moments_under_a_mask_in_channels_last(dtype: torch.dtype) -> None:
    """In chunks; what is valid is counted in integers, which a compiler tells from floats."""
    x = (torch.randn(2, 70, 23, 9) + 3).to(dtype).to(memory_format=torch.channels_last)
    mask = torch.rand(2, 23, 9) < 0.7
    with small_tiles(forward=0), triton_kernels():
        y = truenorm.functional.instance_norm(x, mask=mask)
    wide, valid = x.double(), mask[:, None]
    count = valid.sum((2, 3), keepdim=True)
    off = (wide - (wide * valid).sum((2, 3), keepdim=True) / count) * valid
    exact = off / (off.square().sum((2, 3), keepdim=True) / count + 1e-5).sqrt()
    assert_output(y, exact)


def _without(ptx: str, instruction: str) -> list[str]:
    """The kernel without each of these instructions in turn."""
    found = [*re.finditer(rf"(?m)^\s*{re.escape(instruction)}\b[^;]*;", ptx)]
    return [ptx[: m.start()] + ptx[m.end() :] for m in found]


@compiles
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (truenorm.nn.LayerNorm(1030), (5, 1030)),
        (truenorm.nn.InstanceNorm1d(20, affine=True), (2, 20, 3000)),
        (truenorm.nn.GroupNorm(2, 6), (2, 6, 1500)),
    ],
    ids=lambda each: type(each).__name__,
)
def test_a_barrier_less_is_seen(layer: Any, shape: Any, dtype: torch.dtype) -> None:
    """Each barrier, and each wait for a copy, is taken out in turn: that is told, or it changes
    nothing.
    """
    import on_ptx
    import ptx

    layer, x = layer.to(dtype), torch.randn(shape).to(dtype).requires_grad_()
    grad = torch.randn(shape).to(dtype)

    def results() -> list[torch.Tensor]:
        x.grad = layer.weight.grad = None
        y = layer(x)
        y.backward(grad)
        return [y.detach(), x.grad, layer.weight.grad]

    on_ptx.PROGRAMS.clear()
    told = changes_nothing = 0
    with triton_kernels():
        right = results()
        kernels = [made for made, _ in on_ptx.PROGRAMS.values()]
        for kernel in kernels:
            for what in ("bar.sync", "cp.async.wait_group"):
                for less in _without(kernel.ptx, what):
                    on_ptx.INSTEAD[kernel.ptx] = ptx.Program(less, kernel.name)
                    try:
                        made = results()
                    except ptx.PtxError:
                        told += 1
                    else:
                        changes_nothing += 1
                        assert all(torch.equal(a, b) for a, b in zip(made, right, strict=True))
                    finally:
                        on_ptx.INSTEAD.clear()
    # the others stand in branches that are not taken, or beside another one
    assert told > changes_nothing
