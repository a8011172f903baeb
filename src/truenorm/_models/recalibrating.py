"""Running statistics recomputed exactly over a data set ("precise BN")."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import Module
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import UninitializedBuffer

from .._core import checks, exchange
from ..moments import Moments, merge_named
from ..nn._base import Spanning
from .calibration import Collected, calibrating, run

__all__ = ["recalibrate"]


def recalibrate(
    model: Module,
    loader: Iterable[Any],
    *,
    batches: int | None = None,
    group: Any = None,
    sync: bool = False,
    forward: Callable[[Module, Any], Any] | None = None,
    progress: bool | None = None,
    resume: str | os.PathLike[str] | None = None,
    save_every: int = 100,
) -> int:
    """Set every running statistic of `model` to that of a whole data set, and return its batches.

    running_mean = mean of a layer's inputs over all batches, running_var = their variance, divided
    by n − 1. Each batch is normalized by its own statistics on the way, as in training, while every
    other layer works as in evaluation (no dropout). The moments are merged exactly, in float64, and
    memory does not grow with the data. InstanceNorm that tracks gets the averages over all samples
    of each sample's mean and unbiased variance. Layers that no batch reaches stay as they are.

    The running statistics change at the end alone, all together; an error, at whatever point,
    leaves them, the training flags and everything else as they were.

    model: with BatchNorm, SyncBatchNorm or InstanceNorm layers, truenorm's or torch's, that track.
    loader: of batches; of a tuple or list the first entry is the input, a mapping is passed as
        keyword arguments. Inputs are moved to the device of the model's first parameter.
    batches: how many of them at most; None for all.
    group: a torch.distributed group whose processes each pass through their own share of the data,
        with any number of batches, and then merge. None: all processes, or this one alone where
        torch.distributed is not in use. The result is that of one process with all the batches.
    sync: False lets each process normalize its own batches, also by SyncBatchNorm. True lets layers
        exchange statistics as in training; every process must then have as many batches.
    forward: called as forward(model, batch), where the above is not how a batch enters the model.
    progress: whether to draw a bar (tqdm); None: on a terminal, where tqdm is installed.
    resume: a file for the moments so far, written every `save_every` batches and deleted at the
        end. Where it is there already, its batches are skipped in the loader, which has to give the
        same order again. Each process of a group writes its own, with its rank at the end.

    A model in DistributedDataParallel is taken out of it; one under fully_shard works as a whole,
    so that every process must have as many batches.

    Errors: TypeError where `model` is no module or `loader` no iterable of batches; ValueError
    where there is nothing to recalibrate, no batch, or a layer that saw one value at most, and
    where `resume` is another model's file; RuntimeError where the pass has failed in another
    process.

    Source: Wu and Johnson 2021, https://arxiv.org/abs/2105.07576 (precise BatchNorm).
    """
    if isinstance(model, DistributedDataParallel):
        model = model.module
    layers = _tracking(model)
    checks.check_loader(loader)
    if batches is not None:
        checks.check_positive("batches", batches)
    checks.check_positive("save_every", save_every)
    shared = exchange.active_group(group)
    path = None if resume is None else Path(resume)
    if path is not None and shared is not None:
        path = path.with_name(f"{path.name}.rank{dist.get_rank(shared)}")
    error = None
    collected = Collected(layers)
    try:
        with calibrating(model, layers, collected, sync):
            run(model, loader, batches, forward, collected, path, save_every, progress)
    except Exception as raised:
        if shared is None:
            raise
        error = raised
    if shared is not None:
        collected = _merged(collected, error, shared)
    checks.check_some_batches(collected.batches)
    for name, moments in collected.moments.items():
        checks.check_more_than_one_seen(name, moments.count.item())
    for name, moments in collected.moments.items():
        _set(layers[name], moments, collected.batches)
    if path is not None:
        path.unlink(missing_ok=True)
    return collected.batches


def _tracking(model: Any) -> dict[str, _NormBase]:
    """The layers with running statistics, by name; shared ones once."""
    checks.check_module("model", model)
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _NormBase)
        and module._buffers.get("running_mean") is not None
        and module.track_running_stats
    }
    checks.check_something_tracks(found)
    for name, layer in found.items():
        checks.check_initialized(name, isinstance(layer.running_mean, UninitializedBuffer))
        if isinstance(layer, _InstanceNorm) and isinstance(layer, Spanning):
            checks.check_whole_samples(name, layer._statistics_group())
    return found


def _merged(collected: Collected, error: Exception | None, group: Any) -> Collected:
    """All ranks' moments in rank order; where one has failed, an error on all of them."""
    parts: list[Any] = [None] * dist.get_world_size(group)
    said = None if error is None else f"{type(error).__name__}: {error}"
    own = {n: m.to("cpu") for n, m in collected.moments.items()}
    dist.all_gather_object(parts, (said, own, collected.batches), group=group)
    if error is not None:
        raise error
    for rank, (failed, _, _) in enumerate(parts):
        checks.check_pass_of_rank(rank, failed)
    result = Collected(collected.layers)
    result.moments = merge_named([moments for _, moments, _ in parts])
    result.batches = sum(batches for _, _, batches in parts)
    return result


def _set(layer: _NormBase, moments: Moments, batches: int) -> None:
    mean, var = moments.mean, moments.variance(unbiased=True)
    if isinstance(layer, _InstanceNorm):
        mean, var = moments.mean.chunk(2)
    assert layer.running_mean is not None and layer.running_var is not None
    with torch.no_grad():
        layer.running_mean.copy_(mean)
        layer.running_var.copy_(var)
        if layer.num_batches_tracked is not None:
            layer.num_batches_tracked.fill_(batches)
