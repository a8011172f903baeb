"""Optional packages, and the one error that a command reports without a traceback."""

from __future__ import annotations

import importlib.util


class CommandError(Exception):
    """Bad input to a command: one line that names the argument, its value and the remedy."""


class MissingPackageError(CommandError, ImportError):
    """An optional package is not installed; the message says which extra brings it."""


def has(package: str) -> bool:
    """Whether an optional package is installed."""
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:  # a name in sys.modules without a spec
        return False


_DISTRIBUTIONS = {"sklearn": "scikit-learn", "PIL": "pillow"}


def require(*packages: str, purpose: str, extra: str = "demo") -> None:
    """Raise a MissingPackageError that says which extra brings what is missing."""
    missing = [_DISTRIBUTIONS.get(p, p) for p in packages if not has(p)]
    if missing:
        names = " and ".join(missing)
        raise MissingPackageError(f'{purpose} needs {names}: pip install "truenorm[{extra}]"')
