"""Layers on the Triton kernels: on the GPU where there is one, else in Triton's interpreter.

`device()` says where tensors must be, `triton_kernels()` routes truenorm's operators to the kernels
while it is open: on the CPU, whose own kernels would otherwise serve them.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

HAS_CUDA = torch.cuda.is_available()
HAS_TRITON = importlib.util.find_spec("triton") is not None
DEVICE = torch.device("cuda" if HAS_CUDA else "cpu")

if os.environ.get("FAIL_WITHOUT_CUDA") == "1" and not HAS_CUDA:
    raise RuntimeError("FAIL_WITHOUT_CUDA=1, and torch sees no CUDA device on this machine")

# conftest.py has asked for the interpreter where there is no GPU
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")


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


if HAS_TRITON and not HAS_CUDA:
    _round_to_nearest()


class _Routed(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        from truenorm._triton import host

        self.kernels = {
            getattr(torch.ops.truenorm, name).default: kernel
            for name, kernel in host.KERNELS.items()
        }

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return self.kernels.get(func, func)(*args, **(kwargs or {}))


@contextmanager
def triton_kernels() -> Iterator[None]:
    """truenorm's operators run the Triton kernels. On a GPU they do so by themselves."""
    if HAS_CUDA:
        yield
        return
    with _Routed():
        yield
