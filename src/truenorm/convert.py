"""Swapping torch's normalization layers for truenorm's in a whole model, and back.

truenorm's layers hold exactly the state of torch's, so a swap changes the class of each layer in
place: parameters, buffers, hooks, training flags, sharing and identity stay as they are, and an
optimizer goes on working.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch.nn import Module
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

from . import _checks, nn
from ._exchange import WORLD
from ._fuse import unfuse
from .nn._activation import Activated
from .nn._batch import BatchForward
from .nn._policy import SmallBatches

_TO_TRUENORM: dict[type[Module], type[Module]] = {
    getattr(torch.nn, name): getattr(nn, name) for name in nn.__all__
}
_TO_TORCH = {ours: theirs for theirs, ours in _TO_TRUENORM.items()}

_POLICY = ("_found", "_gathered", "_direct", "frozen", *SmallBatches._options, *Activated._options)

_HALF = (torch.float16, torch.bfloat16)

# by the number of positions' dimensions that their input has
_LOCAL: dict[Any, dict[int, type[Module]]] = {
    library: {1: library.BatchNorm1d, 2: library.BatchNorm2d, 3: library.BatchNorm3d}
    for library in (torch.nn, nn)
}

M = TypeVar("M", bound=Module)


def _kind(module: Module) -> type[Module]:
    """A layer's class: torch gives each parametrized layer one of its own, derived from it."""
    kind = type(module)
    return kind.__bases__[0] if parametrize.is_parametrized(module) else kind


def _become(module: Module, kind: type[Module]) -> None:
    if parametrize.is_parametrized(module):
        type(module).__bases__ = (kind,)
    else:
        module.__class__ = kind


def _swap(model: Module, classes: dict[type[Module], type[Module]]) -> list[Module]:
    """Swap classes below `model`; the layers that were swapped."""
    swapped = []
    for module in model.modules():
        if (kind := classes.get(_kind(module))) is not None:
            _become(module, kind)
            swapped.append(module)
    return swapped


def _ranks(model: Module) -> dict[Module, int]:
    """Dimensions of the positions that each SyncBatchNorm meets, by the layer next to it.

    A convolution says how many, and a Linear that there are none, as for BatchNorm1d: the nearest
    one before it in the model's order, else the first one after it.
    """
    found: dict[Module, int] = {}
    waiting: list[Module] = []
    last = None
    for module in model.modules():
        if isinstance(module, _ConvNd):
            last = len(module.kernel_size)
        elif isinstance(module, torch.nn.Linear):
            last = 1
        elif isinstance(module, torch.nn.SyncBatchNorm):
            waiting.append(module)
        if last is not None:
            found.update(dict.fromkeys(waiting, last))
            waiting.clear()
    return found


def _unsynchronize(model: Module, dims: int | None) -> None:
    """Every batch norm below `model` by its own process's statistics alone."""
    local = {library.SyncBatchNorm: _LOCAL[library] for library in _LOCAL}
    named = {m: name for name, m in model.named_modules() if _kind(m) in local}
    ranks = _ranks(model) if dims is None else dict.fromkeys(named, dims)
    for module, name in named.items():
        _checks.check_dims(name, ranks.get(module))
    for module in named:
        _become(module, local[_kind(module)][ranks[module]])
        del module.process_group
    for module in model.modules():
        if isinstance(module, BatchForward):
            vars(module).pop("process_group", None)


def _check(model: Any, sync: bool | None, process_group: Any, dims: Any) -> None:
    _checks.check_module("model", model)
    if process_group is not None:
        _checks.check_only_with("process_group", process_group, "sync=True", sync is True)
        _checks.check_process_group(process_group)
    if dims is not None:
        _checks.check_only_with("dims", dims, "sync=False", sync is False)
        _checks.check_dims("the model", dims)


