"""Which torch the tests run with, for what one of them does not do."""

from __future__ import annotations

import torch
from torch.torch_version import TorchVersion


def older_than(*version: int) -> bool:
    return bool(TorchVersion(torch.__version__) < version)
