"""LayerNorm: statistics of the trailing dimensions."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import functional
from .._core import checks, eager
from .._core.call import FEATURES, Call
from .._core.in_graph import call as in_graph
from ._activation import Activated
from ._options import with_options
from ._padded import PaddedRows


@with_options
class LayerNorm(Activated, PaddedRows, torch.nn.LayerNorm):
    """Normalize over the trailing dimensions, one mean and variance for each leading index.

    y = (x − E[x]) / sqrt(Var[x] + eps) · weight + bias, weight and bias element by element.

    Training and evaluation are the same.

    Shapes: input (*, *normalized_shape); output the same; weight, bias normalized_shape.

    Errors: RuntimeError where the input's trailing shape is not normalized_shape, or a device
    differs; ValueError for a negative eps.

    Source: Ba et al. 2016, https://arxiv.org/abs/1607.06450. Arguments as in torch.nn.LayerNorm.
    """

    def _directly(self, input: Tensor, after: eager.After | None) -> Tensor | None:
        parameters, eps, shape = self._parameters, self.eps, self.normalized_shape
        try:
            weight, bias = parameters["weight"], parameters["bias"]
            if not eager.ends_in(input, shape):
                return None
        # a strided nested tensor has no sizes, and one without dimensions no last one
        except (KeyError, RuntimeError, IndexError):
            return None
        if not eps >= 0:
            return None
        form = len(shape) << FEATURES
        return eager.call(eager.OWN, input, weight, bias, form, eps, (), after)

    def _in_graph(self, input: Tensor, after: eager.After | None) -> Tensor | None:
        shape, eps = self.normalized_shape, self.eps
        if not shape or input.shape[-len(shape) :] != shape or eps < 0.0:
            return None
        form = len(shape) << FEATURES
        return in_graph(input, self.weight, self.bias, shape, form, eps, None, None, after)

    def _call(self, x: Tensor, mask: Tensor | None) -> Call:
        checks.check_eps(self.eps, "LayerNorm")
        return functional.layer_call(x, self.normalized_shape, self.weight, self.bias, self.eps)
