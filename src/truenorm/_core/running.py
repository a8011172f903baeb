"""Running statistics, which move once a batch: not where it is computed again."""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks, operators, plain, route
from .call import Running


def move(running: Running, record: Tensor) -> None:
    """Towards a batch's statistics; where nothing has a variance they stay."""
    moving = *running[:3], record, running.momentum, running.skip_nonfinite
    if route.standard():
        checks.check_not_accumulating(running.gathered is not None)
        # that no gradient was asked for is not part of a trace
        plain.move(*running[:3], record.detach(), *moving[4:])
    elif running.gathered is not None:
        if torch.compiler.is_compiling() or not operators.within_backward():
            running.gathered.add(record, running.mean.numel(), running.skip_nonfinite)
    elif torch.compiler.is_compiling():
        operators.move_in_graph(*moving)
    else:
        operators.move_once(*moving)
