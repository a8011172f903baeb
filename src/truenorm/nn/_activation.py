"""An activation and a residual as part of a layer: y = act(norm(x) + residual)."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from .. import _checks
from .._ops import activated, activation
from .._ops.activation import Epilogue
from ._base import Spanning
from ._options import NOTHING, Activation, Configurable, More, Option
from ._padded import Padded
from ._policy import Policed


class Activated(Configurable):
    """A layer that takes a residual, and ends with an activation; mixed in before all others.

    One pass does all of it where there is a kernel for that. Elsewhere both are torch's operators
    after the layer's own, so what a path can do without them (vmap, export, masks, processes) it
    can do with them.
    """

    activation: Activation | None
    leaky_relu_slope: float
    elu_alpha: float
    gelu_approximate: Literal["none", "tanh"]
    overwrite_input: bool
    _own_options: ClassVar[dict[str, Option | None]] = {
        "activation": Option(None, _checks.check_activation),
        "leaky_relu_slope": Option(
            0.01, _checks.check_coefficient("leaky_relu_slope", "leaky_relu")
        ),
        "elu_alpha": Option(1.0, _checks.check_coefficient("elu_alpha", "elu")),
        "gelu_approximate": Option("none", _checks.check_gelu_approximate),
        "overwrite_input": Option(False, _checks.check_flag("overwrite_input")),
    }

    def _long_way(self, input: Tensor, more: More) -> Tensor:
        layer: Any = super()
        residual, overwrite = more.residual, self._truenorm_options.overwrite_input
        act = self._act() if more.then is None else more.then
        if not act[0] and residual is None and not overwrite:
            return layer._long_way(input, more)  # type: ignore[no-any-return]
        # what `fuse` has found may add whatever torch adds
        if residual is not None and more.then is None:
            _checks.check_residual(residual, input)
        if overwrite:
            _checks.check_may_be_overwritten(input)
        _checks.check_padding_value(more.padding_value)
        if self._in_one_pass(input, more):
            after = Epilogue(*act, residual, overwrite)
            return layer._long_way(input, NOTHING._replace(after=after))  # type: ignore[no-any-return]
        y: Tensor = layer._long_way(
            input, more._replace(residual=None, then=None, padding_value=0.0)
        )
        if more.mask is None and more.lengths is None:
            z = y if residual is None else y + residual
            if not z.is_nested:
                return activation.act(z, *act)
            # nested tensors do not have every activation; their values do
            values, offsets = z.values(), z.offsets()  # type: ignore[attr-defined]
            return torch.nested.nested_tensor_from_jagged(activation.act(values, *act), offsets)
        valid: Tensor = layer._valid(input, more)
        if residual is not None:
            # what is padded may be NaN, whose gradient would be too
            y = y + torch.where(valid, residual, 0.0)
        return torch.where(valid, activation.act(y, *act), more.padding_value)

    def _in_one_pass(self, input: Tensor, more: More) -> bool:
        layer: Any = self
        if more.mask is not None or more.lengths is not None:
            return False
        if more.residual is not None:
            if not isinstance(more.residual, Tensor) or more.residual.shape != input.shape:
                return False
            # the residual would have to be moved as the input is
            if isinstance(self, Padded) and self._truenorm_options.channel_axis != 1:
                return False
        bias = getattr(self, "bias", None)
        if not activated.serves(input, more.residual, layer.weight, bias):
            return False
        if isinstance(self, Spanning) and self._statistics_group() is not None:
            return False
        own = isinstance(self, Policed) and self._statistics_are_own()
        return not (own and layer._has_policy())

    def _act(self) -> tuple[int, float]:
        """The activation's number, and its parameter."""
        options = self._truenorm_options
        match options.activation:
            case "leaky_relu":
                return activation.LEAKY_RELU, options.leaky_relu_slope
            case "elu":
                return activation.ELU, options.elu_alpha
            case "gelu" if options.gelu_approximate == "tanh":
                return activation.GELU_TANH, 0.0
            case None:
                return activation.NONE, 0.0
        return _NUMBERS[options.activation], 0.0

    def _activate(self, z: Tensor) -> Tensor:
        return activation.act(z, *self._act())


_NUMBERS = {
    "relu": activation.RELU,
    "relu6": activation.RELU6,
    "hardswish": activation.HARDSWISH,
    "silu": activation.SILU,
    "gelu": activation.GELU,
}
