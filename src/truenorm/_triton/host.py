"""The operators on CUDA tensors; the host never waits.

A few launches each, on the current stream, into memory of torch's allocator: a CUDA graph can
capture them. Launches and bytes are counted in docs/performance.md.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .host_backward import add_norm_backward, gradient_sums, norm_backward
from .host_forward import add_norm, norm, norm_, statistics
from .host_gated import gated_norm, gated_norm_backward
from .host_others import move, response, response_backward

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def serves(x: Tensor) -> bool:
    """Whether the kernels take this tensor; what they do not take is for the plain formulas."""
    return x.dtype in DTYPES and x.numel() > 0


KERNELS: dict[str, Callable[..., Any]] = {
    "norm": norm,
    "norm_": norm_,
    "norm_backward": norm_backward,
    "norm_below": norm,
    "norm_backward_below": norm_backward,
    "add_norm": add_norm,
    "add_norm_backward": add_norm_backward,
    "gated_norm": gated_norm,
    "gated_norm_backward": gated_norm_backward,
    "statistics": statistics,
    "gradient_sums": gradient_sums,
    "move_": move,
    "response": response,
    "response_backward": response_backward,
}
