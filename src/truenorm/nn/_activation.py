"""An activation and a residual as part of a layer: y = act(norm(x) + residual)."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _checks
from ._options import Configurable, More, Option

Activation = Literal["relu", "leaky_relu", "elu", "gelu", "silu", "hardswish"]


class Activated(Configurable):
    """A layer that takes a residual, and ends with an activation; mixed in before all others.

    Both are torch's operators after the layer's own, so what a path can do without them
    (compile, vmap, export, second derivatives) it can do with them.
    """

    activation: Activation | None = None
    negative_slope: float = 0.01
    alpha: float = 1.0
    approximate: Literal["none", "tanh"] = "none"
    _own_options: ClassVar[dict[str, Option | None]] = {
        "activation": Option(None, _checks.check_activation),
        "negative_slope": Option(0.01, _checks.check_coefficient("negative_slope", "leaky_relu")),
        "alpha": Option(1.0, _checks.check_coefficient("alpha", "elu")),
        "approximate": Option("none", _checks.check_approximate),
    }

    def _long_way(self, input: Tensor, more: More) -> Tensor:
        layer: Any = super()
        residual = more.residual
        if self.activation is None and residual is None:
            return layer._long_way(input, more)  # type: ignore[no-any-return]
        if residual is not None:
            _checks.check_residual(residual, input)
        _checks.check_padding_value(more.padding_value)
        y: Tensor = layer._long_way(input, more._replace(residual=None, padding_value=0.0))
        if more.mask is None and more.lengths is None:
            z = y if residual is None else y + residual
            if not z.is_nested:
                return self._activate(z)
            # nested tensors do not have every activation; their values do
            act, offsets = self._activate(z.values()), z.offsets()  # type: ignore[attr-defined]
            return torch.nested.nested_tensor_from_jagged(act, offsets)
        valid: Tensor = layer._valid(input, more)
        if residual is not None:
            # what is padded may be NaN, whose gradient would be too
            y = y + torch.where(valid, residual, 0.0)
        return torch.where(valid, self._activate(y), more.padding_value)

    def _activate(self, z: Tensor) -> Tensor:
        match self.activation:
            case "relu":
                return F.relu(z)
            case "leaky_relu":
                return F.leaky_relu(z, self.negative_slope)
            case "elu":
                return F.elu(z, self.alpha)
            case "gelu":
                return F.gelu(z, approximate=self.approximate)
            case "silu":
                return F.silu(z)
            case "hardswish":
                return F.hardswish(z)
        return z
