"""RMSNorm beside a gate on CUDA tensors: a launch forward, one and a sum of parts backward."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from .._core import plain_gated
from .._core.call import (
    BEFORE,
    GROUPS,
    KEEP,
    NEEDS_INPUT,
    NEEDS_WEIGHT,
    ROUNDS_PRODUCT,
    ROUNDS_X_HAT,
    SWISH,
)
from . import config, replay, sums, view
from . import gated as kernels
from .config import Launch


def launch_of(x: Tensor, groups: int, *, backward: bool) -> Launch | None:
    """A tile of some rows' values of a group, None where one group does not fit."""
    _, width = view.compute(x)
    launch = config.whole(
        x.shape[-1] // groups,
        1,
        columns=False,
        grouped=False,
        width=width.itemsize,
        backward=backward,
        # so that both directions take the same
        crowded=not backward,
    )
    if launch is not None and backward:
        # of three tensors and their products: half as much of each to a thread
        launch = dataclasses.replace(launch, warps=min(2 * launch.warps, 32))
    return launch


def fits(x: Tensor, groups: int) -> bool:
    """Whether a group of a row fits on chip."""
    return launch_of(x, groups, backward=True) is not None


def _rows(t: Tensor, group: int) -> tuple[Tensor, int | None]:
    """t as it is read, and how far apart its rows are, in sixteen values: None for dense ones."""
    n, c = t.shape
    inside = (c == 1 or t.stride(1) == 1) and view.aligned(t)
    if not inside or not (n == 1 or t.stride(0) == c or t.stride(0) % 16 == group % 16 == 0):
        return view.dense(t, (c, 1)), None
    return t, None if n == 1 or t.stride(0) == c else t.stride(0) // 16


class _Call:
    """What both kernels are given."""

    def __init__(
        self, x: Tensor, gate: Tensor, weight: Tensor | None, bits: int, eps: float, order: int
    ) -> None:
        n, c = x.shape
        self.groups = bits >> GROUPS
        k = c // self.groups
        self.x, x_step = _rows(x, k)
        self.gate, gate_step = _rows(gate, k)
        self.weight = view.optional(weight)
        self.acc, self.kept = view.compute(x)
        self.statistics = n * self.groups
        sizes = n, self.groups, k, self.statistics
        self.numbers = *sizes, x_step, gate_step, view.bits(eps)
        wide = tl.int64 in (view.index(self.x), view.index(self.gate))
        self.constants = {
            "BEFORE": bool(order & BEFORE),
            "SWISH": bool(order & SWISH),
            "HAS_WEIGHT": int(weight is not None),
            "ACC": self.acc,
            "INDEX": tl.int64 if wide else tl.int32,
        }

    def blocks(self, launch: Launch) -> int:
        return -(-self.x.shape[0] // launch.units)

    def tile(self, launch: Launch) -> dict[str, Any]:
        return {"BU": launch.units, "BK": launch.values, **view.launch_options(launch.warps)}

    def new(self, wanted: bool = True) -> Tensor:
        return torch.empty(
            self.x.shape if wanted else (0,), dtype=self.x.dtype, device=self.x.device
        )


def gated_norm(
    x: Tensor, gate: Tensor, weight: Tensor | None, bits: int, eps: float, order: int
) -> tuple[Tensor, Tensor]:
    launch = launch_of(x, bits >> GROUPS, backward=False)
    if launch is None:
        return plain_gated.gated_norm(x, gate, weight, bits, eps, order)
    with view.on(x):
        call = _Call(x, gate, weight, bits, eps, order)
        y, keep = call.new(), bool(bits & KEEP)
        shape = (3, call.statistics) if keep else (0,)
        record = torch.empty(shape, dtype=torch.float64, device=x.device)
        replay.launch(
            kernels.gated, (call.blocks(launch) * call.groups,),
            call.x, call.gate, call.weight, y, record, *call.numbers,
            **call.tile(launch), **call.constants, KEEP=keep,
            # of wider types these round nothing
            ROUNDS_X_HAT=bool(order & ROUNDS_X_HAT), ROUNDS_PRODUCT=bool(order & ROUNDS_PRODUCT),
        )  # fmt: skip
        return y, record


def gated_norm_backward(
    grad: Tensor, x: Tensor, gate: Tensor, record: Tensor, weight: Tensor | None, bits: int,
    eps: float, order: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    launch = launch_of(x, bits >> GROUPS, backward=True)
    if launch is None:
        return plain_gated.gated_norm_backward(grad, x, gate, record, weight, bits, eps, order)
    with view.on(x):
        inputs = bool(bits & NEEDS_INPUT)
        params = weight is not None and bool(bits & NEEDS_WEIGHT)
        call = _Call(x, gate, weight, bits, eps, order)
        grad = view.dense(grad.to(x.dtype), (x.shape[1], 1))
        of_x, of_gate = call.new(inputs), call.new(inputs)
        blocks = call.blocks(launch)
        # all groups' programs together are as many as a norm of whole rows would have
        processors = -(-view.processors(x.device) // call.groups)
        programs = config.programs(blocks, launch.warps, processors)
        parts = of_weight = torch.empty(
            (x.shape[1] if params else 0,),
            dtype=x.dtype if weight is None else weight.dtype,
            device=x.device,
        )
        if params:
            parts = torch.empty((programs, x.shape[1]), dtype=call.kept, device=x.device)
        replay.launch(
            kernels.gated_backward, (programs * call.groups,),
            grad, call.x, call.gate, view.flat(record), call.weight, of_x, of_gate, parts,
            *call.numbers, blocks,
            **call.tile(launch), **call.constants, NEEDS_INPUT=inputs, NEEDS_WEIGHT=params,
            # 64 registers to a thread are few
            STAGES=config.STAGES if launch.warps < 32 else 1,
            ROWS=config.at_once(launch, x.element_size(), columns=False),
        )  # fmt: skip
        if params:
            _add_up(parts, of_weight)
        return of_x, of_gate, of_weight


def _add_up(parts: Tensor, total: Tensor) -> None:
    """The columns of `parts`. There is no bias: its place is given weight's sums once more."""
    programs, c = parts.shape
    merge = config.merge(programs, neighbours=True)
    replay.launch(
        sums.merge_sums, (-(-c // merge.units),),
        parts, parts, None, None, None, total, total,
        c, c, 1, c, 0, 0, programs, 1, 1, c, 0, 0,
        STATISTICS=False, PARAMETERS=True, PARTED=False, HAS_WEIGHT=0, HAS_MASK=False,
        BQ=merge.units, BP=merge.values, **view.launch_options(merge.warps),
    )  # fmt: skip
