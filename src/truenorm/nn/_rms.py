"""RMSNorm: the root mean square of the trailing dimensions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import functional
from .._core import checks, eager
from .._core.call import FEATURES, UNCENTRED, Call
from .._core.geometry import RMS_EPS
from .._core.in_graph import call as in_graph
from ._activation import Activated
from ._base import Direct
from ._options import with_options
from ._padded import PaddedRows

# not by super(), whose lookup and defaults a compiler guards for each layer
_forward = Direct.forward


@with_options
class RMSNorm(Activated, PaddedRows, torch.nn.RMSNorm):
    """Divide by the root mean square over the trailing dimensions.

    y = x / sqrt(E[x²] + eps) · weight, weight element by element; eps None is the machine epsilon
    of the input's dtype, and float32's for float16 and bfloat16.

    Training and evaluation are the same.

    Shapes: input (*, *normalized_shape); output the same; weight normalized_shape.

    Errors: RuntimeError where the input's trailing shape is not normalized_shape, or a device
    differs; ValueError for a negative eps.

    Source: Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467. Arguments as in
    torch.nn.RMSNorm.
    """

    def _directly(self, input: Tensor, after: eager.After | None) -> Tensor | None:
        parameters, eps, shape = self._parameters, self.eps, self.normalized_shape
        try:
            weight = parameters["weight"]
            if not (input.is_floating_point() and eager.ends_in(input, shape)):
                return None
            if eps is None:
                eps = RMS_EPS[input.dtype]
        # a strided nested tensor has no sizes, one without dimensions no last one
        except (KeyError, RuntimeError, IndexError):
            return None
        if input.dim() > 3 and not input.is_contiguous():
            return None  # channels_last stays, which no kernel for trailing sizes writes
        if not eps >= 0:
            return None
        form = len(shape) << FEATURES | UNCENTRED
        return eager.call(eager.OWN, input, weight, None, form, eps, (), after)

    def _in_graph(self, input: Tensor, after: eager.After | None) -> Tensor | None:
        shape, eps = self.normalized_shape, self.eps
        if not (shape and input.is_floating_point()) or input.shape[-len(shape) :] != shape:
            return None
        if input.dim() > 3 and not input.is_contiguous():
            return None  # as above
        if eps is None:
            eps = RMS_EPS[input.dtype]
        if eps < 0.0:
            return None
        form = len(shape) << FEATURES | UNCENTRED
        return in_graph(input, self.weight, None, shape, form, eps, None, None, after)

    # named as torch names it
    def forward(self, x: Tensor, **more: Any) -> Any:  # type: ignore[override]
        return _forward(self, x, **more)

    def _call(self, x: Tensor, mask: Tensor | None) -> Call:
        if self.eps is not None:
            checks.check_eps(self.eps, "RMSNorm")
        return functional.rms_call(x, self.normalized_shape, self.weight, self.eps)

    def _normalized(self, call: Call) -> Tensor:
        return functional.in_torchs_memory_format(super()._normalized(call), call.x)
