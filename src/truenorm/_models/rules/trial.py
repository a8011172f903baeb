"""A stand-in for a module, to be run: its class and attributes, with random weights of its own.

Nothing of the module's is touched: no hook runs, no gradient is left, no random number is drawn.
"""

from __future__ import annotations

import copy
import types
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from ..._core.rule import Rule
from ..swap import Kind

_SIMPLE = (bool, int, float, complex, str, type(None), torch.dtype, torch.device, torch.Size)
_CONTAINERS = (list, tuple, dict, set, frozenset)


class Unfit(Exception):
    """Why a module cannot be tried."""


def shadows(module: Module, name: str) -> bool:
    """Whether an instance holds something to be called in the place of what its class has.

    The class is what is tried, and the same for all its instances; a bound method of the module
    would run on the module itself.
    """
    value = vars(module)[name]
    own = getattr(value, "__self__", None) is module or hasattr(type(module), name)
    return callable(value) and own


def _hookless(module: Module, kind: Kind) -> Module:
    """Another module of class `kind` and these attributes, without tensors and submodules."""
    made: Module = kind.__new__(kind)
    Module.__init__(made)
    held = vars(made)
    for name, value in vars(module).items():
        if (name in held and name != "training") or shadows(module, name):
            continue
        if isinstance(value, _CONTAINERS):
            value = copy.deepcopy(value)
        elif not isinstance(value, _SIMPLE) and not callable(value):
            raise Unfit(f"its attribute {name!r} is a {type(value).__name__}")
        held[name] = value
    return made


def _random(name: str, like: Tensor, generator: torch.Generator) -> Tensor:
    values = torch.randn(like.shape, generator=generator)
    if name.endswith("var"):
        values = values.abs() + 0.3
        values[:1] = 1e-2  # beside which an eps counts
        return values
    # about 1, as trained weights are, and never exactly
    return values * 0.3 + (0.0 if name.endswith(("bias", "mean", "beta")) else 1.0)


def stand_in(module: Module, kind: Kind, names: dict[str, Tensor]) -> Module:
    """A module of class `kind` like this one, with random float32 tensors by these names."""
    made = _hookless(module, kind)
    generator = torch.Generator().manual_seed(20)
    for name, like in names.items():
        value = _random(name, like, generator)
        if name in module._buffers:
            made._buffers[name] = value
        else:
            made._parameters[name] = Parameter(value)
    for place in ("_parameters", "_buffers"):
        for name, value in getattr(module, place).items():
            if value is None:
                getattr(made, place)[name] = None
            elif name not in names:
                if value.numel() > 1 or value.is_floating_point():
                    raise Unfit(f"it holds {name!r}, which no rule knows")
                getattr(made, place)[name] = torch.zeros(value.shape, dtype=value.dtype)
    for name, child in module._modules.items():
        if child is None:
            made._modules[name] = None
            continue
        if any(True for _ in child.parameters()) or any(True for _ in child.buffers()):
            raise Unfit(f"its submodule {name!r} has parameters")
        made._modules[name] = _hookless_tree(child)
    return made


def _hookless_tree(module: Module) -> Module:
    made = _hookless(module, type(module))
    made._modules = OrderedDict(
        (name, None if child is None else _hookless_tree(child))
        for name, child in module._modules.items()
    )
    return made


def _held(module: Module) -> dict[str, Any]:
    """What a module's attributes are, and what the containers among them hold, by identity."""
    found: dict[str, Any] = {}
    for name, value in vars(module).items():
        within = value.values() if isinstance(value, dict) else value
        found[name] = id(value), [*map(id, within)] if isinstance(value, _CONTAINERS) else None
    return found


def watched(module: Module, *given: Tensor) -> tuple[set[str], set[str]]:
    """The names that a stand-in's forward asks it for, and those of attributes that it changes."""
    kind = type(module)
    asked: set[str] = set()

    def look(self: Module, name: str) -> Any:
        asked.add(name)
        return kind.__getattribute__(self, name)

    before = _held(module)
    made = types.new_class(kind.__name__, (kind,), {}, lambda ns: ns.update(__getattribute__=look))
    module.__class__ = made
    try:
        module.forward(*given)
    finally:
        module.__class__ = kind
    after = _held(module)
    return asked, {n for n in before.keys() | after.keys() if before.get(n) != after.get(n)}


def cast(module: Module, dtype: torch.dtype) -> Module:
    """The same values in another dtype; in place."""
    for place in ("_parameters", "_buffers"):
        held = getattr(module, place)
        for name, value in held.items():
            if value is None or not value.is_floating_point():
                continue
            made = value.detach().to(dtype, copy=True)
            held[name] = Parameter(made) if place == "_parameters" else made
    return module


@contextmanager
def quiet() -> Iterator[None]:
    """Whatever a forward draws, records or asks of the surroundings: as if it were not run."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with (
            torch.random.fork_rng(devices=[]),
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.device("cpu"),
            torch.autocast("cpu", enabled=False),
        ):
            yield
    finally:
        torch.set_default_dtype(default)


def gate(x: Tensor) -> Tensor:
    """A second input like this one."""
    generator = torch.Generator().manual_seed(23)
    return torch.randn(x.shape, generator=generator).to(x.dtype)


def inputs(shape: tuple[int, ...], rule: Rule, eps: float, dtype: torch.dtype) -> Tensor:
    """What shares a statistic is of one size, some of it so small that eps counts."""
    generator = torch.Generator().manual_seed(21)
    x = torch.randn(shape, generator=generator) + 0.3
    small = max(abs(eps) ** 0.5, 1e-3 if dtype == torch.float16 else 1e-12)
    sizes = torch.tensor([1.0, small, 0.03, 30.0, 1.0, 3.0 * small, 4.0])
    if rule.kind in ("group", "batch", "frozen"):
        along = 0 if rule.kind == "group" else 1
        scale = sizes[torch.arange(shape[along]) % len(sizes)]
        return (x * scale.reshape(-1, *(1,) * (len(shape) - 1 - along))).to(dtype)
    rows = x.movedim(rule.axis, -1)
    scale = sizes[torch.arange(rows[..., 0].numel()) % len(sizes)].reshape(rows.shape[:-1])
    return (rows * scale.unsqueeze(-1)).movedim(-1, rule.axis).contiguous().to(dtype)


def extremes(x: Tensor, axis: int) -> Tensor:
    """The same input, with one row far larger than the others, and one that holds a NaN."""
    turned = x.movedim(axis, -1).clone(memory_format=torch.contiguous_format)
    rows = turned.view(-1, turned.shape[-1])
    rows[0] *= 1e6
    rows[1, 0] = torch.nan
    return turned.movedim(-1, axis).contiguous()
