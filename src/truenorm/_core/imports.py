"""What waits for somebody else's module: done once it is imported, or at once where it has been.

So truenorm can say to a library what it needs to know of truenorm's layers without importing it,
and the order of the two imports does not matter.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

Action = Callable[[Any], None]

_WAITING: dict[str, list[tuple[str, Action]]] = {}
# modules of these whose end of import nobody will tell
_UNTOLD: set[str] = set()
# what is done, and what failed, in words
DONE: list[str] = []
FAILED: dict[str, str] = {}


def after_import(module: str, what: str, action: Action) -> None:
    """Run action(module) once `module` has been imported: now, if it has.

    what: names the action. One that raises is in `FAILED`, with a warning: never an import error of
    somebody else's library.
    """
    _WAITING.setdefault(module, []).append((what, action))
    if module in sys.modules:
        # perhaps in the middle of its import, which imports truenorm
        _UNTOLD.add(module)
        retry()
    if _FINDER not in sys.meta_path:
        sys.meta_path.insert(0, _FINDER)


def constant_in_graphs(what: str, function: Callable[..., Any]) -> None:
    """Let torch's compiler call `function` while it makes a graph, and look no further into it.

    To mark it imports the compiler, which takes longer than all else of an import of torch.
    """
    after_import("torch._dynamo", what, lambda dynamo: dynamo.assume_constant_result(function))


def retry() -> None:
    """Run what waits for modules that are there by now."""
    for module in [m for m in _UNTOLD if _is_there(m)]:
        _UNTOLD.discard(module)
        _arrived(module)


def _is_there(module: str) -> bool:
    found = sys.modules.get(module)
    return found is not None and not getattr(found.__spec__, "_initializing", False)


def _arrived(module: str) -> None:
    for what, action in _WAITING.pop(module, ()):
        try:
            action(sys.modules[module])
        except Exception as error:
            FAILED[what] = f"{type(error).__name__}: {error}"
            # as an error it would be one of the import
            with contextlib.suppress(RuntimeWarning):
                warnings.warn(
                    f"truenorm could not be made known to {what}, which may treat its layers as "
                    f"strangers: {FAILED[what]}",
                    RuntimeWarning,
                    stacklevel=2,
                )
        else:
            DONE.append(what)


class _Finder(MetaPathFinder):
    """Finds nothing itself: what others find runs the actions after the module's own code."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if _UNTOLD:
            retry()
        if name not in _WAITING:
            return None
        for finder in sys.meta_path:
            find: Any = getattr(finder, "find_spec", None)
            if finder is self or find is None:
                continue
            spec: ModuleSpec | None = find(name, path, target)
            if spec is not None:
                _follow(spec.loader, name)
                return spec
        return None


def _follow(loader: Any, name: str) -> None:
    """Let `loader` run the actions when it has executed `name`, and then be as it was."""
    execute: Any = getattr(loader, "exec_module", None)
    if execute is None:
        _UNTOLD.add(name)
        return

    def exec_module(module: ModuleType) -> None:
        execute(module)
        if module.__name__ == name:
            _arrived(name)

    try:
        # of this one object: its class, and what else is asked of it, stay
        loader.exec_module = exec_module
    except AttributeError:
        _UNTOLD.add(name)


_FINDER = _Finder()
