"""An activation and a residual as part of a layer: y = act(norm(x) + residual)."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from .. import functional
from .._core import activation, checks
from .._core.call import Call
from ._base import Arranged, Direct
from ._options import Activation, Option

Modulation = tuple[Tensor | None, Tensor | None]  # scale and shift


class Activated(Direct):
    """A layer that takes a residual, and ends with an activation; mixed in before all others."""

    activation: Activation | None
    leaky_relu_slope: float
    elu_alpha: float
    gelu_approximate: Literal["none", "tanh"]
    overwrite_input: bool
    _own_options: ClassVar[dict[str, Option | None]] = {
        "activation": Option(None, checks.check_activation),
        "leaky_relu_slope": Option(
            0.01, checks.check_coefficient("leaky_relu_slope", "leaky_relu")
        ),
        "elu_alpha": Option(1.0, checks.check_coefficient("elu_alpha", "elu")),
        "gelu_approximate": Option("none", checks.check_gelu_approximate),
        "overwrite_input": Option(False, checks.check_flag("overwrite_input")),
    }
    _asked_by_short_way = Direct._asked_by_short_way | (_own_options.keys() - {"overwrite_input"})

    def _long_way(
        self,
        input: Tensor,
        mask: Tensor | None,
        lengths: Tensor | None,
        padding_value: float,
        residual: Tensor | None = None,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        then: tuple[int, float] | None = None,
    ) -> Tensor:
        act = self._act() if then is None else then
        overwrite = self._truenorm_options.overwrite_input
        # what `fuse` has found may add whatever torch adds
        if residual is not None and then is None:
            checks.check_residual(residual, input)
        if overwrite:
            checks.check_may_be_overwritten(input)
        if act[0] or residual is not None or overwrite:
            checks.check_padding_value(padding_value)
        if isinstance(input, Tensor) and input.is_nested:
            checks.check_no_modulation(scale, shift)
            return self._nested(input, mask is not None or lengths is not None, residual, act)
        if residual is not None and not _fits(residual, input):
            padded = mask, lengths, padding_value
            return self._composed(input, padded, residual, act, (scale, shift))
        beside = mask, lengths, padding_value, residual, act, overwrite, (scale, shift)
        call, at = self._prepared(input, *beside)
        return at.back(self._normalized(call))

    def _prepared(
        self,
        input: Tensor,
        mask: Tensor | None = None,
        lengths: Tensor | None = None,
        padding_value: float = 0.0,
        residual: Tensor | None = None,
        act: tuple[int, float] | None = None,
        inplace: bool = False,
        modulation: Modulation = (None, None),
    ) -> tuple[Call, Arranged]:
        """The whole call, checked, and how its output comes back to lie as the input does."""
        at = self._arranged(input, mask, lengths, padding_value)
        call = self._call(at.x, at.mask)
        if residual is not None:
            residual = at.move(residual).reshape(call.x.shape)
        number, parameter = self._act() if act is None else act
        form = call.form._replace(act=number, parameter=parameter, padding=padding_value)
        call = call._replace(form=form, mask=at.mask, residual=residual, inplace=inplace)
        # compared with one, a tuple compares what it holds: of a tensor that makes another tensor
        if modulation[0] is not None or modulation[1] is not None:
            call = _modulated(call, at, modulation)
        return call, at

    def _composed(
        self, input: Tensor, padded: tuple[Any, ...], residual: Tensor, act: tuple[int, float],
        modulation: Modulation,
    ) -> Tensor:  # fmt: skip
        """The residual and the activation after y, as torch adds what is not like it."""
        mask, lengths, padding_value = padded
        nothing = None, (activation.NONE, 0.0)
        call, at = self._prepared(input, mask, lengths, 0.0, *nothing, False, modulation)
        y = at.back(self._normalized(call))
        if at.valid is None:
            return activation.act(y + residual, *act)
        valid = at.back(at.valid)
        # what is padded may be NaN, whose gradient would be too
        z = y + torch.where(valid, residual, 0.0)
        return torch.where(valid, activation.act(z, *act), padding_value)

    def _nested(self, input: Any, masked: bool, residual: Any, act: tuple[int, float]) -> Tensor:
        y: Any = self._of_nested(input, masked)
        z = y if residual is None else y + residual
        if not act[0] or not z.is_nested:
            return activation.act(z, *act)
        # nested tensors do not have every activation; their values do
        return torch.nested.nested_tensor_from_jagged(
            activation.act(z.values(), *act), z.offsets(), z.lengths(), jagged_dim=z._ragged_idx
        )

    def _act(self) -> tuple[int, float]:
        options = self._truenorm_options
        # small inputs notice each comparison
        if (found := _BY_NAME.get(options.activation)) is not None:
            return found
        match options.activation:
            case "leaky_relu":
                return activation.LEAKY_RELU, options.leaky_relu_slope
            case "elu":
                return activation.ELU, options.elu_alpha
        by_tanh = options.gelu_approximate == "tanh"
        return (activation.GELU_TANH if by_tanh else activation.GELU), 0.0


def _modulated(call: Call, at: Arranged, given: Modulation) -> Call:
    """The call with its scale and shift, as its input lies."""

    def moved(t: Any) -> Any:
        if not (isinstance(t, Tensor) and t.dim() + at.unbatched == at.x.dim()):
            return t
        t = at.move(t)
        # of the batch that the layer has made
        return t.unsqueeze(0) if t.dim() < call.x.dim() else t

    return functional.modulated(call, *map(moved, given))


def _fits(residual: Any, input: Tensor) -> bool:
    """Whether a kernel can add it: under autocast, say, torch promotes one of the two."""
    return (
        isinstance(residual, Tensor)
        and residual.shape == input.shape
        and residual.dtype == input.dtype
        and residual.layout == input.layout
    )


# those that no other option has a say in
_BY_NAME: dict[str | None, tuple[int, float]] = {
    None: (activation.NONE, 0.0),
    "relu": (activation.RELU, 0.0),
    "relu6": (activation.RELU6, 0.0),
    "hardswish": (activation.HARDSWISH, 0.0),
    "silu": (activation.SILU, 0.0),
}
