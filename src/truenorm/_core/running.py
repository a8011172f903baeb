"""Running statistics, which move once a batch: not where it is computed again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import by_plan, checks, operators, plain, route
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
    elif not _counts_in_int64(running):
        if torch.compiler.is_compiling() or not operators.within_backward():
            with torch.no_grad():
                plain.move(*moving)
    elif torch.compiler.is_compiling():
        operators.move_in_graph(*moving)
    elif not _by_plan(moving):
        operators.move_once(*moving)


def _counts_in_int64(running: Running) -> bool:
    """As the operators ask; the count of an averaged checkpoint may be a float."""
    count = running.num_batches_tracked
    return count is None or count.dtype is torch.int64


def _by_plan(moving: tuple[Any, ...]) -> bool:
    """Whether a plan has moved them."""
    record = moving[3]
    if not by_plan.serves(record) or operators.within_backward() or route.transformed():
        return False
    return by_plan.operator("move_", moving[:4], moving[4:], 0) is not None
