"""truenorm: PyTorch's normalization layers, true to the formula, fast and practical."""

__version__ = "0.1.0"

# ruff: isort: off
# in the order of the tree: the public modules, then what each part of truenorm adds to them
from . import distributed, functional, nn, reference
from .moments import Moments
from .nn import *  # noqa: F403
from .nn import __all__ as _layers

# every call
from ._core.library import info
from ._core.recomputed import recompute_outputs
from ._core.pool import empty_cache
from ._core.exporting import standard_ops
from ._core.graphs.options import compile_options
from ._triton.tune import tune

# whole models
from ._models import hosts as _hosts, pickles as _pickles  # noqa: F401  (they register)
from ._models.accumulating import accumulate
from ._models.comparing import compare
from ._models.converting import convert, revert, reverted
from ._models.folding import fold
from ._models.freezing import freeze, unfreeze
from ._models.fusing import fuse, unfuse
from ._models.inspecting import inspect
from ._models.kernelizing import kernel_mapping
from ._models.quantizing import fuse_config
from ._models.recalibrating import recalibrate
from ._models.rules import Rule, register_norm
from ._models.surveying import survey

# one layer, on paper
from ._tools.explain import explain
# ruff: isort: on

__all__ = [
    "Moments",
    "Rule",
    "accumulate",
    "compare",
    "compile_options",
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
    "kernel_mapping",
    "nn",
    "recalibrate",
    "recompute_outputs",
    "reference",
    "register_norm",
    "revert",
    "reverted",
    "standard_ops",
    "survey",
    "tune",
    "unfreeze",
    "unfuse",
    *_layers,
]
