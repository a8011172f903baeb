"""What the tests of the numerical promises share: shapes that reach every path of the kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from cases import AFFINE, LAYOUTS, Case, run
from torch import Tensor

FIXED = {"affine": True, "track_running_stats": True}

# csrc/layers.h cuts sums into pieces of 32,768 values, csrc/channels.h into 128 columns and folds
# fewer than 64; vectors have 16 lanes. Each shape is on another side of one of these limits.
SHAPES: dict[str, tuple[Case, ...]] = {
    "batch": (
        Case("BatchNorm1d", (7,), {}, (33, 7)),
        Case("BatchNorm1d", (600,), {}, (131, 600)),
        Case("BatchNorm2d", (3,), {}, (2, 3, 129, 257)),  # several pieces to a run
        Case("BatchNorm2d", (70,), {}, (5, 70, 7, 7)),  # many runs to a piece
        Case("BatchNorm2d", (1,), {}, (3, 1, 5, 11)),
        Case("BatchNorm2d", (5,), {}, (1, 5, 33, 1)),
        Case("BatchNorm3d", (33,), {}, (2, 33, 3, 5, 7)),
    ),
    "instance": (
        Case("InstanceNorm1d", (3,), AFFINE, (2, 3, 40_001)),  # more than one piece
        Case("InstanceNorm2d", (5,), AFFINE, (3, 5, 7, 3)),
        Case("InstanceNorm2d", (64,), AFFINE, (1, 64, 17, 31)),
        Case("InstanceNorm2d", (130,), AFFINE, (2, 130, 1, 19)),
        Case("InstanceNorm3d", (1,), AFFINE, (1, 1, 5, 3, 7)),
        Case("InstanceNorm2d", (2,), AFFINE, (3, 2, 170, 197)),  # several pieces, read from cache
        Case("InstanceNorm2d", (9,), AFFINE, (7, 9, 13, 11)),  # enough samples for a task each
    ),
    "group": (
        Case("GroupNorm", (2, 6), {}, (3, 6, 11, 13)),
        Case("GroupNorm", (3, 9), {}, (2, 9, 67, 173)),  # more than one piece to a group
        Case("GroupNorm", (4, 64), {}, (5, 64)),
        Case("GroupNorm", (1, 5), {}, (1, 5, 9, 1)),
        Case("GroupNorm", (7, 7), {}, (2, 7, 2, 19)),
        Case("GroupNorm", (2, 4), {}, (3, 4, 130, 131)),
    ),
    "trailing": (
        Case("LayerNorm", ((37,),), {}, (70, 37)),
        Case("LayerNorm", ((5, 7),), {}, (3, 2, 5, 7)),
        Case("LayerNorm", ((40_001,),), {}, (3, 40_001)),
        Case("RMSNorm", ((1030,),), {}, (130, 1030)),
        # wide enough that a block of samples is summed some at a time
        Case("LayerNorm", ((2100,),), {}, (130, 2100)),
        Case("RMSNorm", ((3, 11),), {}, (2, 5, 3, 11)),
    ),
    "response": (
        Case("LocalResponseNorm", (5,), {"alpha": 0.3}, (2, 9, 7, 13)),
        Case("LocalResponseNorm", (4,), {"alpha": 0.3, "beta": 0.6}, (3, 3, 67)),
        # vectors of channels and what is left of them; more than one tile of positions; the other
        # powers in float32; a window that float64 sums
        Case("LocalResponseNorm", (3,), {"alpha": 0.5, "beta": 0.5}, (2, 37, 3, 11)),
        Case("LocalResponseNorm", (8,), {"alpha": 0.5, "beta": 1.0}, (1, 19, 301)),
        Case("LocalResponseNorm", (9,), {"alpha": 0.5}, (2, 19, 5, 7)),
    ),
}
CASES = [case for cases in SHAPES.values() for case in cases]
IDS = [case.id for case in CASES]
# layers whose result for a sample must not depend on the others in the batch
ALONE = [case for kind in ("instance", "group", "trailing", "response") for case in SHAPES[kind]]


def layouts(shape: tuple[int, ...]) -> dict[str, Callable[[Tensor], Tensor]]:
    """Those layouts that differ for this rank."""
    if len(shape) < 3:
        return {name: LAYOUTS[name] for name in ("contiguous", "samples_inside", "sliced")}
    return LAYOUTS


def trainings(case: Case) -> tuple[bool, ...]:
    """Whether to test it in training mode, in evaluation mode, or in both."""
    return (True, False) if "Batch" in case.layer else (True,)


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def bits(layer: Any, x: Tensor, grad: Tensor) -> list[Tensor]:
    """Output, gradients and running statistics, bit by bit, from a fixed state."""
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    result = [t for t in run(layer, x, grad) if t is not None]
    result += [value.detach().clone() for value in layer.state_dict().values()]
    layer.load_state_dict(state)
    return [t.contiguous().view(-1).view(torch.uint8) for t in result]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(s, t) for s, t in zip(a, b, strict=True))
