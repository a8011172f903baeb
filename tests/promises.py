"""What the tests of the numerical promises and digest.py share: shapes that reach every path of the
kernels, and the inputs on which a promise is hard to keep.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from cases import AFFINE, LAYOUTS, Case, run
from torch import Tensor

import truenorm
from truenorm import reference

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
        # runs so short that they are columns, folded and not
        Case("BatchNorm2d", (9,), {}, (13, 9, 2, 2)),
        Case("BatchNorm2d", (70,), {}, (300, 70, 5, 3)),
    ),
    "instance": (
        Case("InstanceNorm1d", (3,), AFFINE, (2, 3, 40_001)),  # more than one piece
        Case("InstanceNorm2d", (5,), AFFINE, (3, 5, 7, 3)),
        Case("InstanceNorm2d", (64,), AFFINE, (1, 64, 17, 31)),
        Case("InstanceNorm2d", (130,), AFFINE, (2, 130, 1, 19)),
        Case("InstanceNorm3d", (1,), AFFINE, (1, 1, 5, 3, 7)),
        Case("InstanceNorm2d", (2,), AFFINE, (3, 2, 170, 197)),  # several pieces, read from cache
        Case("InstanceNorm2d", (9,), AFFINE, (7, 9, 13, 11)),  # enough samples for a task each
        Case("InstanceNorm2d", (19,), AFFINE, (11, 19, 2, 2)),  # several runs to a vector
    ),
    "group": (
        Case("GroupNorm", (2, 6), {}, (3, 6, 11, 13)),
        Case("GroupNorm", (3, 9), {}, (2, 9, 67, 173)),  # more than one piece to a group
        Case("GroupNorm", (4, 64), {}, (5, 64)),
        Case("GroupNorm", (1, 5), {}, (1, 5, 9, 1)),
        Case("GroupNorm", (7, 7), {}, (2, 7, 2, 19)),
        Case("GroupNorm", (2, 4), {}, (3, 4, 130, 131)),
        # short runs: more than are written together, and more than one piece to a group
        Case("GroupNorm", (2, 130), {}, (2, 130, 5, 5)),
        Case("GroupNorm", (1, 4100), {}, (2, 4100, 3, 3)),
    ),
    "trailing": (
        Case("LayerNorm", ((37,),), {}, (70, 37)),
        Case("LayerNorm", ((5, 7),), {}, (3, 2, 5, 7)),
        # narrower than a vector, and not all rows in eights
        Case("LayerNorm", ((7,),), {}, (75, 7)),
        Case("RMSNorm", ((24,),), {}, (21, 24)),
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

# Results of 32 MiB and more are written past the caches. The same samples fewer at a time are not.
LARGE = [
    Case("InstanceNorm2d", (16,), AFFINE, (10, 16, 237, 239)),
    Case("GroupNorm", (3, 33), {}, (21, 33, 113, 115)),
    Case("LayerNorm", ((1001,),), {}, (8900, 1001)),
    Case("BatchNorm2d", (37,), {}, (30, 37, 87, 91)),
]

OFFSETS = (1e2, 1e4, 1e6)
SCALES = (1e-30, 1e-18, 1e18, 1e30)
# the largest absolute values of inputs that span float16's range, or lie at its lower end
LARGEST = (65504.0, 1.0, 6e-5)
NOT_FINITE = (float("nan"), float("inf"), -float("inf"))


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


# ------------------------------------------------------------- inputs


class Drawn(NamedTuple):
    """A layer with an input for it and a gradient of its output."""

    case: Case
    layer: Any
    x: Tensor
    grad: Tensor


def at_offset(case: Case, offset: float) -> Drawn:
    layer = case.build()
    if "Batch" in case.layer:
        # evaluation against statistics of data like this: running_mean far from zero too
        layer.running_mean.normal_(offset)
    return Drawn(case, layer, case.input(offset=offset), torch.randn(case.shape))


def at_scale(case: Case, scale: float) -> Drawn:
    layer = case.build()
    if "Local" not in case.layer:
        # an eps that leaves values of this size their own variance
        layer.eps = 1e-5 * scale * scale
    x = (case.input(torch.float64) * scale).float()
    return Drawn(case, layer, x, torch.randn(case.shape))


def over_float16(case: Case, largest: float) -> Drawn:
    layer = case.build()
    if "Local" not in case.layer:
        layer.eps = 1e-5 * min(largest, 1.0) ** 2
    x = torch.empty(case.shape).uniform_(-largest, largest).half()
    # the input's gradient is of the size of grad / x: of 1, so that float16 can hold it
    return Drawn(case, layer, x, (torch.randn(case.shape) * largest / 8).half())


def not_finite(
    case: Case, bad: float, dtype: torch.dtype = torch.float32
) -> tuple[Drawn, Tensor, tuple[int, ...]]:
    """One bad value among others: with the clean input, and where it is."""
    layer, clean, grad = case.build(), case.input(dtype), torch.randn(case.shape).to(dtype)
    spoilt, where = clean.clone(), tuple(size // 2 for size in case.shape)
    spoilt[where] = bad
    return Drawn(case, layer, spoilt, grad), clean, where


def misaligned(x: Tensor) -> Iterator[Tensor]:
    """The same values at twenty places in memory."""
    for shift in range(20):
        yield x.new_empty(x.numel() + shift)[shift:].view(x.shape).copy_(x)


def alone_and_among(case: Case, dtype: torch.dtype) -> Iterator[tuple[Drawn, Drawn]]:
    """A sample by itself, and as the last one of a batch, in every layout."""
    layer = case.build(dtype=dtype)
    others = torch.randn(6, *case.shape[1:], dtype=dtype) * 1e3
    for place in layouts(case.shape).values():
        x, grad = case.input(dtype)[:1], torch.randn(1, *case.shape[1:], dtype=dtype)
        yield (
            Drawn(case, layer, place(x), place(grad)),
            Drawn(case, layer, place(torch.cat([others, x])), place(torch.cat([others, grad]))),
        )


def cancelling_rows(dtype: torch.dtype, offset: float) -> tuple[Tensor, Tensor, Tensor]:
    """Input, weight and bias of a LayerNorm(96) that leaves half of its rows next to nothing."""
    x = torch.randn(64, 96)
    # the same few values in every row, so that one bias per column takes all of them to nearly zero
    x[::2] = x[0]
    x = (x + offset).to(dtype)
    weight = torch.randn(96).to(dtype).float()
    x_hat = reference.layer_norm(x.double(), (96,))
    # a float32 bias that leaves of each row's output what float32 cannot hold beside it
    bias = -(x_hat[0] * weight)
    return x, weight, bias.float()


def cancelling_channels(dtype: torch.dtype, offset: float) -> tuple[Tensor, Tensor, Tensor]:
    """The same for a BatchNorm: one value of each channel comes out as next to nothing."""
    x = (torch.randn(5, 70, 9, 11) + offset).to(dtype)
    x_hat = reference.batch_norm(x.double(), None, None, None, None, training=True)
    weight = torch.randn(70)
    return x, weight, (-(x_hat[0, :, 0, 0] * weight)).float()


def same_values(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Channels of one value each, weight and bias of an InstanceNorm."""
    x = torch.tensor([0.05, 3.0, 1234.5, -0.7]).to(dtype).view(1, 4, 1, 1).expand(3, 4, 5, 7)
    return x.contiguous(), torch.randn(4), torch.randn(4)


def rounded_together() -> tuple[Any, Tensor]:
    # x · weight + bias = 2^24 + 2^16 + 1 + 2^-30: just above half way between two floats, which are
    # half way and above half way between two bfloat16. In double it is exactly half way.
    layer = truenorm.BatchNorm1d(1, eps=0.0).eval()
    layer.weight.data.fill_(16519105 / 2**24)
    layer.bias.data.fill_(2**24 + 2**16)
    return layer, torch.full((40, 1), 1.015625, dtype=torch.bfloat16)


def rounded_together_below_the_normal_floats() -> tuple[Any, Tensor]:
    # x · weight + bias = 131 · 2^-134 - 2^-150 - 2^-180: just below half way between two floats, of
    # which the upper one is half way between two bfloat16. In double it is exactly half way.
    layer = truenorm.BatchNorm1d(1, eps=0.0).eval()
    layer.weight.data.fill_((2**30 - 1) / 151 * 2.0**-148)
    layer.bias.data.fill_(131 * 2.0**-134 - 2.0**-149)
    return layer, torch.full((40, 1), 151 * 2.0**-32, dtype=torch.bfloat16)
