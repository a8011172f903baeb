"""What reaches the launchers of kernels that Triton compiles for a GPU which is not there.

Run by itself, outside of Triton's interpreter. A first step is launched by Triton, a second one by
plans; prints how many launches of each layer were given the same.
"""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)
os.environ["TRUENORM_CUDA"] = "auto"

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

import truenorm
from truenorm import _triton
from truenorm._core import eager, planned

LAUNCHED: list[Any] = []


def _launcher(src: Any, metadata: Any) -> Any:
    return lambda *args: LAUNCHED.append((metadata.name, *args))


def _pretend() -> None:
    utils = SimpleNamespace(
        get_device_properties=lambda device: {"max_shared_mem": 232448},
        load_binary=lambda *args: (object(), 11, 32, 0, 1024),
        unload_module=lambda module: None,
    )
    gpu = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 7,
        launcher_cls=_launcher,
        utils=utils,
    )
    driver.set_active(gpu)
    _triton.why_plain = lambda index: ""
    eager.NATIVE = None
    eager.fallback = SimpleNamespace(shortly=planned.call)


def _plainly(launch: Any) -> Any:
    """Without the memory, and what may be made anew for each launch."""
    *fixed, _, enter, leave = launch[:10]
    args = [
        (a.shape, a.stride(), a.dtype, a.data_ptr() % 16) if isinstance(a, torch.Tensor) else a
        for a in launch[10:]
    ]
    return fixed, enter, leave, args


def main() -> None:
    _pretend()
    for layer, shape in ((truenorm.LayerNorm(8), (4, 8)), (truenorm.BatchNorm1d(16), (8, 16))):
        x, grad, steps = torch.randn(shape, requires_grad=True), torch.randn(shape), []
        run = JITFunction.run
        for by_triton in (True, False):
            if not by_triton:
                JITFunction.run = None  # type: ignore[assignment,method-assign]
            LAUNCHED.clear()
            layer(x).backward(grad)
            steps.append([_plainly(launch) for launch in LAUNCHED])
        JITFunction.run = run  # type: ignore[method-assign]
        assert steps[0] == steps[1], steps
        print(type(layer).__name__, len(steps[0]))


if __name__ == "__main__":
    main()
