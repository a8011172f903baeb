"""Outputs that are made again in the backward pass rather than kept for it."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from . import route

_local = threading.local()
_lock = threading.Lock()
contexts = 0  # that are open, in all threads: asked first, in every call
_RECIPE = "_truenorm_recipe"


class _Kept:
    """A tensor as it was, which a change in place makes useless."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.version = tensor.detach(), tensor._version

    def get(self) -> Tensor:
        if self.tensor._version != self.version:
            raise RuntimeError(
                "a tensor that a normalization layer's output is to be recomputed from has been "
                f"modified by an inplace operation: shape {tuple(self.tensor.shape)}, version "
                f"{self.tensor._version}, expected {self.version}; call backward() before changing "
                "it, or leave out truenorm.recompute_outputs()"
            )
        return self.tensor


class _Recipe:
    """How an output is made; a tensor among its inputs may have a recipe itself."""

    def __init__(self, op: Any, tensors: tuple[Any, ...], rest: tuple[Any, ...]) -> None:
        self.op, self.rest = op, rest
        self.tensors = [t if t is None else _pack(t) for t in tensors]
        self.made: Any = lambda: None

    def get(self) -> Tensor:
        made: Tensor | None = self.made()
        if made is None:
            tensors = [t if t is None else t.get() for t in self.tensors]
            with torch.no_grad(), torch._C._AutoDispatchBelowAutograd():
                found = self.op._op(*tensors, *self.rest)
            made = found if isinstance(found, Tensor) else found[0]
            # whoever saved it as well takes the same one, while that lives
            self.made = weakref.ref(made)
        assert made is not None
        return made


def _pack_saved(tensor: Tensor) -> Tensor | _Kept | _Recipe:
    # what is done here would become part of a trace
    return tensor if route.tracing() else _pack(tensor)


def _pack(tensor: Tensor) -> _Kept | _Recipe:
    recipe, version = getattr(tensor, _RECIPE, (None, 0))
    if recipe is not None and tensor._version == version:
        return recipe  # type: ignore[no-any-return]
    return _Kept(tensor)


def _unpack(packed: Tensor | _Kept | _Recipe) -> Tensor:
    return packed if isinstance(packed, Tensor) else packed.get()


def asked() -> bool:
    """Whether outputs are to be made again, on this thread."""
    return contexts > 0 and bool(getattr(_local, "depth", 0))


def remember(y: Tensor, op: Any, tensors: tuple[Any, ...], rest: tuple[Any, ...]) -> None:
    """That y is the first output of op(*tensors, *rest), where that is asked for."""
    if asked():
        setattr(y, _RECIPE, (_Recipe(op, tensors, rest), y._version))


@contextmanager
def recompute_outputs() -> Iterator[None]:
    """Save no output of a truenorm layer for the backward pass: make it again there.

    A layer's backward needs its input, and the layers after it save its output as their own input:
    twice the memory for what one pass over the input makes again. Within this context they save how
    the output is made instead, where a kernel makes it (not with a mask per channel, nor across
    processes). The results and the gradients are the same to the bit.

        with truenorm.recompute_outputs():
            loss = criterion(model(x), y)
        loss.backward()

    It serves training: without a gradient to come nothing is saved anyway. The outputs' memory is
    free as soon as the next layers are done with it. It costs one more pass of the layer for each
    output that is asked for; in a chain of residual=, each output is made from the one before.

    Errors: RuntimeError in the backward pass where a layer's input or parameters have been changed
    in place since.

    Source: the checkpointing form of Rota Bulò et al. 2018, https://arxiv.org/abs/1712.02616, for
    any activation, and any weight.
    """
    global contexts
    with _lock:
        contexts += 1
    _local.depth = getattr(_local, "depth", 0) + 1
    try:
        with torch.autograd.graph.saved_tensors_hooks(_pack_saved, _unpack):
            yield
    finally:
        _local.depth -= 1
        with _lock:
            contexts -= 1