def convert(
    model: M,
    *,
    only: tuple[type[Module], ...] | None = None,
    sync: bool | None = None,
    process_group: Any = None,
    dims: int | None = None,
) -> M:
    """Make every torch normalization layer of `model` truenorm's, in place, and return the model.

    Layers whose class is exactly torch's are swapped, nested and shared ones too; subclasses of
    them keep their own forward and are left alone. Nothing else changes: the parameters are the
    same objects, `state_dict` has the same keys, hooks and flags stay.

    only: torch classes to swap; None for all of them.
    sync: True lets every BatchNorm and SyncBatchNorm of truenorm's, those already there too, take
        its statistics over all processes of `process_group`; they keep their class. False lets each
        process take its own again, SyncBatchNorm becoming BatchNorm1d, 2d or 3d. None leaves them.
    process_group: with sync=True, a torch.distributed.ProcessGroup; None for all processes, as many
        as there are when the layer is called.
    dims: with sync=False, 1, 2 or 3 for every SyncBatchNorm; None takes it from the convolution or
        Linear next before each in the model's order (else after it).

    Errors: TypeError where `model` is no module or process_group no group; ValueError for a class
    in `only` that has no counterpart, for an argument that does not go with `sync`, and for a
    SyncBatchNorm whose dims cannot be told; the model is unchanged.
    """
    _check(model, sync, process_group, dims)
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
    if sync is False:
        _unsynchronize(model, dims)
    _swap(model, classes)
    if sync:
        for module in model.modules():
            if isinstance(module, BatchForward) and isinstance(module, tuple(classes.values())):
                module.process_group = process_group or WORLD
    return model


def _forget(module: Module) -> None:
    """What torch's layer knows nothing of."""
    for name in _POLICY:
        vars(module).pop(name, None)


def revert(model: M, *, sync: bool | None = None, dims: int | None = None) -> M:
    """Make every truenorm layer of `model` torch's again, in place: the inverse of `convert`.

    A layer whose parameters are in half precision has its running statistics cast to their dtype:
    truenorm keeps those in float32, and torch refuses the mixture.

    Options that torch's layers do not have (`on_single`, `renorm`, …) are dropped, and what `fuse`
    has changed is unfused.

    sync: None gives each layer torch's class of the same name; a `process_group` stays with
        SyncBatchNorm, the others of torch have none. True makes every BatchNorm of truenorm's
        torch's SyncBatchNorm. False makes every SyncBatchNorm, torch's own too, a BatchNorm.
    dims: as in `convert`.

    Errors: TypeError where `model` is no module; ValueError as in `convert`, for a layer with an
    activation, which torch's have not, or a `channel_axis` other than 1; and for a frozen layer,
    since torch's would move its statistics again: `unfreeze` first.
    """
    _check(model, sync, None, dims)
    activated = [n for n, m in model.named_modules() if isinstance(m, Activated) and m.activation]
    _checks.check_no_activation(
        activated,
        "model",
        "torch's layers have none; set layer.activation = None and call it "
        "on the layer's output, then revert",
    )
    _checks.check_not_frozen([n for n, m in model.named_modules() if getattr(m, "frozen", False)])
    moved = [n for n, m in model.named_modules() if getattr(m, "channel_axis", 1) != 1]
    _checks.check_channels_where_torch_has_them(moved)
    unfuse(model)
    if sync is False:
        _unsynchronize(model, dims)
    classes = dict(_TO_TORCH)
    if sync:
        for ours in _LOCAL[nn].values():
            classes[ours] = torch.nn.SyncBatchNorm
    for module in _swap(model, classes):
        group = vars(module).pop("process_group", None)
        if not isinstance(module, torch.nn.LocalResponseNorm):  # its alpha is torch's
            _forget(module)
        if isinstance(module, torch.nn.SyncBatchNorm):
            module.process_group = None if group == WORLD else group
        weight = getattr(module, "weight", None)
        if isinstance(module, _NormBase) and weight is not None and weight.dtype in _HALF:
            for name in ("running_mean", "running_var"):
                if (statistic := module._buffers.get(name)) is not None:
                    module._buffers[name] = statistic.to(weight.dtype)
    return model
