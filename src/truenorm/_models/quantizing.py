"""What PyTorch's quantization must be told about truenorm's layers."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import Module

from .. import nn
from .converting import revert

_BEFORE = tuple(
    getattr(torch.nn, f"{name}{dims}d") for name in ("Conv", "ConvTranspose") for dims in (1, 2, 3)
)
_NORMS = {
    torch.nn.BatchNorm1d: nn.BatchNorm1d,
    torch.nn.BatchNorm2d: nn.BatchNorm2d,
    torch.nn.BatchNorm3d: nn.BatchNorm3d,
}


def fuse_config() -> dict[str, Any]:
    """What lets torch.ao's eager fusing take truenorm's BatchNorm layers as it takes torch's.

    `fuse_modules` and `fuse_modules_qat` find a way to fuse layers by their exact classes; pass
    this as their `fuse_custom_config_dict`, and they take every sequence with a BatchNorm of
    truenorm's that they take with torch's: convolutions, transposed convolutions and Linear before
    it, a ReLU after it. The BatchNorm within a fused module is torch's, as with `revert`.

    Errors: NotImplementedError where this torch has no eager fusing any more.
    """
    try:
        from torch.ao.quantization import get_fuser_method
    except ImportError as error:
        raise NotImplementedError(
            f"torch {torch.__version__} has no torch.ao.quantization.fuse_modules: quantize with "
            "torchao, the model exported within truenorm.standard_ops()"
        ) from error
    mapping: dict[tuple[type[Module], ...], Callable[..., Module]] = {}
    before, after = (*_BEFORE, torch.nn.Linear), ((), (torch.nn.ReLU,))
    for first, (theirs, ours), last in itertools.product(before, _NORMS.items(), after):
        try:
            fuse = get_fuser_method((first, theirs, *last))
        except AssertionError:  # no sequence that it knows
            continue
        sequence = (first, ours, *last)
        mapping[sequence] = _of_torchs(fuse)
    return {"additional_fuser_method_mapping": mapping}


def _of_torchs(fuse: Callable[..., Module]) -> Callable[..., Module]:
    def fuse_reverted(is_qat: bool, *modules: Module) -> Module:
        return fuse(is_qat, *(revert(m) for m in modules))

    return fuse_reverted
