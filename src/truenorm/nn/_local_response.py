"""LocalResponseNorm: the energy of neighbouring channels."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from .. import functional
from .._core import checks
from ._base import Traceable
from ._options import Configurable, Option, with_options
from ._padded import Padded


@with_options
class LocalResponseNorm(Traceable, Configurable, torch.nn.LocalResponseNorm):
    """Divide each value by a power of the energy of its neighbouring channels.

    y_c = x_c · (k + alpha / size · Σ x_j²)^−beta, over the `size` channels j from c − size // 2 on.

    Training and evaluation are the same.

    Shapes: input (N, C, *positions); output the same, in the same memory format.

    Errors: ValueError for an input of fewer than 3 dimensions; RuntimeError for a size below 1.

    Source: Krizhevsky et al. 2012. Arguments as in torch.nn.LocalResponseNorm, and `channel_axis`:
    the input's dimension of the channels.
    """

    channel_axis: int
    _own_options: ClassVar[dict[str, Option | None]] = dict(Padded._own_options)

    def forward(self, input: Tensor) -> Tensor:
        if self._is_traced(input):
            return self._as_leaf(input)
        axis = self._truenorm_options.channel_axis
        if axis != 1:
            checks.check_tensor("input", input)
            checks.check_channel_axis_fits(axis, input.dim())
            axis %= input.dim()
            return self._normalized(input.movedim(axis, 1)).movedim(1, axis)
        return self._normalized(input)

    def _normalized(self, input: Tensor) -> Tensor:
        return functional.local_response_norm(input, self.size, self.alpha, self.beta, self.k)
