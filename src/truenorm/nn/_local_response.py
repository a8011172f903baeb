"""LocalResponseNorm: the energy of neighbouring channels."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import functional
from ._base import Traceable


class LocalResponseNorm(Traceable, torch.nn.LocalResponseNorm):
    """Divide each value by a power of the energy of its neighbouring channels.

    y_c = x_c · (k + alpha / size · Σ x_j²)^−beta, over the `size` channels j from c − size // 2 on.

    Training and evaluation are the same.

    Shapes: input (N, C, *positions); output the same, in the same memory format.

    Errors: ValueError for an input of fewer than 3 dimensions; RuntimeError for a size below 1.

    Source: Krizhevsky et al. 2012. Arguments as in torch.nn.LocalResponseNorm.
    """

    def forward(self, input: Tensor) -> Tensor:
        if self._is_traced(input):
            return self._as_leaf(input)
        return functional.local_response_norm(input, self.size, self.alpha, self.beta, self.k)
