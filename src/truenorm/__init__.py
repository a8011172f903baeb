"""truenorm: PyTorch's normalization layers, true to the formula, fast and practical."""

__version__ = "0.1.0"

from . import functional, nn, reference
from ._compare import compare
from ._explain import explain
from ._fold import fold
from ._inspect import inspect
from ._library import info
from ._pool import empty_cache
from ._standard import standard_ops
from .convert import convert, revert
from .nn import *  # noqa: F403
from .nn import __all__ as _layers

__all__ = [
    "compare",
    "convert",
    "empty_cache",
    "explain",
    "fold",
    "functional",
    "info",
    "inspect",
    "nn",
    "reference",
    "revert",
    "standard_ops",
    *_layers,
]
