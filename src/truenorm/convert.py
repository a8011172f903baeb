"""Swapping torch's normalization layers for truenorm's in a whole model, and back.

truenorm's layers hold exactly the state of torch's, so a swap changes the class of each layer in
place: parameters, buffers, hooks, training flags, sharing and identity stay as they are, and an
optimizer goes on working.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch.nn import Module
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils import parametrize

from . import _checks, nn

_TO_TRUENORM: dict[type[Module], type[Module]] = {
    getattr(torch.nn, name): getattr(nn, name) for name in nn.__all__
}
_TO_TORCH = {ours: theirs for theirs, ours in _TO_TRUENORM.items()}

_HALF = (torch.float16, torch.bfloat16)

M = TypeVar("M", bound=Module)


def _swap(model: Module, classes: dict[type[Module], type[Module]]) -> list[Module]:
    """Swap classes below `model`; the layers that were swapped."""
    _checks.check_module("model", model)
    swapped = []
    for module in model.modules():
        kind = type(module)
        if kind in classes:
            module.__class__ = classes[kind]
            swapped.append(module)
        elif parametrize.is_parametrized(module) and kind.__bases__[0] in classes:
            # torch gives each parametrized layer a class of its own, derived from the layer's
            kind.__bases__ = (classes[kind.__bases__[0]],)
            swapped.append(module)
    return swapped


def convert(model: M, *, only: tuple[type[Module], ...] | None = None) -> M:
    """Make every torch normalization layer of `model` truenorm's, in place, and return the model.

    Layers whose class is exactly torch's are swapped, nested and shared ones too; subclasses of
    them keep their own forward and are left alone. Nothing else changes: the parameters are the
    same objects, `state_dict` has the same keys, hooks and flags stay.

    only: torch classes to swap; None for all of them.

    Errors: TypeError where `model` is no module, ValueError for a class in `only` that has no
    counterpart; the model is unchanged.
    """
    classes = _TO_TRUENORM
    if only is not None:
        for kind in only:
            if kind not in _TO_TRUENORM:
                known = ", ".join(sorted(k.__name__ for k in _TO_TRUENORM))
                raise ValueError(
                    f"`only` names {getattr(kind, '__name__', kind)!r}, which is none of "
                    f"torch.nn's normalization layers: choose from {known}"
                )
        classes = {kind: _TO_TRUENORM[kind] for kind in only}
    _swap(model, classes)
    return model


def revert(model: M) -> M:
    """Make every truenorm layer of `model` torch's again, in place: the inverse of `convert`.

    A layer whose parameters are in half precision has its running statistics cast to their dtype:
    truenorm keeps those in float32, and torch refuses the mixture.

    Errors: TypeError where `model` is no module.
    """
    for module in _swap(model, _TO_TORCH):
        weight = getattr(module, "weight", None)
        if isinstance(module, _NormBase) and weight is not None and weight.dtype in _HALF:
            for name in ("running_mean", "running_var"):
                if (statistic := module._buffers.get(name)) is not None:
                    module._buffers[name] = statistic.to(weight.dtype)
    return model
