"""torch's own operators in the place of truenorm's, in files that are to run without truenorm."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

_asked = False


@contextmanager
def standard_ops() -> Iterator[None]:
    """Within it `torch.export` writes torch's own operators in the place of truenorm's.

    The exported program, and what AOTInductor makes of it, then runs where truenorm is not
    installed, on torch's kernels: within their rounding of truenorm's, not bit for bit the same.
    `torch.onnx.export(…, dynamo=True)` does so without being asked, as ONNX knows no others.
    """
    global _asked
    before, _asked = _asked, True
    try:
        yield
    finally:
        _asked = before


def wanted() -> bool:
    """Whether the call is traced for such a file."""
    return torch.compiler.is_exporting() and (_asked or torch.onnx.is_in_onnx_export())


def fixed(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """By given statistics, one per channel: BatchNorm in evaluation, and InstanceNorm too.

    torch takes half precision parameters only with statistics of their dtype.
    """
    if weight is not None and weight.dtype != mean.dtype:
        mean, var = mean.to(weight.dtype), var.to(weight.dtype)
    return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)


def batch(
    x: Tensor,
    running: tuple[Tensor | None, Tensor | None, Tensor | None],
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float,
    eps: float,
) -> Tensor:
    """By the batch's own; running: mean, variance, and the number of batches."""
    mean, var, count = running
    if mean is not None and count is not None:
        count.add_(1)
    return F.batch_norm(x, mean, var, weight, bias, True, momentum, eps)


def instance(
    x: Tensor,
    running: tuple[Tensor | None, Tensor | None],
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float,
    eps: float,
) -> Tensor:
    """By each sample's own."""
    return F.instance_norm(x, *running, weight, bias, True, momentum, eps)


def group(x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    return F.group_norm(x, groups, weight, bias, eps)


def layer(
    x: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    return F.layer_norm(x, list(shape), weight, bias, eps)


def rms(x: Tensor, shape: Sequence[int], weight: Tensor | None, eps: float) -> Tensor:
    return F.rms_norm(x, list(shape), weight, eps)


def response(x: Tensor, size: int, alpha: float, beta: float, k: float) -> Tensor:
    return F.local_response_norm(x, size, alpha, beta, k)
