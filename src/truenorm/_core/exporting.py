"""Asking for torch's own operators, in files that are to run without truenorm."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.jit._trace import TracerWarning

from . import imports

_asked = False
_compiler = torch.compiler


def is_exporting() -> bool:
    """torch.compiler.is_exporting, which torch 2.11 takes for True in whatever it compiles."""
    return _compiler._is_exporting_flag


# asked of torch while it compiles, not read by the compiler, which would guard what it reads
imports.constant_in_graphs("whether a graph is exported", is_exporting)


@contextmanager
def standard_ops() -> Iterator[None]:
    """Within it `torch.export` and `make_fx` write torch's own operators instead of truenorm's.

    The exported program, and what AOTInductor makes of it, then runs where truenorm is not
    installed, on torch's kernels: within their rounding of truenorm's, not bit for bit the same.
    `torch.onnx.export` does so without being asked, as ONNX knows no others, and so does
    `torch.jit.trace`, whose files are read where no Python is.
    """
    global _asked
    before, _asked = _asked, True
    try:
        yield
    finally:
        _asked = before


def wanted() -> bool:
    """Whether the call is exported to such a file."""
    if is_exporting():
        return _asked or torch.onnx.is_in_onnx_export()
    return _asked and not torch.compiler.is_compiling() and get_proxy_mode() is not None


# What asks for shapes is no part of a trace, as torch says of its own checks in the same way.
warnings.filterwarnings("ignore", category=TracerWarning, module="truenorm")
