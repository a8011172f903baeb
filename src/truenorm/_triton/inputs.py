"""A call's tensors as the kernels take them, and how they are cut."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._core import geometry
from .._core.call import FEATURES
from . import placement, view
from .form import Form, unpack
from .placement import Placement, turned
from .view import Units

# as in activation.py: the first two alone have a parameter
_LEAKY_RELU, _ELU, _GELU_TANH = 2, 4, 7
# as in tiles.py
_BY_UNIT, _SHARED, _BY_SAMPLE = 1, 2, 3
_ONE_PLUS = 2


def _order(sizes: Sequence[int], strides: Sequence[int]) -> list[int] | None:
    """Dimensions from the outermost in memory to the innermost, None where that is their order."""
    order = geometry.inside_out(sizes, strides)[::-1]
    return None if order == list(range(len(order))) else order


def _permuted(t: Tensor, order: Sequence[int]) -> Tensor:
    """t with its last dimensions in that order."""
    first = t.dim() - len(order)
    return t.permute(*range(first), *(first + d for d in order))


class Cut(NamedTuple):
    """What sizes and strides say of a call.

    strides: of its results in memory, but for what is laid out as `of_results` at the end.
    sizes, order: the leading dimensions, or the positions, and how these lie where not in order.
    """

    form: Form
    strides: tuple[int, ...]
    of_results: tuple[int, ...] | None
    sizes: tuple[int, ...]
    order: list[int] | None
    placed: Placement
    units: Units


def _cut(x: Tensor, bits: int, parts: int) -> Cut:
    form = unpack(bits, x)
    axes = form.axes
    # rows, whatever lies outside of them, where no kernel writes otherwise
    strides = geometry.kept_strides(x, axes._replace(as_given=False))
    of_results, positions = None, 0
    if axes.as_given:
        of_results = geometry.kept_strides(x, axes)
        if of_results != strides and (positions := turned(x, axes.feature_dims)):
            strides, of_results = of_results, None
    split = x.dim() - axes.feature_dims if axes.feature_dims else x.dim()
    first = 0 if axes.feature_dims else 2
    order = _order(x.shape[first:split], strides[first:split])
    if parts > 1 and order is not None and axes.feature_dims:
        # they follow one another
        strides, order = geometry.contiguous_strides(x.shape), None
    placed = Placement()
    if axes.feature_dims:
        placed = placement.of(x, axes.feature_dims, strides, parted=parts > 1)
    dense = torch.empty_strided(x.shape, strides, device="meta")
    units = view.units_of(dense, axes, parts, positions or placed.positions)
    return Cut(form, strides, of_results, x.shape[first:split], order, placed, units)


# a small input's time is all Python: what sizes and strides say is asked once
_CUTS: dict[Any, Cut] = {}
_MOST = 4096


def _cut_of(x: Tensor, bits: int, parts: int) -> Cut:
    key = x.shape, x.stride(), bits, parts, view.aligned(x)
    found = _CUTS.get(key)
    if found is None:
        if len(_CUTS) >= _MOST:
            _CUTS.clear()
        found = _CUTS[key] = _cut(x, bits, parts)
    return found


class Inputs:
    """What all kernels of a call are given.

    A statistic, and a mask, is in the order of x's dimensions, a kernel's in that of memory: they
    differ where the rows of a layer norm, or the positions of a sample, are permuted there.
    """

    def __init__(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mask: Tensor | None,
        residual: Tensor | None,
        bits: int,
        parameter: float = 0.0,
    ) -> None:
        parts, features = 1, bits >> FEATURES & 0xFF
        if weight is not None and weight.dim() > max(features, 1):
            parts = weight.shape[0]
        cut = _cut_of(x, bits, parts)
        self.form, self.strides, self._of_results, self._sizes, self._order = cut[:5]
        if self.form.rounds and not features:
            raise RuntimeError(
                f"`form` (={bits}) has ROUNDS before an activation, which no GPU kernel has: pass "
                "it for trailing dimensions"
            )
        self.placed, self.units = cut.placed, cut.units
        # what is not aligned has the order of sums that it has elsewhere, too
        self.x = view.dense(x, x.stride() if self.placed.kind else self.strides)
        # of a parameter's gradient
        self.of_weight = None if weight is None else (weight.shape, weight.dtype)
        self.has_weight = 0 if weight is None else _ONE_PLUS if self.form.one_plus else 1
        self.weight, self.bias = view.optional(weight), view.optional(bias)
        self.residual = None if residual is None else view.dense(residual, self.strides)
        self.mask: Tensor | None = None
        if mask is not None:
            self.mask = self._of_mask(mask)
        takes = self.form.act in (_LEAKY_RELU, _ELU)
        self.parameter = view.bits(parameter) if takes else None

    def _of_mask(self, mask: Tensor) -> Tensor:
        if self._order is not None:
            mask = _permuted(mask.reshape(-1, *self._sizes), self._order)
        return view.flat(mask).view(torch.uint8)

    def statistic(self, values: Tensor) -> Tensor:
        """Statistics, their last dimension, as the kernels take them."""
        if self._order is not None and self.form.axes.feature_dims:
            shape = values.shape
            values = _permuted(values.reshape(*shape[:-1], *self._sizes), self._order)
            values = values.reshape(shape)
        return view.flat(values)

    def laid_out(self, result: Tensor) -> Tensor:
        """A result in the memory that the call asks for."""
        if self._of_results is None:
            return result
        return geometry.laid_out(result, self._of_results)

    def in_rows(self) -> None:
        """x copied to where all else lies, for kernels that read it nowhere else."""
        if self.placed.kind:
            self.x, self.placed = view.dense(self.x, self.strides), Placement()
            parts = self.units.parts
            self.units = view.units_of(self.x, self.form.axes, parts)

    @property
    def units_of_statistics(self) -> Units:
        """As statistics are taken, which know nothing of parts."""
        return view.units_of(self.x, self.form.axes) if self.units.part else self.units

    def mask_kind(self, units: Units) -> int:
        """What a mask has a value for, as these units have it."""
        if self.mask is None:
            return 0
        if units.by_value:
            return _BY_UNIT
        axes = self.form.axes
        by_sample = units.spans or (axes.num_groups and not axes.feature_dims)
        return _BY_SAMPLE if by_sample and not units.columns else _SHARED

    def record(self) -> Tensor:
        """Room for one."""
        shape = 3, self.units.statistics
        return torch.empty(shape, dtype=torch.float64, device=self.x.device)

    @property
    def nothing(self) -> Tensor:
        """A record that is not wanted."""
        return torch.empty(0, dtype=torch.float64, device=self.x.device)

    def made(self, record: Tensor) -> Tensor:
        """A record that kernels have made, as a caller takes it."""
        if self._order is None or not self.form.axes.feature_dims:
            return record
        sizes = [self._sizes[d] for d in self._order]
        back = [self._order.index(d) for d in range(len(sizes))]
        return _permuted(record.view(3, *sizes), back).reshape(3, -1)

    @property
    def counts(self) -> Tensor:
        """How many valid values each statistic spans."""
        assert self.mask is not None
        units, axes = self.units, self.form.axes
        if axes.feature_dims:
            return self.mask.flatten() * units.K
        if axes.num_groups:
            valid = self.mask.view(units.samples, -1).sum(1, dtype=torch.float64) * units.D
            return valid.repeat_interleave(axes.num_groups)
        return self.mask.sum(dtype=torch.float64)

    def crowded(self, *, backward: bool) -> bool:
        """Whether a large tile would spill, as tools/triton_resources.py --extras has it: where
        channels are inside, addresses take most registers; in the backward, an exponential.
        """
        act, masked = self.form.act, self.mask is not None
        if backward:
            return _ELU <= act <= _GELU_TANH or (act > 0 and masked)
        return self.units.columns and (masked or act > 0 or self.residual is not None)

    @property
    def half(self) -> bool:
        """Whether this is half precision, whose parameters are no wider than float32."""
        wide = any(p is not None and p.dtype == torch.float64 for p in (self.weight, self.bias))
        return view.is_half(self.x) and not wide

    @property
    def twice(self) -> bool:
        """Whether an output can be a small difference of large numbers, in half precision: a unit
        in its last place is then less than float32's error.
        """
        cancels = self.bias is not None or self.residual is not None
        return self.half and cancels and not self.form.rounds

    @property
    def _rounds(self) -> bool:
        return self.form.rounds and self.x.element_size() == 2

    @property
    def rounds_sums(self) -> bool:
        """Whether a product is rounded before a sum takes it: in half precision, too, a compiler
        would fuse them.
        """
        return self._rounds and (self.bias is not None or self.residual is not None)

    @property
    def fusion(self) -> dict[str, bool]:
        """Whether a product and a sum may be rounded once."""
        fuses = not self.rounds_sums and not (self.twice and self.residual is not None)
        return {"enable_fp_fusion": fuses}

    def constants(self, units: Units) -> dict[str, Any]:
        mask, acts = self.mask_kind(units), self.form.act
        return {"MASK": mask, "ACT": acts, "ROUNDS": self._rounds, "PARTED": units.parted}
