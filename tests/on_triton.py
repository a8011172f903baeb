"""Layers on the Triton kernels: on the GPU where there is one, else in Triton's interpreter.

`DEVICE` is where tensors must be; with TRUENORM_TESTS_PRETEND=1 a GPU that is pretended, which
shows what in these tests would fail on a real one. With TRUENORM_TESTS_PTX=90 kernels are compiled
for that compute capability, and what came out is run (tools/on_ptx.py). `triton_kernels()` routes
truenorm's operators to the kernels while it is open, on a CPU, whose own kernels would otherwise
serve them. `small_tiles()` cuts small cases into as many tiles, chunks and programs as large ones.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch._dynamo
from torch.utils._python_dispatch import TorchDispatchMode

import truenorm
from truenorm import _triton
from truenorm._core import by_plan, eager, operators, planned, route
from truenorm._triton import config

HAS_CUDA = torch.cuda.is_available()
HAS_TRITON = importlib.util.find_spec("triton") is not None
PRETENDS = os.environ.get("TRUENORM_TESTS_PRETEND") == "1" and not HAS_CUDA
COMPILES = 0 if HAS_CUDA else int(os.environ.get("TRUENORM_TESTS_PTX", "0"))
DEVICE = torch.device("cuda" if HAS_CUDA else "cpu")
if PRETENDS:
    from pretended import DEVICE, held

if os.environ.get("FAIL_WITHOUT_CUDA") == "1" and not HAS_CUDA:
    raise RuntimeError("FAIL_WITHOUT_CUDA=1, and torch sees no CUDA device on this machine")

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
needs_gpu = pytest.mark.skipif(not (HAS_CUDA or PRETENDS), reason="needs a GPU, or one pretended")
in_the_interpreter = pytest.mark.skipif(
    not HAS_TRITON or HAS_CUDA or PRETENDS or bool(COMPILES), reason="runs in Triton's interpreter"
)
needs_cuda = pytest.mark.skipif(not HAS_CUDA, reason="needs a CUDA device")


def _round_to_nearest() -> None:
    """Triton's interpreter cuts float32 off to bfloat16, where a GPU rounds to the nearest even."""
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cut_off = InterpreterBuilder.cast_impl

    def cast(self: Any, src: Any, dst_type: Any) -> Any:
        if src.dtype.scalar != tl.float32 or dst_type.scalar != tl.bfloat16:
            return cut_off(self, src, dst_type)
        bits = np.ascontiguousarray(src.data, dtype=np.float32).view(np.uint32)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        values = np.where(np.isnan(src.data), 0x7FC0, rounded).astype(np.uint16)
        return TensorHandle(values, dst_type.scalar)

    InterpreterBuilder.cast_impl = cast


def _round_once() -> None:
    """Triton's interpreter rounds a fused operation's product too, a GPU the sum alone."""
    import numpy as np
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        kind = x.data.dtype
        wide = np.longdouble if kind == np.float64 else np.float64
        exact = x.data.astype(wide) * y.data.astype(wide) + z.data.astype(wide)
        return TensorHandle(exact.astype(kind), x.dtype.scalar)

    InterpreterBuilder.create_fma = fma


if HAS_TRITON and not HAS_CUDA and not COMPILES:
    _round_to_nearest()
    _round_once()


