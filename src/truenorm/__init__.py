"""truenorm: PyTorch's normalization layers, true to the formula, fast and practical."""

__version__ = "0.1.0"

from . import distributed, functional, nn, reference
from ._explain import explain
from ._library import info
from ._pool import empty_cache
from ._triton.tune import tune
from .convert import convert, revert
from .moments import Moments
from .nn import *  # noqa: F403
from .nn import __all__ as _layers
from .recalibrate import recalibrate

__all__ = [
    "Moments",
    "convert",
    "distributed",
    "empty_cache",
    "explain",
    "functional",
    "info",
    "nn",
    "recalibrate",
    "reference",
    "revert",
    "tune",
    *_layers,
]
