"""What a layer takes beyond torch's arguments: options of the layer, and of a call.

An option is a keyword-only argument of the layer and an attribute of the same name, checked
whenever it is set. A layer whose options all have their defaults holds exactly what torch's holds:
the default is the class's, and an instance has an attribute only for what differs.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor

from .._ops.activation import Epilogue


class Option(NamedTuple):
    """A default, and what raises for a value that is out of order."""

    default: Any
    check: Callable[[Any], None]


class Configurable(torch.nn.Module):
    """A layer with options: each class names its own in `_own_options`."""

    _own_options: ClassVar[dict[str, Option | None]] = {}  # None: torch's own after all
    # those of all classes that this one derives from
    _options: ClassVar[dict[str, Option]] = {}
    # whether a plain call may go the short way (_ops/eager.py), which asks for these options itself
    _direct = False
    _asked_by_short_way = frozenset({"process_group"})

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        found: dict[str, Option | None] = {
            name: option
            for base in reversed(cls.__mro__)
            for name, option in vars(base).get("_own_options", {}).items()
        }
        cls._options = {name: option for name, option in found.items() if option is not None}

    def __setattr__(self, name: str, value: Any) -> None:
        option = self._options.get(name)
        if option is None:
            super().__setattr__(name, value)
            return
        if type(value) is type(option.default) and value == option.default:
            vars(self).pop(name, None)
        else:
            option.check(value)
            self._check_options({**self._chosen(), name: value})
            super().__setattr__(name, value)
        self._choose_way()

    def _check_options(self, chosen: dict[str, Any]) -> None:
        """Raise where these options do not go together, or not with the layer."""

    def _choose_way(self) -> None:
        if self._chosen().keys() <= self._asked_by_short_way and self._is_plain():
            vars(self).pop("_direct", None)
        else:
            vars(self)["_direct"] = False

    def _is_plain(self) -> bool:
        """Whether nothing but options keeps a call from the short way."""
        return True

    def _chosen(self) -> dict[str, Any]:
        """The options that differ from their defaults."""
        held = vars(self)
        return {name: held[name] for name in self._options if name in held}

    def _forget_options(self) -> None:
        """Back to all defaults, in `__dict__` alone: what the layer is left with is torch's."""
        for name in (*self._options, "_direct"):
            vars(self).pop(name, None)

    def extra_repr(self) -> str:
        chosen = (f"{name}={value!r}" for name, value in self._chosen().items())
        return ", ".join(filter(None, [super().extra_repr(), *chosen]))


class More(NamedTuple):
    """What a call was given besides the input."""

    mask: Tensor | None = None
    lengths: Tensor | None = None
    padding_value: float = 0.0
    residual: Tensor | None = None
    then: tuple[int, float] | None = None  # an activation that `fuse` found
    # what the layer's own pass does besides; set by Activated
    after: Epilogue | None = None


NOTHING = More()

C = TypeVar("C", bound=type[Configurable])


def with_options(cls: C) -> C:
    """Give a layer torch's signature, and after it a keyword-only argument for each option."""
    inherited = cls.__init__
    theirs = next(
        vars(base)["__init__"]
        for base in cls.__mro__
        if base.__module__.startswith("torch.nn.") and "__init__" in vars(base)
    )
    options = cls._options

    @functools.wraps(theirs)
    def __init__(self: Configurable, *args: Any, **kwargs: Any) -> None:
        given = {name: kwargs.pop(name) for name in options if name in kwargs}
        for name, value in given.items():
            if value is not options[name].default:
                options[name].check(value)
        inherited(self, *args, **kwargs)
        for name, value in given.items():
            setattr(self, name, value)

    signature = inspect.signature(theirs)
    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=option.default)
        for name, option in options.items()
    ]
    __init__.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[*signature.parameters.values(), *added]
    )
    cls.__init__ = __init__  # type: ignore[assignment,method-assign]
    return cls