class _Routed(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.kernels = {
            getattr(torch.ops.truenorm, name).default: _triton.serving(name, plain)
            for name, plain in operators.PLAIN.items()
        }
        self.served = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kernel = self.kernels.get(func)
        self.served += kernel is not None
        return (kernel or func)(*args, **(kwargs or {}))


@contextmanager
def launches() -> Iterator[None]:
    """Kernels are given what is as aligned as torch's allocator makes it: what Triton compiles for
    anything else adds up in another order.
    """
    if HAS_CUDA:
        yield
        return
    if COMPILES:
        sys.path.append(str(Path(__file__).parent.parent / "tools"))
        from on_ptx import compiled

        with compiled(COMPILES):
            yield
        return
    import numpy as np
    from triton.runtime.interpreter import GridExecutor

    launch = GridExecutor.__call__

    def checked(self: Any, *args: Any, **kwargs: Any) -> None:
        given = {**dict(zip(self.arg_names, args, strict=False)), **kwargs}
        for name, value in given.items():
            # running statistics are the layer's own, wherever they lie, and not added up
            if isinstance(value, torch.Tensor) and self.fn.__name__ != "move":
                assert value.data_ptr() % 16 == 0, (self.fn.__name__, name)
        if PRETENDS:
            for name, value in given.items():
                assert not isinstance(value, torch.Tensor) or value.device == DEVICE, name
            args = tuple(map(held, args))
        # numpy warns of what a GPU computes in silence: Inf and NaN, the lanes outside a mask
        with np.errstate(all="ignore"):
            launch(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GridExecutor, "__call__", checked)
        yield


@contextmanager
def triton_kernels() -> Iterator[None]:
    """truenorm's operators run the Triton kernels, and did so at least once.

    torch._dynamo is imported above: it marks `why_plain` as it finds it, and not as it is here.
    """
    if HAS_CUDA:
        assert truenorm.info().cuda == "triton"
        config.CALLS.clear()
        yield
        return
    with pytest.MonkeyPatch.context() as patch, launches(), _Routed() as mode:
        patch.setattr(_triton, "why_plain", lambda index: "")
        # a pretended device has them too
        patch.setattr(route, "lacks_kernel", lambda x: False)
        _take_the_short_way(patch, mode)
        yield
    assert mode.served


def _take_the_short_way(patch: pytest.MonkeyPatch, mode: _Routed) -> None:
    """That of CUDA tensors, where no other mode than this one is at work."""
    modes = torch._C._len_torch_dispatch_stack

    def call(*args: Any) -> Any:
        y = planned.call(*args)
        mode.served += y is not None
        return y

    served = by_plan.operator

    def operator(*args: Any) -> Any:
        made = served(*args)
        mode.served += made is not None
        return made

    patch.setattr(by_plan, "operator", operator)
    patch.setattr(by_plan, "serves", lambda x: modes() == 1)
    patch.setattr(eager, "NATIVE", None)
    patch.setattr(eager, "fallback", SimpleNamespace(shortly=call))
    for module in (eager, planned):
        patch.setattr(module, "_dispatch_modes", lambda: modes() - 1)
    # what is remembered is of this machine's tensors, and of these tiles
    config.CALLS.clear()


@contextmanager
def plans() -> Iterator[list[int]]:
    """How many steps each plan takes, in the order of calls."""
    from truenorm._triton import replay

    counts: list[int] = []
    make = replay.Plan.__call__

    def counted(self: Any, *given: Any) -> Any:
        counts.append(len(self.steps))
        return make(self, *given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replay.Plan, "__call__", counted)
        yield counts


@contextmanager
def small_tiles(**limits: int) -> Iterator[None]:
    """No statistic fits on chip, and a chunk is two small tiles; or what `limits` say."""
    before = config.LIMITS
    small = {"forward": 0, "backward": 0, "tile": 256, "steps": 2, "sector": 8, "per_thread": 8}
    config.LIMITS = dataclasses.replace(before, **(limits or small))
    config.CALLS.clear()
    try:
        yield
    finally:
        config.LIMITS = before
        config.CALLS.clear()


on_a_cpu = pytest.mark.skipif(HAS_CUDA or PRETENDS, reason="takes a CPU for a GPU")


@contextmanager
def taken_for_a_gpu(monkeypatch: pytest.MonkeyPatch, *operator: str) -> Iterator[list[str]]:
    """These operators' kernels for a CPU's tensors; the names of what was called.

    No mode is open, as it is within `triton_kernels()`: such calls go the composed way.
    """
    names: list[str] = []
    library = torch.library.Library("truenorm", "IMPL")
    for name in operator:
        serve = _triton.serving(name, operators.PLAIN[name])

        def noted(*args: Any, name: str = name, serve: Any = serve) -> Any:
            names.append(name)
            return serve(*args)

        library.impl(name, operators.defined.checked(name, noted), "CPU")
    served = by_plan.operator

    def planned_too(name: str, *args: Any) -> Any:
        made = served(name, *args) if name in operator else None
        if made is not None:
            names.append(name)
        return made

    config.CALLS.clear()
    with monkeypatch.context() as patch, launches():
        patch.setattr(_triton, "why_plain", lambda index: "")
        patch.setattr(by_plan, "operator", planned_too)
        try:
            yield names
        finally:
            library._destroy()
            config.CALLS.clear()
