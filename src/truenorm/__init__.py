"""truenorm: PyTorch's normalization layers, true to the formula, fast and practical."""

__version__ = "0.1.0"

from . import _hosts, distributed, functional, nn, reference  # noqa: F401  (_hosts registers)
from ._compare import compare
from ._explain import explain
from ._fold import fold
from ._fuse import fuse, unfuse
from ._inspect import inspect
from ._library import info
from ._core.recomputed import recompute_outputs
from ._pool import empty_cache
from ._standard import standard_ops
from ._triton.tune import tune
from .accumulate import accumulate
from .convert import convert, revert, reverted
from .freeze import freeze, unfreeze
from .moments import Moments
from .nn import *  # noqa: F403
from .nn import __all__ as _layers
from .quantize import fuse_config
from .recalibrate import recalibrate

__all__ = [
    "Moments",
    "accumulate",
    "compare",
    "convert",
    "distributed",
    "empty_cache",
    "explain",
    "fold",
    "freeze",
    "functional",
    "fuse",
    "fuse_config",
    "info",
    "inspect",
    "nn",
    "recalibrate",
    "recompute_outputs",
    "reference",
    "revert",
    "reverted",
    "standard_ops",
    "tune",
    "unfreeze",
    "unfuse",
    *_layers,
]
