"""Swapping torch's normalization layers for truenorm's in a whole model, and back.

truenorm's layers hold exactly the state of torch's, so a swap changes the class of each layer in
place: parameters, buffers, hooks, training flags, sharing and identity stay as they are, and an
optimizer goes on working.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypeVar

import torch
from torch.nn import Module
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from .. import nn
from .._core import checks
from .._core.exchange import WORLD
from ..nn import _sync
from ..nn._batch import BatchForward
from ..nn._options import Configurable, options_of
from ..nn._ruled import Ruled
from . import rules, swap
from .fusing import unfuse
from .layers import COUNTERPARTS
from .surveying import survey
from .swap import Kind, Left
from .undo import Undo

_TO_TRUENORM: dict[Kind, Kind] = COUNTERPARTS
_TO_TORCH = {ours: theirs for theirs, ours in _TO_TRUENORM.items()}

_HALF = (torch.float16, torch.bfloat16)

# by the number of positions' dimensions that their input has
_LOCAL: dict[Any, dict[int, Kind]] = {
    library: {1: library.BatchNorm1d, 2: library.BatchNorm2d, 3: library.BatchNorm3d}
    for library in (torch.nn, nn)
}

M = TypeVar("M", bound=Module)


def _swap(found: dict[Module, Kind]) -> None:
    for module, kind in found.items():
        swap.become(module, kind)


def left_alone(model: Module) -> list[Left]:
    """The layers derived from torch's that `convert` leaves as they are, and why."""
    return swap.targets(model, _TO_TRUENORM)[1]


def _say(verb: str, left: list[Left]) -> None:
    """One warning about the layers that somebody would expect to be swapped."""
    said = []
    for name, kind, reason, unexpected in left:
        if unexpected:
            said.append(f"{name or 'the model itself'!r} ({kind.__name__}): {reason}")
    if said:
        more = f"; and {len(said) - 5} more" if len(said) > 5 else ""
        warnings.warn(
            f"{verb} left {len(said)} layer(s) as they are: {'; '.join(said[:5])}{more}",
            stacklevel=3,
        )


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


def _unsynchronize(model: Module, dims: int | None) -> list[Left]:
    """Every batch norm below `model` by its own process's statistics alone; what was left."""
    local = {library.SyncBatchNorm: _LOCAL[library] for library in _LOCAL}
    named = {m: name for name, m in model.named_modules() if swap.core(m) in local}
    ranks = _ranks(model) if dims is None else dict.fromkeys(named, dims)
    for module, name in named.items():
        checks.check_dims(name, ranks.get(module))
    left = []
    for name, module in model.named_modules():
        kind = swap.core(module)
        if module in named:
            target = local[kind][ranks[module]]
            if (reason := swap.obstacle(module, target)) is not None:
                left.append(Left(name, kind, reason, True))
                continue
            swap.become(module, target)
            del module.process_group
        elif isinstance(module, torch.nn.SyncBatchNorm):
            reason = "its class is derived from SyncBatchNorm, and no BatchNorm stands for it"
            left.append(Left(name, kind, reason, True))
    for module in model.modules():
        if isinstance(module, BatchForward) and "process_group" in module._options:
            module._choose("process_group", None)
    return left


def _check(model: Any, sync: bool | None, process_group: Any, dims: Any) -> None:
    checks.check_module("model", model)
    if process_group is not None:
        checks.check_only_with("process_group", process_group, "sync=True", sync is True)
        checks.check_process_group(process_group)
    if dims is not None:
        checks.check_only_with("dims", dims, "sync=False", sync is False)
        checks.check_dims("the model", dims)


def convert(
    model: M,
    *,
    only: tuple[type[Module], ...] | None = None,
    sync: bool | None = None,
    process_group: Any = None,
    dims: int | None = None,
    rounding: Literal["module", "once"] = "module",
    report: bool = False,
) -> M:
    """Make every normalization layer of `model` truenorm's, in place, and return the model.

    Layers of torch's are swapped, nested, shared, parametrized and sharded ones too. So are layers
    of a class derived from torch's that leaves to torch what the layer computes (a class with a
    forward, a rank check or a `weight` of its own is left alone): they get a class derived from
    truenorm's and theirs. Nothing else changes: the parameters are the same objects, `state_dict`
    has the same keys, hooks and flags stay.

    Norms that other libraries write themselves (transformers' RMSNorms, timm's BatchNormAct2d, …)
    are recognised, each class is run against the formula that it is taken for, and what gives that
    formula's numbers is swapped: `survey` says what is, and why the rest is not. They keep their
    own order of casts and the dtype of their output.

    A layer whose instance has a `forward` of its own, which would go on running, is left with a
    UserWarning that says so; one that only wraps the class's, as accelerate's hooks do, goes on
    wrapping truenorm's.

    only: classes to swap, torch's or those of other libraries' norms; None for all of them.
    sync: True lets every BatchNorm and SyncBatchNorm of truenorm's, those already there too, take
        its statistics over all processes of `process_group`; they keep their class. False lets each
        process take its own again, SyncBatchNorm becoming BatchNorm1d, 2d or 3d. None leaves them.
    process_group: with sync=True, a torch.distributed.ProcessGroup; None for all processes, as many
        as there are when the layer is called.
    dims: with sync=False, 1, 2 or 3 for every SyncBatchNorm; None takes it from the convolution or
        Linear next before each in the model's order (else after it).
    rounding: of other libraries' norms in half precision: "module", each one's own order of casts;
        "once", one rounding of the exact result, to the dtype that the module's output has.
    report: print what became of each kind of norm, as `survey` says it.

    Errors: TypeError where `model` is no module or process_group no group; ValueError for a class
    in `only` that has no counterpart, for another `rounding`, for an argument that does not go with
    `sync`, and for a SyncBatchNorm whose dims cannot be told; the model is unchanged.
    """
    _check(model, sync, process_group, dims)
    checks.check_rounding(rounding)
    recognised = rules.find(model, rounding)
    classes = _TO_TRUENORM
    if only is not None:
        recognised = {m: found for m, found in recognised.items() if swap.core(m) in only}
        for kind in set(only) - {swap.core(m) for m in recognised}:
            if kind not in _TO_TRUENORM:
                known = ", ".join(sorted(k.__name__ for k in _TO_TRUENORM))
                raise ValueError(
                    f"`only` names {getattr(kind, '__name__', kind)!r}, which is none of "
                    f"torch.nn's normalization layers, and no norm that truenorm knows in this "
                    f"model: choose from {known}"
                )
        classes = {kind: _TO_TRUENORM[kind] for kind in only if kind in _TO_TRUENORM}
    if sync:
        group = process_group or WORLD
        checks.check_may_span({n: options_of(m) for n, m in model.named_modules()}, group)
    said = _unsynchronize(model, dims) if sync is False else []
    alone = {name for name, *_ in said}
    found, left = swap.targets(model, classes)
    names = {m: name for name, m in model.named_modules()}
    _swap({m: kind for m, kind in found.items() if names[m] not in alone})
    ruled, hindered = rules.swappable(recognised)
    _swap({m: kind for m, kind in ruled.items() if names[m] not in alone})
    left = [each for each in left if model.get_submodule(each.name) not in ruled] + hindered
    if sync:
        for module in model.modules():
            if isinstance(module, BatchForward) and isinstance(module, tuple(classes.values())):
                if "process_group" in module._options:
                    module._choose("process_group", group)
                else:
                    module.process_group = group
    if report:
        print(survey(model))
    _say("convert", [*said, *(each for each in left if each.name not in alone)])
    return model


