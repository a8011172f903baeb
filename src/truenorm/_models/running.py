"""Running somebody's model without a trace: modes, buffers, hooks and random state come back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves, tree_map

from .._core import checks
from .leftovers import Attributes

Call = Callable[[Module, Any], Any]


def check_model(name: str, model: Any) -> None:
    """A module that holds its weights."""
    checks.check_module(name, model)
    for key, held in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(held):
            checks.fail_lazy(name, key)


def is_batch(data: Any) -> bool:
    """Whether this is one batch; else it is a loader, an iterable of batches.

    A tensor, a dictionary, and a tuple or list that begins with one of them.
    """
    if isinstance(data, (Tensor, Mapping)):
        return True
    return isinstance(data, (tuple, list)) and bool(data) and isinstance(data[0], (Tensor, Mapping))


def batches(data: Any, limit: int) -> Iterator[Any]:
    """At most `limit` batches; a loader's own error says at which batch it came."""
    if is_batch(data):
        if isinstance(data, list) and len(data) > 1:
            checks.check_not_batches(data)
        yield data
        return
    try:
        iterator = iter(data)
    except TypeError:
        checks.fail_batch("data", data)
    for index in range(limit):
        try:
            batch = next(iterator)
        except StopIteration:
            if index == 0:
                checks.fail_no_batch()
            return
        except Exception as error:
            checks.fail_loader(index, error)
        yield batch


def _fitted(value: Any, like: Tensor | None) -> Any:
    """A tensor on the model's device, and in its dtype if it holds floating point numbers."""
    if not isinstance(value, Tensor) or like is None:
        return value
    if value.is_floating_point() and like.is_floating_point():
        return value.to(like.device, like.dtype)
    return value.to(like.device)


def run(model: Module, batch: Any, call: Call | None, name: str = "model") -> Any:
    """The model's output for one batch.

    A dictionary is passed by keywords; of a tuple or list the first item is the input, as loaders
    give it; `call` says otherwise.
    """
    like = next((p for p in model.parameters() if p.is_floating_point()), None)
    batch = tree_map(lambda v: _fitted(v, like), batch)
    try:
        if call is not None:
            return call(model, batch)
        if isinstance(batch, (tuple, list)):
            batch = batch[0]
        return model(**batch) if isinstance(batch, Mapping) else model(batch)
    except Exception as error:
        checks.fail_forward(name, batch, error)


def tensors(output: Any) -> list[Tensor]:
    """The floating point tensors of an output, in order."""
    leaves = tree_leaves(output)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


@contextmanager
def untouched(*models: Module, training: bool | None = None) -> Iterator[ExitStack]:
    """Without gradients, in this mode (None: as they are); afterwards everything is as before.

    What the block enters on the stack, hooks say, is left first.
    """
    modules = list({id(m): m for model in models for m in model.modules()}.values())
    attributes = Attributes(modules)
    held = [
        (buffer, buffer.detach().clone())
        for m in modules
        for buffer in m._buffers.values()
        if buffer is not None
    ]
    tensors = (t for model in models for t in (*model.parameters(), *model.buffers()))
    devices = sorted({t.device.index or 0 for t in tensors if t.is_cuda})
    with torch.random.fork_rng(devices), torch.no_grad():
        try:
            if training is not None:
                for model in models:
                    model.train(training)
            with ExitStack() as stack:
                yield stack
        finally:
            attributes.restore()
            for buffer, copy in held:
                # NaN is not equal to itself: written back, which does no harm
                if not torch.equal(buffer, copy):
                    buffer.copy_(copy)
