"""The outputs of a model's layers, in the order of their calls, eager or compiled."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Module

from ..layers import kind_of
from ..running import Call, run, tensors


class Key(NamedTuple):
    """A call of a layer: its name, and which of its calls it is."""

    name: str
    call: int


Sink = Callable[[Key, Module, list[Tensor]], None]


def original(model: Module) -> Module:
    """The model that torch.compile wrapped, or the model itself."""
    inner = model._modules.get("_orig_mod")
    return model if inner is None else inner


def layers_of(model: Module) -> dict[str, Module]:
    """Every module that holds no others, and every normalization layer, by name.

    Not what is inside a part that is compiled on its own: its layers are not called one by one.
    """
    found: dict[str, Module] = {}
    compiled: list[str] = []
    for name, module in original(model).named_modules():
        if any(name.startswith(prefix) for prefix in compiled):
            continue
        if original(module) is not module:
            compiled.append(name + ".")
            found[name] = module
        elif name and (not any(True for _ in module.children()) or kind_of(module) is not None):
            found[name] = module
    return found


class _Tapped(Module):
    """A model whose compiled form also yields what its layers gave."""

    def __init__(self, model: Module) -> None:
        super().__init__()
        self.model = model
        self.found: list[tuple[str, Any]] = []

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        # a list of this call alone, as the compiler takes it
        self.found = []
        return self.model(*args, **kwargs)


def record(
    model: Module, name: str, batch: Any, call: Call | None, stack: ExitStack, sink: Sink
) -> Any:
    """Run the model, and give the sink each layer's output as it comes; returns the model's.

    A compiled model is compiled once more, with the layers' outputs among its own; they come after
    the run.
    """
    layers = layers_of(model)
    counts: Counter[str] = Counter()

    def give(layer: str, output: Any) -> None:
        key = Key(layer, counts[layer])
        counts[layer] += 1
        sink(key, layers[layer], tensors(output))

    tapped = None
    if original(model) is not model:
        tapped = _Tapped(original(model))
    for layer, module in layers.items():
        hook = _eager_hook(layer, give) if tapped is None else _compiled_hook(layer, tapped)
        stack.callback(module.register_forward_hook(hook).remove)
    if tapped is None:
        return run(model, batch, call, name)
    context: Any = getattr(model, "dynamo_ctx")  # noqa: B009  (a Module's attributes are untyped)
    output = run(context(tapped), batch, call, name)
    for layer, found in tapped.found:
        give(layer, found)
    return output


def _eager_hook(layer: str, give: Callable[[str, Any], None]) -> Callable[..., None]:
    def hook(module: Module, args: Any, output: Any) -> None:
        give(layer, output)

    return hook


def _compiled_hook(layer: str, tapped: _Tapped) -> Callable[..., None]:
    def hook(module: Module, args: Any, output: Any) -> None:
        # a copy: a later layer may write into it
        tapped.found.append((layer, torch.utils._pytree.tree_map_only(Tensor, _copy, output)))

    return hook


def _copy(value: Tensor) -> Tensor:
    return value.clone()
