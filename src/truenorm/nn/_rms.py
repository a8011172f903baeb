"""RMSNorm: the root mean square of the trailing dimensions."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks, functional
from ._base import Traceable


class RMSNorm(Traceable, torch.nn.RMSNorm):
    """Divide by the root mean square over the trailing dimensions.

    y = x / sqrt(E[x²] + eps) · weight, weight element by element; eps None is
    torch.finfo(input.dtype).eps.

    Training and evaluation are the same.

    Shapes: input (*, *normalized_shape); output the same; weight normalized_shape.

    Errors: RuntimeError where the input's trailing shape is not normalized_shape, or a device
    differs; ValueError for a negative eps.

    Source: Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467. Arguments as in
    torch.nn.RMSNorm.
    """

    def forward(self, x: Tensor) -> Tensor:
        if self._is_traced(x):
            return self._as_leaf(x)
        if self.eps is not None:
            _checks.check_eps(self.eps, "RMSNorm")
        return functional.rms_norm(x, self.normalized_shape, self.weight, self.eps)
