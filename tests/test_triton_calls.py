"""Masks, activations and residuals in the Triton kernels, and statistics and sums that are given."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from on_triton import DEVICE, needs_triton, small_tiles
from tolerances import relative
from triton_calls import (
    ACTIVATIONS,
    BATCH,
    CONSTANT,
    GROUP,
    INSTANCE,
    KEEP,
    KINDS,
    LAYER,
    LAYERS,
    PADDING,
    RMS,
    Call,
    Kind,
    call_of,
    check,
    check_gradients,
    grad_of,
    run,
)

pytestmark = needs_triton

CUTS: dict[str, Any] = {"whole": nullcontext, "chunks": small_tiles}
BY_CUT = pytest.mark.parametrize("cut", CUTS)
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
KINKS = {1: "relu", 2: "leaky_relu", 8: "relu6"}


def ids(value: Any) -> str:
    return value.name if isinstance(value, Kind) else str(value).removeprefix("torch.")


def by_kind(*kinds: Kind) -> Any:
    return pytest.mark.parametrize("kind", kinds or KINDS, ids=ids)


# every kind under a mask and with a residual, as it lies in memory and as its dtype come in turn
MIXED = [
    (kind, layout, DTYPES[i % 4], 1 + i % 8)
    for i, (kind, layout) in enumerate(
        [(kind, layout) for kind in (BATCH, INSTANCE, GROUP) for layout in
         ("contiguous", "channels_last", "swapped", "sliced")]
        + [(LAYER, "contiguous"), (LAYER, "sliced"), (LAYERS, "rows"), (RMS, "contiguous")]
    )
]  # fmt: skip


@BY_CUT
@pytest.mark.parametrize(("kind", "layout", "dtype", "act"), MIXED, ids=ids)
def test_mask_residual_and_activation(
    kind: Kind, layout: str, dtype: torch.dtype, act: int, cut: str
) -> None:
    call = call_of(kind, dtype, layout, masked=True, residual=True, act=act)
    with CUTS[cut]():
        check(call, grad_of(call, "contiguous" if layout == "channels_last" else layout))


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("act", range(1, len(ACTIVATIONS)))
def test_activations(act: int, dtype: torch.dtype) -> None:
    """Far out on both sides too, where exponentials leave the range of numbers."""
    kind = Kind("instance", INSTANCE.bits, (1, 2, 3, 33), 2)
    call = call_of(kind, dtype, act=act)
    far = torch.tensor([1.0, 25.0]).to(call.weight)  # type: ignore[arg-type]
    check(call._replace(weight=far), grad_of(call))
