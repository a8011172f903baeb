"""Reading a layer: which values it lets share a statistic, and its copies in both libraries."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import chain
from math import prod
from typing import cast

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.modules import batchnorm, instancenorm
from torch.nn.modules.lazy import LazyModuleMixin

from ... import nn
from ..._core.geometry import rms_eps
from ..._models.converting import convert, revert
from ...nn._instance import InstanceForward
from .groups import Sharing


@dataclass(frozen=True)
class Subject:
    """What of a layer the arithmetic needs.

    settings: the loop's numbers (eps; of LocalResponseNorm alpha, beta and k).
    parameter_dim: the dimension of a batched input that weight's first dimension belongs to.
    """

    sharing: Sharing
    settings: dict[str, float]
    weight: Tensor | None
    bias: Tensor | None
    parameter_dim: int
    unbatched: bool

    def first_weight(self) -> float:
        return 1.0 if self.weight is None else self.weight.flatten()[0].item()

    def first_bias(self) -> float:
        return 0.0 if self.bias is None else self.bias.flatten()[0].item()


def seeded_input(shape: Sequence[int], seed: int, like: Tensor | None = None) -> Tensor:
    """A random input whose samples and channels differ in mean and spread, on the CPU.

    With the same mean and spread everywhere, every choice of which values share a statistic would
    give nearly the same result.
    """
    sizes = tuple(shape)
    if not sizes or not all(isinstance(s, int) and s > 0 for s in sizes):
        raise ValueError(
            f"`x_or_shape` (={x_or_shape_text(shape)}) must be a tensor or a shape of positive "
            "sizes, e.g. (2, 3, 5)"
        )
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(sizes, generator=generator, dtype=torch.float64)
    for dim in range(min(2, len(sizes))):
        along = [size if d == dim else 1 for d, size in enumerate(sizes)]
        x = x * torch.empty(along, dtype=torch.float64).uniform_(0.6, 1.7, generator=generator)
        x = x + 2.0 * torch.randn(along, generator=generator, dtype=torch.float64)
    dtype = like.dtype if like is not None and like.is_floating_point() else torch.float32
    return x.to(dtype)


def x_or_shape_text(shape: object) -> str:
    return f"({', '.join(map(str, shape))})" if isinstance(shape, (tuple, list)) else str(shape)


def _read(layer: Module, x: Tensor) -> Subject:
    shape = tuple(x.shape)
    weight, bias = getattr(layer, "weight", None), getattr(layer, "bias", None)
    settings: dict[str, float] = {"eps": getattr(layer, "eps", 0.0)}
    unbatched, dim = False, 1
    if isinstance(layer, batchnorm._BatchNorm):
        sharing = Sharing("batch", shape)
    elif isinstance(layer, instancenorm._InstanceNorm):
        unbatched = x.dim() == cast(InstanceForward, layer)._dims[0]
        sharing = Sharing("instance", shape, leading=1 if unbatched else 2)
    elif isinstance(layer, torch.nn.GroupNorm):
        sharing = Sharing("group", shape, num_groups=layer.num_groups)
    elif isinstance(layer, torch.nn.LocalResponseNorm):
        sharing = Sharing("local response", shape, size=layer.size)
        settings = {"alpha": layer.alpha, "beta": layer.beta, "k": layer.k}
    else:
        kind = "rms" if isinstance(layer, torch.nn.RMSNorm) else "layer"
        assert isinstance(layer, torch.nn.LayerNorm | torch.nn.RMSNorm)
        if layer.eps is None:
            settings["eps"] = rms_eps(None, x.dtype)
        dim = x.dim() - len(layer.normalized_shape)
        sharing = Sharing(kind, shape, leading=dim)  # type: ignore[arg-type]
    return Subject(sharing, settings, weight, bias, dim, unbatched)


def _copy(layer: Module) -> Module:
    if not isinstance(layer, LazyModuleMixin):
        return deepcopy(layer)
    # torch cannot deepcopy a lazy layer that has seen no input, but can pickle it, bar the dtype
    copy: Module = pickle.loads(pickle.dumps(layer))
    for t in chain(layer.parameters(), layer.buffers()):
        if t.is_floating_point():
            return copy.to(t.device, t.dtype)
    return copy


def _as_torch(ours: Module) -> Module:
    theirs = revert(deepcopy(ours))
    # truenorm's statistics stay in float32 beside half precision weights; torch takes them only in
    # the weights' dtype, as its own .half() leaves them
    weight = getattr(theirs, "weight", None)
    for name in ("running_mean", "running_var"):
        buffer = getattr(theirs, name, None)
        if buffer is not None and weight is not None:
            setattr(theirs, name, buffer.to(weight.dtype))
    return theirs


def prepare(layer: Module, x: Tensor) -> tuple[Subject, Module, Module]:
    """The layer as read, and a copy of it as truenorm's and as torch's, both in training mode.

    A lazy layer is built from x first. Raises what truenorm's layer raises for an x that does not
    fit it.
    """
    if not any(type(layer) in (getattr(torch.nn, n), getattr(nn, n)) for n in nn.__all__):
        raise TypeError(
            f"`layer` must be a normalization layer of torch.nn or truenorm, but got "
            f"{type(layer).__name__}: choose from {', '.join(nn.__all__)}"
        )
    if not x.is_floating_point():
        raise TypeError(
            f"`x_or_shape` has dtype {x.dtype}: explain takes real floating point inputs, e.g. "
            "x.float()"
        )
    if prod(x.shape) == 0:
        raise ValueError(
            f"`x_or_shape` of shape {tuple(x.shape)} has no values: pass at least one of each"
        )
    ours = convert(_copy(layer))
    with torch.no_grad():
        # on a throw-away copy: the layer judges whether x fits it, before it is read
        _copy(ours).train()(x)
        if isinstance(ours, LazyModuleMixin):
            ours.eval()(x)  # becomes what it is lazy for; eval leaves its statistics alone
    ours.train()
    return _read(ours, x), ours, _as_torch(ours)
