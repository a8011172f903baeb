"""What has been done to a model's modules, noted so that it can be taken back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from . import swap


def _state(module: Module) -> dict[str, Any]:
    """What a module holds, and what its dictionaries of buffers, submodules and hooks hold."""
    return {k: dict(v) if isinstance(v, dict) else v for k, v in vars(module).items()}


class Undo:
    """Every change between making this and `note_changes`, for `back`.

    What somebody has changed once more in the meantime stays as they have left it.
    """

    def __init__(self, model: Module) -> None:
        self._before = {m: (type(m), _state(m)) for m in model.modules()}
        self._after: dict[Module, tuple[type[Module], dict[str, Any]]] | None = None
        self._values: dict[Tensor, Tensor] = {}

    def note_changes(self) -> None:
        self._after = {m: (type(m), _state(m)) for m in self._before}
        for module, (_, before) in self._before.items():
            buffers = before.get("_buffers", {})
            for name, after in self._after[module][1].get("_buffers", {}).items():
                if isinstance(after, Tensor) and after is not buffers.get(name):
                    self._values[after] = after.detach().clone()

    def back(self) -> None:
        if self._after is None:
            self.note_changes()
        assert self._after is not None
        for module, (kind, before) in self._before.items():
            kind_after, after = self._after[module]
            if kind is not kind_after and type(module) is kind_after:
                swap.put(module, kind)
            held = vars(module)
            for name, was in before.items():
                became = after.get(name)
                if isinstance(was, dict) and isinstance(became, dict):
                    if name == "_buffers":
                        self._buffers_back(module, was, became)
                    else:
                        _entries_back(held[name], was, became)
            _entries_back(
                held,
                {k: v for k, v in before.items() if not isinstance(v, dict)},
                {k: v for k, v in after.items() if not isinstance(v, dict)},
            )

    def _buffers_back(self, module: Module, was: dict[str, Any], became: dict[str, Any]) -> None:
        """A buffer that was given another dtype has its own again, and the value of now."""
        for name, before in was.items():
            after, now = became.get(name), module._buffers.get(name)
            if after is before or not isinstance(before, Tensor):
                continue
            if not isinstance(after, Tensor) or not isinstance(now, Tensor):
                continue
            if now is after:
                if not _same(now, self._values[after]):
                    with torch.no_grad():
                        before.copy_(now)
                module._buffers[name] = before
            elif now.dtype == after.dtype:
                module._buffers[name] = now.to(before.dtype)


def _same(one: Tensor, other: Tensor) -> bool:
    if one.is_meta:
        return True
    return bool(((one == other) | (one.isnan() & other.isnan())).all())


def _entries_back(now: dict[str, Any], was: dict[str, Any], became: dict[str, Any]) -> None:
    missing = object()
    for key in was.keys() | became.keys():
        before, after = was.get(key, missing), became.get(key, missing)
        if before is after or now.get(key, missing) is not after:
            continue
        if before is missing:
            del now[key]
        else:
            now[key] = before
