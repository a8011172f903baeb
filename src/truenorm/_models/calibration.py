"""One pass of `recalibrate` over the data: what it needs of the model, and what it collects."""

from __future__ import annotations

import contextlib
import hashlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm

from .. import nn
from .._core import checks, exchange
from .._core.normalize import channel_moments
from .._tools.extras import has, require
from ..moments import Moments, load_named, save_named
from ..nn._base import Spanning
from ..nn._options import STORE, Configurable, options_of
from . import swap


class Collected:
    """Moments of each layer's input so far, by name, and the batches that they are of."""

    def __init__(self, layers: Mapping[str, _NormBase]) -> None:
        self.layers = layers
        self.moments: dict[str, Moments] = {}
        self.batches = 0

    def add(self, name: str, input: Tensor) -> None:
        layer = self.layers[name]
        axis = options_of(layer).channel_axis
        if axis != 1:
            own = isinstance(layer, _InstanceNorm) and input.dim() == layer._get_no_batch_dim()
            input = (input[None] if own else input).movedim(axis, 1)
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
def calibrating(
    model: Module, layers: Mapping[str, _NormBase], collected: Collected, sync: bool
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
            theirs = swap.core(layer) is torch.nn.SyncBatchNorm
            if theirs and swap.obstacle(layer, nn.SyncBatchNorm) is None:
                swap.become(layer, nn.SyncBatchNorm)
            if isinstance(layer, Configurable):
                # a frozen layer too is normalized by the batch, as it would be in training
                changed: dict[str, Any] = {"statistics_frozen": False}
                if isinstance(layer, nn.SyncBatchNorm) and not sync:
                    vars(layer)["process_group"] = exchange.ALONE
                elif isinstance(layer, Spanning) and not sync:
                    changed["process_group"] = exchange.ALONE
                layer._take_options(layer._truenorm_options._replace(**changed))
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
            if type(layer) is not kind:
                swap.put(layer, kind)
            layer._buffers.update(buffers)
            for name in ("process_group", STORE, "_direct"):
                vars(layer).pop(name, None)
                if name in held:
                    vars(layer)[name] = held[name]
        for module, mode in modes.items():
            module.training = mode


def _recording(name: str, collected: Collected) -> Callable[..., None]:
    def hook(layer: Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        masked = kwargs.get("mask") is not None or kwargs.get("lengths") is not None
        checks.check_unmasked(name, masked)
        collected.add(name, args[0] if args else next(iter(kwargs.values())))

    return hook


def run(
    model: Module,
    loader: Iterable[Any],
    batches: int | None,
    forward: Callable[[Module, Any], Any] | None,
    collected: Collected,
    path: Path | None,
    save_every: int,
    progress: bool | None,
) -> None:
    """Every batch through the model, from where a file leaves off."""
    fingerprint = "" if path is None else _fingerprint(model)
    if path is not None and path.exists():
        moments, note = load_named(path)
        checks.check_same_model(path, note.get("model") == fingerprint)
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
                    (forward or _call)(model, batch)
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
