"""How a CUDA tensor is cut for the kernels, and what every launch is given."""

from __future__ import annotations

import struct
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from .._core import geometry
from .._core.geometry import Axes
from . import config
from .config import Launch

_HALF = (torch.bfloat16, torch.float16)
# as in tiles.py
_OF_UNITS, _OF_ROWS = 1, 2


def bits(value: float) -> int:
    """A float64 as an integer: a kernel takes floats as float32."""
    return int(struct.unpack("<q", struct.pack("<d", value))[0])


def launch_options(warps: int) -> dict[str, Any]:
    # named, since Triton 3.10 changes what it takes without
    return {"num_warps": warps, "enable_fp_fusion": True}


def on(x: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device."""
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return nullcontext()


_multiprocessors: dict[torch.device, int] = {}


def processors(device: torch.device) -> int:
    if device not in _multiprocessors:
        found = 4  # the interpreter's: small, so that small cases share programs
        if device.type == "cuda":
            found = torch.cuda.get_device_properties(device).multi_processor_count
        _multiprocessors[device] = found
    return _multiprocessors[device]


def compute(x: Tensor, *, wide: bool = False) -> tuple[Any, torch.dtype]:
    """The type that kernels compute in. wide: float64 for half precision."""
    if x.dtype == torch.float64 or (wide and x.dtype in _HALF):
        return tl.float64, torch.float64
    return tl.float32, torch.float32


def is_half(x: Tensor) -> bool:
    return x.dtype in _HALF


def index(x: Tensor) -> Any:
    reach = x.numel()
    if not x.is_contiguous():
        reach = sum((size - 1) * step for size, step in zip(x.shape, x.stride(), strict=True))
    return tl.int32 if reach < 2**31 else tl.int64


def aligned(x: Tensor) -> bool:
    """As torch's allocator gives memory: Triton compiles another kernel for what is not, whose sums
    may have another order.
    """
    return x.data_ptr() % 16 == 0


def dense(x: Tensor, strides: tuple[int, ...]) -> Tensor:
    if x.stride() == strides and aligned(x):
        return x
    return torch.empty_strided(x.shape, strides, dtype=x.dtype, device=x.device).copy_(x)


def flat(p: Tensor) -> Tensor:
    p = p.contiguous()
    return p if aligned(p) else p.clone()


def optional(p: Tensor | None) -> Tensor | None:
    return None if p is None else flat(p)


def pair(numel: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Room for two lists of partial results."""
    first, second = (torch.empty(numel, dtype=dtype, device=device) for _ in range(2))
    return first, second


def inside(x: Tensor, s: int) -> bool:
    """Whether the channels of a dense x (N, C, *) are inside its positions."""
    return s == 1 or (x.shape[1] > 1 and x.stride(1) == 1)


@dataclass(frozen=True)
class Units:
    """A tensor cut into units, as tiles.py describes them.

    U: units; C: channels; K: values of a run; R: runs, run_stride apart; D: units that share a
    statistic; samples: that have units of their own; by_value: whether parameters go by value.
    part: samples, or rows, that have parameters of their own; 0 where all have the same. spans:
        whether a channel's units in all samples share one statistic, a batch's in its parts.
    """

    U: int
    C: int
    K: int
    R: int = 1
    run_stride: int = 0
    D: int = 1
    samples: int = 1
    columns: bool = False
    by_value: bool = False
    part: int = 0
    spans: bool = False

    def blocks(self, width: int) -> int:
        """Tiles of `width` units: none of two samples where channels are inside, nor of two parts
        of the rows.
        """
        if self.columns:
            return self.U // self.C * -(-self.C // width)
        parts = self.parts if self.by_value else 1
        return parts * -(-self.U // parts // width)

    @property
    def values(self) -> int:
        """Values that share a statistic."""
        return (self.samples if self.spans else self.D) * self.R * self.K

    @property
    def statistics(self) -> int:
        return self.C if self.spans else self.U // self.D

    @property
    def features(self) -> int:
        """Values of a parameter."""
        return self.K if self.by_value else self.C

    @property
    def parts(self) -> int:
        """That have parameters of their own."""
        return self.samples // self.part if self.part else 1

    @property
    def parted(self) -> int:
        """Whose parameters they are, as tiles.py has it."""
        return (_OF_ROWS if self.by_value else _OF_UNITS) if self.part else 0

    def whole(
        self, width: int, *, backward: bool, half: bool = False, crowded: bool = False
    ) -> Launch | None:
        if self.spans:
            return None
        grouped = self.D > 1
        return config.whole(
            self.R * self.K,
            self.D if grouped else self.C,
            columns=self.columns,
            grouped=grouped,
            width=width,
            backward=backward,
            half=half,
            turns=self.by_value and not self.part and not backward,
            crowded=crowded,
        )

    def tiles(self, launch: Launch) -> dict[str, Any]:
        """What every kernel on these units is given at compile time."""
        return {
            "BU": launch.units,
            "BK": launch.values,
            "COLUMNS": self.columns,
            **launch_options(launch.warps),
        }


def units_of(x: Tensor, axes: Axes, parts: int = 1, positions: int = 0) -> Units:
    """parts: of the samples, each of which has parameters of its own. positions: how far apart the
    features of a row are, where they do not follow one another.
    """
    n, c, s = geometry.ncs(x.shape, axes)
    part = n // parts if parts > 1 else 0
    if positions:
        return Units(n, positions, c, samples=n // positions, columns=True, by_value=True)
    if axes.feature_dims:
        return Units(n, c, c, samples=n, by_value=True, part=part)
    columns = inside(x, s)
    if axes.num_groups:
        return Units(n * c, c, s, D=c // axes.num_groups, samples=n, columns=columns, part=part)
    if part:
        runs = (part * s, 1, 0) if columns else (s, part, c * s)
        return Units(parts * c, c, *runs, samples=parts, columns=columns, part=1, spans=True)
    if columns:
        return Units(c, c, n * s, columns=True)
    return Units(c, c, s, n, c * s)


class Streamed:
    """Units cut into chunks, a program each."""

    def __init__(self, units: Units, width: int, *, doubles: bool = False) -> None:
        self.units = units
        self.launch = config.streamed(
            units.K, units.C, columns=units.columns, width=width, doubles=doubles
        )
        of_sample = 1 if units.by_value else units.C
        self.cut = config.chunks(units.K, units.R, self.launch, of_sample)
        self.unit_blocks = units.blocks(self.launch.units)

    @property
    def count(self) -> int:
        return self.cut.count

    @property
    def grid(self) -> tuple[int]:
        return (self.unit_blocks * self.cut.count,)

    @property
    def sizes(self) -> tuple[int, ...]:
        u = self.units
        return u.U, u.C, u.K, u.R, u.run_stride

    @property
    def cuts(self) -> tuple[int, ...]:
        return self.cut.k_chunks, self.cut.k_chunk, self.cut.r_chunk

    def kept(self, x: Tensor) -> int:
        """How many sums of each unit a tile's threads hold."""
        if not self.units.columns:
            return self.launch.values
        return config.at_once(self.launch, x.element_size(), columns=True)

    @property
    def constants(self) -> dict[str, Any]:
        # one run after the other in memory, or one unit after the other
        first = not self.units.columns and self.units.R == 1
        # value by value, copies ahead meet in shared memory
        alone = not self.units.columns and self.units.K % 16 != 0
        stages = 1 if alone else config.STAGES
        return {**self.units.tiles(self.launch), "CHUNKS_FIRST": first, "STAGES": stages}
