"""Which modules of a model are normalization layers, and which values share a statistic in each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from .. import nn
from .._core import geometry
from .._core.geometry import Axes
from ..nn._options import options_of

NORMS = (
    _BatchNorm,
    _InstanceNorm,
    torch.nn.GroupNorm,
    torch.nn.LayerNorm,
    torch.nn.RMSNorm,
    torch.nn.LocalResponseNorm,
)

# torch's layers, and truenorm's of the same name
COUNTERPARTS: dict[type[Module], type[Module]] = {
    getattr(torch.nn, name): getattr(nn, name) for name in nn.__all__
}

BATCH, INSTANCE, GROUP, LAYER, RMS, RESPONSE = "batch", "instance", "group", "layer", "rms", "lrn"


def _vector(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 1


def kind_of(module: Module) -> str | None:
    """The kind of normalization layer, or None for another module.

    torch's layers, truenorm's, and subclasses of both are told by their class. Two layers that
    other libraries write without torch's class are told by what they hold: RMSNorm by its name, one
    weight per feature and an eps, and a frozen BatchNorm by its running statistics.
    """
    for base, kind in zip(NORMS, (BATCH, INSTANCE, GROUP, LAYER, RMS, RESPONSE), strict=True):
        if isinstance(module, base):
            return kind
    name = type(module).__name__
    if _vector(getattr(module, "running_mean", None)) and "Norm" in name:
        return BATCH
    has_eps = any(hasattr(module, eps) for eps in ("eps", "variance_epsilon"))
    # T5's layer of that name takes no mean away
    if name.endswith(("RMSNorm", "T5LayerNorm")) and has_eps:
        return RMS if _vector(getattr(module, "weight", None)) else None
    return None


def norms_of(model: Module) -> list[tuple[str, Module]]:
    """(name, layer) of every normalization layer, in the model's order; a shared one once."""
    return [(name, m) for name, m in model.named_modules() if kind_of(m) is not None]


def eps_of(module: Module, dtype: torch.dtype) -> float:
    eps = getattr(module, "eps", getattr(module, "variance_epsilon", None))
    return geometry.rms_eps(None if eps is None else float(eps), dtype)


@dataclass(frozen=True)
class View:
    """An input as its layer sees it.

    x: (N, C, *positions), or (*, features) for layers over the trailing dimensions.
    axes: which values of x share a statistic; None for LocalResponseNorm, which has none.
    """

    x: Tensor
    axes: Axes | None

    @property
    def values_per_statistic(self) -> int:
        return 0 if self.axes is None else geometry.values_per_statistic(self.x.shape, self.axes)


def trailing(module: Module) -> int:
    """How many trailing dimensions a LayerNorm or RMSNorm spans."""
    shape = getattr(module, "normalized_shape", None)
    return 1 if shape is None else len(shape)


def view(module: Module, kind: str, x: Tensor) -> View | None:
    """The input as the layer sees it; None where it is no input for such a layer."""
    if kind in (LAYER, RMS):
        shape = getattr(module, "normalized_shape", None)
        if shape is None:
            shape = getattr(module, "weight").shape  # noqa: B009  (a Module's attributes are untyped)
        shape = tuple(shape)
        if tuple(x.shape[x.dim() - len(shape) :]) != shape:
            # layers over the channels of images: (N, C, H, W) with one weight per channel
            if not (len(shape) == 1 and x.dim() > 2 and x.shape[1] == shape[0]):
                return None
            x = x.movedim(1, -1)
        axes = geometry.layer(len(shape)) if kind == LAYER else geometry.rms(len(shape))
        return View(x, axes)
    if kind == INSTANCE:
        ranks = {"1d": 2, "2d": 3, "3d": 4}
        for suffix, rank in ranks.items():
            if suffix in type(module).__name__ and x.dim() == rank:
                x = x.unsqueeze(0)
    if x.dim() < 2:
        return None
    axis = options_of(module).channel_axis
    if axis != 1:
        x = x.movedim(axis, 1)
    if kind == RESPONSE:
        return View(x, None)
    if kind == BATCH:
        return View(x, geometry.BATCH)
    if kind == INSTANCE:
        return View(x, geometry.instance(x.shape[1]))
    return View(x, geometry.group(int(getattr(module, "num_groups"))))  # noqa: B009


def uses_running(module: Module, kind: str) -> bool:
    """Whether the layer now normalizes by its running statistics instead of the input's own."""
    if kind not in (BATCH, INSTANCE) or not isinstance(
        getattr(module, "running_mean", None), Tensor
    ):
        return False
    if not isinstance(module, NORMS):
        return True
    if options_of(module).statistics_frozen:
        return True
    if kind == INSTANCE:
        return not module.training and bool(getattr(module, "track_running_stats", True))
    return not module.training


def has_hooks(module: Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )
