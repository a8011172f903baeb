"""Running statistics recomputed exactly over a data set ("precise BN")."""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Module
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import UninitializedBuffer

from . import _checks, _exchange, nn
from ._extras import has, require
from ._ops import channel_moments
from .moments import Moments, load_named, merge_named, save_named
from .nn._base import Spanning

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

    Errors: TypeError where `model` is no module; ValueError where it has nothing to recalibrate,
    where there is no batch or a layer saw one value at most, and where `resume` is another model's
    file; RuntimeError where the pass has failed in another process.

    Source: Wu and Johnson 2021, https://arxiv.org/abs/2105.07576 (precise BatchNorm).
    """
    if isinstance(model, DistributedDataParallel):
        model = model.module
    layers = _tracking(model)
    _checks.check_positive("batches", batches)
    _checks.check_positive("save_every", save_every)
    shared = _exchange.active_group(group)
    path = None if resume is None else Path(resume)
    if path is not None and shared is not None:
        path = path.with_name(f"{path.name}.rank{dist.get_rank(shared)}")
    error = None
    collected = _Collected(layers)
    try:
        with _calibrating(model, layers, collected, sync):
            _pass(model, loader, batches, forward or _call, collected, path, save_every, progress)
    except Exception as raised:
        if shared is None:
            raise
        error = raised
    if shared is not None:
        collected = _merged(collected, error, shared)
    _checks.check_some_batches(collected.batches)
    for name, moments in collected.moments.items():
        _checks.check_more_than_one_seen(name, moments.count.item())
    for name, moments in collected.moments.items():
        _set(layers[name], moments, collected.batches)
    if path is not None:
        path.unlink(missing_ok=True)
    return collected.batches


def _tracking(model: Any) -> dict[str, _NormBase]:
    """The layers with running statistics, by name; shared ones once."""
    _checks.check_model(model)
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _NormBase)
        and module._buffers.get("running_mean") is not None
        and module.track_running_stats
    }
    _checks.check_something_tracks(found)
    for name, layer in found.items():
        _checks.check_initialized(name, isinstance(layer.running_mean, UninitializedBuffer))
        if isinstance(layer, _InstanceNorm) and isinstance(layer, Spanning):
            _checks.check_whole_samples(name, layer._statistics_group())
    return found


class _Collected:
    """Moments of each layer's input so far, by name, and the batches that they are of."""

    def __init__(self, layers: Mapping[str, _NormBase]) -> None:
        self.layers = layers
        self.moments: dict[str, Moments] = {}
        self.batches = 0

    def add(self, name: str, input: Tensor) -> None:
        layer = self.layers[name]
        seen = _of_samples(input, layer) if isinstance(layer, _InstanceNorm) else Moments.of(input)
        if name in self.moments:
            seen = self.moments[name].merge(seen)
        self.moments[name] = seen


def _of_samples(input: Tensor, layer: _InstanceNorm) -> Moments:
    """Moments, over samples, of each sample's means and unbiased variances, one after the other."""
    if input.dim() == layer._get_no_batch_dim():
        input = input[None]
    samples, channels, *positions = input.shape
    mean, var = channel_moments(input.detach().reshape(1, samples * channels, *positions))
    count = input[0, 0].numel() if samples else 0
    unbiased = var * (count / (count - 1)) if count > 1 else var
    each = torch.stack([mean.view(samples, channels), unbiased.view(samples, channels)], 1)
    return Moments.of(each.reshape(samples, 2 * channels))


@contextlib.contextmanager
def _calibrating(
    model: Module, layers: Mapping[str, _NormBase], collected: _Collected, sync: bool
) -> Iterator[None]:
    """The model as the pass needs it; afterwards everything is as it was."""
    modes = {module: module.training for module in model.modules()}
    # all of a layer that changes: its class, what it holds, its buffers
    before = [(m, type(m), dict(vars(m)), dict(m._buffers)) for m in layers.values()]
    hooks = []
    try:
        model.eval()
        for name, layer in layers.items():
            layer.train()
            # what the pass writes to is thrown away
            layer._buffers.update(
                {k: None if b is None else b.clone() for k, b in layer._buffers.items()}
            )
            if type(layer) is torch.nn.SyncBatchNorm:
                layer.__class__ = nn.SyncBatchNorm
            if isinstance(layer, Spanning) and not sync:
                layer.process_group = _exchange.ALONE
            hooks.append(
                # after the layer itself has refused what does not fit
                layer.register_forward_hook(_recording(name, collected), with_kwargs=True)
            )
        # a compiled graph would know nothing of the hooks
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for hook in hooks:
            hook.remove()
        for layer, kind, held, buffers in before:
            layer.__class__ = kind
            layer._buffers.update(buffers)
            if "process_group" in held:
                layer.process_group = held["process_group"]
            else:
                vars(layer).pop("process_group", None)
        for module, mode in modes.items():
            module.training = mode


def _recording(name: str, collected: _Collected) -> Callable[..., None]:
    def hook(layer: Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        collected.add(name, args[0] if args else next(iter(kwargs.values())))

    return hook


def _pass(
    model: Module,
    loader: Iterable[Any],
    batches: int | None,
    forward: Callable[[Module, Any], Any],
    collected: _Collected,
    path: Path | None,
    save_every: int,
    progress: bool | None,
) -> None:
    """Every batch through the model, from where a file leaves off."""
    fingerprint = "" if path is None else _fingerprint(model)
    if path is not None and path.exists():
        moments, note = load_named(path)
        _checks.check_same_model(path, note.get("model") == fingerprint)
        device = _device(model)
        collected.moments = {name: m.to(device) for name, m in moments.items()}
        collected.batches = note["batches"]

    def save() -> None:
        if path is not None:
            note = {"model": fingerprint, "batches": collected.batches}
            save_named(path, collected.moments, note)

    done = collected.batches
    with _bar(loader, batches, done, progress) as advance:
        try:
            for batch in islice(loader, done, batches):
                whole = dict(collected.moments)
                try:
                    forward(model, batch)
                except BaseException:
                    collected.moments = whole  # without the layers that this batch reached
                    raise
                collected.batches += 1
                advance()
                if collected.batches % save_every == 0:
                    save()
        finally:
            save()


def _device(model: Module) -> torch.device:
    first = next(iter(model.parameters()), None)
    return torch.device("cpu") if first is None else first.device


def _call(model: Module, batch: Any) -> Any:
    device = _device(model)

    def moved(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else value

    if isinstance(batch, Mapping):
        return model(**{name: moved(value) for name, value in batch.items()})
    if isinstance(batch, (tuple, list)):
        batch = batch[0]
    return model(moved(batch))


def _fingerprint(model: Module) -> str:
    """What tells one model from another: its parameters, by name and value."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        value = parameter.detach()
        value = value.to_local() if hasattr(value, "to_local") else value
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@contextlib.contextmanager
def _bar(
    loader: Iterable[Any], batches: int | None, done: int, progress: bool | None
) -> Iterator[Callable[[], Any]]:
    """A bar with rate and remaining time, and what moves it on by a batch."""
    if progress:
        require("tqdm", purpose="progress=True")
    if progress is None:
        progress = has("tqdm") and sys.stderr.isatty()
    if not progress:
        yield lambda: None
        return
    from tqdm import tqdm

    total = len(loader) if isinstance(loader, Sized) else None
    if batches is not None:
        total = batches if total is None else min(batches, total)
    with tqdm(total=total, initial=done, desc="recalibrate", unit="batch") as bar:
        yield lambda: bar.update(1)


def _merged(collected: _Collected, error: Exception | None, group: Any) -> _Collected:
    """All ranks' moments in rank order; where one has failed, an error on all of them."""
    parts: list[Any] = [None] * dist.get_world_size(group)
    said = None if error is None else f"{type(error).__name__}: {error}"
    own = {n: m.to("cpu") for n, m in collected.moments.items()}
    dist.all_gather_object(parts, (said, own, collected.batches), group=group)
    if error is not None:
        raise error
    for rank, (failed, _, _) in enumerate(parts):
        _checks.check_pass_of_rank(rank, failed)
    result = _Collected(collected.layers)
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
