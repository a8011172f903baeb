"""truenorm: PyTorch's normalization layers, true to the formula, fast and practical."""

__version__ = "0.1.0"

from . import functional, nn, reference
from ._explain import explain
from ._library import info
from ._pool import empty_cache
from ._triton.tune import tune
from .convert import convert, revert
from .nn import *  # noqa: F403
from .nn import __all__ as _layers

__all__ = [
    "convert",
    "empty_cache",
    "explain",
    "functional",
    "info",
    "nn",
    "reference",
    "revert",
    "tune",
    *_layers,
]