_sync._convert = convert


def _check_revertible(model: Module) -> None:
    """That torch's layers can be what each layer of `model` is."""
    options = {name: options_of(m) for name, m in model.named_modules()}
    checks.check_no_activation(
        [name for name, o in options.items() if o.activation],
        "model",
        "torch's layers have none; set layer.activation = None and call it "
        "on the layer's output, then revert",
    )
    checks.check_not_frozen([name for name, o in options.items() if o.statistics_frozen])
    checks.check_channels_where_torch_has_them(
        [name for name, o in options.items() if o.channel_axis != 1]
    )


def _of_torch(model: Module, sync: bool | None) -> tuple[dict[Module, Kind], list[Left]]:
    """The class of torch's, or of a user, that each layer of truenorm's would have."""
    found, left = {}, []
    for name, module in model.named_modules():
        kind = swap.core(module)
        ours, theirs = swap.parts(kind) or (kind, _TO_TORCH.get(kind))
        if theirs is None:
            continue
        if sync and ours in _LOCAL[nn].values() and not issubclass(kind, Ruled):
            theirs = torch.nn.SyncBatchNorm
        if (reason := swap.obstacle(module, theirs)) is not None:
            left.append(Left(name, kind, reason, True))
        else:
            found[module] = theirs
    return found, left


def _as_torch_holds(module: Module, group: Any) -> None:
    """What a layer of torch's has in its `__dict__` and its buffers."""
    if isinstance(module, torch.nn.SyncBatchNorm):
        held = vars(module).get("process_group", group)
        module.process_group = None if held == WORLD else held
    weight = getattr(module, "weight", None)
    if isinstance(module, _NormBase) and weight is not None and weight.dtype in _HALF:
        for name in ("running_mean", "running_var"):
            if (statistic := module._buffers.get(name)) is not None:
                module._buffers[name] = statistic.to(weight.dtype)


def _revert(model: Module, sync: bool | None, dims: int | None) -> list[Left]:
    unfuse(model)
    said = _unsynchronize(model, dims) if sync is False else []
    found, left = _of_torch(model, sync)
    alone = {name for name, *_ in said}
    left = [each for each in left if each.name not in alone]
    names = {m: name for name, m in model.named_modules()}
    for module, kind in found.items():
        if names[module] in alone:
            continue
        group = options_of(module).process_group
        if isinstance(module, Configurable):
            module._forget_options()
        for name in ("_truenorm_found", "_gathered"):
            vars(module).pop(name, None)
        swap.become(module, kind)
        _as_torch_holds(module, group)
    return [*said, *left]


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
    _check_revertible(model)
    _say("revert", _revert(model, sync, dims))
    return model


@contextmanager
def reverted(model: M) -> Iterator[M]:
    """Torch's layers within the block, for whatever knows no others; truenorm's again after it.

        with truenorm.reverted(model):
            report = some_tool(model)

    Within it `model` is as after `revert(model)`. After it, also if the block raises, every layer
    is what it was: class, options, process group, running statistics in their dtype (at the values
    that they then have), and what `fuse` has changed. A layer or an attribute that the block itself
    has put in place of one of these stays as the block has left it; so do copies made there.

    Errors: as in `revert`; ValueError for a layer that could not be torch's, since its instance has
    a `forward` of its own. The model is unchanged then.
    """
    checks.check_module("model", model)
    _check_revertible(model)
    left = _of_torch(model, None)[1]
    checks.check_all_revertible([(each.name or "the model itself", each.reason) for each in left])
    undo = Undo(model)
    try:
        _revert(model, None, None)
        undo.note_changes()
        yield model
    finally:
        undo.back()
