"""LayerNorm: statistics of the trailing dimensions."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks, functional
from ._base import Traceable


class LayerNorm(Traceable, torch.nn.LayerNorm):
    """Normalize over the trailing dimensions, one mean and variance for each leading index.

    y = (x − E[x]) / sqrt(Var[x] + eps) · weight + bias, weight and bias element by element.

    Training and evaluation are the same.

    Shapes: input (*, *normalized_shape); output the same; weight, bias normalized_shape.

    Errors: RuntimeError where the input's trailing shape is not normalized_shape, or a device
    differs; ValueError for a negative eps.

    Source: Ba et al. 2016, https://arxiv.org/abs/1607.06450. Arguments as in torch.nn.LayerNorm.
    """

    def forward(self, input: Tensor) -> Tensor:
        if self._is_traced(input):
            return self._as_leaf(input)
        _checks.check_eps(self.eps, "LayerNorm")
        return functional.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)
