"""Norms that a user, or a library that knows truenorm, has told of."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any

from torch.nn import Module

from ..._core import checks
from ..._core.rule import Rule
from ..swap import Kind

Reader = Callable[[Any], Rule | None]

_READERS: dict[str, Reader] = {}
_GROUP = "truenorm.norms"
_loaded = False
_changes = 0


def _name(kind: Kind) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def register_norm(norm: type[Module] | str, read: Reader | Rule | None) -> None:
    """Tell truenorm what a norm of your own or of a library computes, for `convert` and `survey`.

        truenorm.register_norm(MyNorm, truenorm.Rule("rms", "cast_first", eps="variance_epsilon"))

    `convert` still runs the class against the rule before it swaps a layer, and leaves a class that
    gives anything else. Subclasses that inherit the forward are told of too. A package can do the
    same by an entry point of the group `truenorm.norms`, a function without arguments that calls
    this one.

    norm: the class, or its qualified name, "package.module.Class", which need not be imported.
    read: a Rule for every module of the class, or a function that is given a module and returns its
        Rule, or None for one that is to be left; None takes back what was told.

    Errors: TypeError for anything else.
    """
    global _changes
    name = _name(norm) if isinstance(norm, type) and issubclass(norm, Module) else norm
    checks.check_norm_name(name)
    checks.check_reader(read, Rule)
    _changes += 1
    assert isinstance(name, str)
    if read is None:
        _READERS.pop(name, None)
    elif isinstance(read, Rule):
        rule = read
        _READERS[name] = lambda module: rule
    else:
        _READERS[name] = read


def version() -> int:
    """Another number after every change of what is told."""
    return _changes


def _load() -> None:
    """Call what packages have to say, once; what fails is theirs, and is said once."""
    global _loaded
    _loaded = True
    for point in entry_points(group=_GROUP):
        try:
            point.load()()
        except Exception as error:  # whatever somebody's package raises
            # as an error it would be one of convert
            with contextlib.suppress(RuntimeWarning):
                warnings.warn(
                    f"the entry point {point.name!r} of {_GROUP} failed, and its norms are left "
                    f"as they are: {type(error).__name__}: {error}",
                    RuntimeWarning,
                    stacklevel=2,
                )


def read(module: Module, kind: Kind) -> Rule | None:
    """What was told of a module's class, or of the one that its forward is from."""
    if not _loaded:
        _load()
    for each in kind.__mro__:
        if each is Module or getattr(each, "forward", None) is not kind.forward:
            return None
        if (reader := _READERS.get(_name(each))) is not None:
            found = reader(module)
            checks.check_rule(_name(each), found, Rule)
            return found
    return None
