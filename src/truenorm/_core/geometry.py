"""Which values of a tensor share one statistic, and how a tensor lies in memory.

Every layer is stated here once, as an `Axes`; the kernels, the plain path and the shape rules of
the compiler all read it from there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Axes(NamedTuple):
    """Which values share one statistic.

    A tensor is seen as (N, C, S): samples, channels, positions.

    num_groups: 0 where a channel shares its statistic over the whole batch, (N, S) values each;
        G > 0 where each sample has G statistics of its own, (C / G · S) values each.
    feature_dims: 0 for inputs (N, C, *positions); k > 0 where the last k dimensions are the
        channels (no positions) and all others the samples.
    centred: False where the mean is taken as zero (RMSNorm).
    as_given: True where the result keeps a memory in which the features lie outside of the
        positions, as the channels of a contiguous image do.
    """

    num_groups: int
    feature_dims: int
    centred: bool
    as_given: bool = False


BATCH = Axes(num_groups=0, feature_dims=0, centred=True)


def instance(num_channels: int) -> Axes:
    return Axes(num_groups=num_channels, feature_dims=0, centred=True)


def group(num_groups: int) -> Axes:
    return Axes(num_groups=num_groups, feature_dims=0, centred=True)


def layer(normalized_dims: int) -> Axes:
    return Axes(num_groups=1, feature_dims=normalized_dims, centred=True)


def rms(normalized_dims: int) -> Axes:
    return Axes(num_groups=1, feature_dims=normalized_dims, centred=False)


def product(sizes: Sequence[int]) -> int:
    result = 1
    for size in sizes:
        result *= size
    return result


# looked up: the short way of small inputs asks at each call
RMS_EPS = {
    dtype: torch.finfo(torch.float32 if dtype.itemsize < 4 else dtype).eps
    for dtype in vars(torch).values()
    if isinstance(dtype, torch.dtype) and (dtype.is_floating_point or dtype.is_complex)
}


def rms_eps(eps: float | None, dtype: torch.dtype) -> float:
    """RMSNorm's eps; None is what torch takes: that of the dtype which it computes in."""
    return RMS_EPS[dtype] if eps is None else eps


def ncs(shape: Sequence[int], axes: Axes) -> tuple[int, int, int]:
    """(N, C, S) of a shape."""
    if axes.feature_dims:
        split = len(shape) - axes.feature_dims
        return product(shape[:split]), product(shape[split:]), 1
    return shape[0], shape[1], product(shape[2:])


def num_statistics(shape: Sequence[int], axes: Axes) -> int:
    n, c, _ = ncs(shape, axes)
    return n * axes.num_groups if axes.num_groups else c


def values_per_statistic(shape: Sequence[int], axes: Axes) -> int:
    n, c, s = ncs(shape, axes)
    return c // axes.num_groups * s if axes.num_groups else n * s


def grouped_view(x: Tensor, axes: Axes) -> tuple[Tensor, list[int]]:
    """x as (N, G, C / G, S), and the dimensions that one statistic spans."""
    n, c, s = ncs(x.shape, axes)
    if axes.num_groups:
        return x.reshape(n, axes.num_groups, c // axes.num_groups, s), [2, 3]
    return x.reshape(n, c, 1, s), [0, 2, 3]


def inside_out(sizes: Sequence[int], strides: Sequence[int]) -> list[int]:
    """The dimensions from the innermost in memory to the outermost.

    In comparisons alone: the compiler sorts no sizes that it does not know, but compares them.
    """
    order: list[int] = []
    for d in range(len(sizes)):
        at = len(order)
        while at and _is_inside(d, order[at - 1], sizes, strides):
            at -= 1
        order.insert(at, d)
    return order


def _is_inside(one: int, other: int, sizes: Sequence[int], strides: Sequence[int]) -> bool:
    if strides[one] != strides[other]:
        return strides[one] < strides[other]
    return sizes[one] < sizes[other]


def are_in_order(x: Tensor, first: int, last: int) -> bool:
    """Whether these dimensions lie in memory as they follow one another."""
    sizes = zip(x.stride()[first:last], x.shape[first:last], strict=True)
    steps = [stride for stride, size in sizes if size != 1]
    return all(steps[d] >= steps[d + 1] for d in range(len(steps) - 1))


def laid_out(t: Tensor, strides: Sequence[int]) -> Tensor:
    """The same values, in the order of dense memory with these strides."""
    if t.stride() == strides:
        return t
    order = inside_out(t.shape, strides)[::-1]
    return t.permute(order).contiguous().permute([order.index(d) for d in range(t.dim())])


def _fills(sizes: Sequence[int], strides: Sequence[int], start: int, *, ordered: bool) -> bool:
    """Whether these dimensions, in any order unless `ordered`, tile memory from stride `start`."""
    dims = [d for d, size in enumerate(sizes) if size != 1]
    sizes, strides = [sizes[d] for d in dims], [strides[d] for d in dims]
    order = range(len(dims))[::-1] if ordered else inside_out(sizes, strides)
    for d in order:
        if strides[d] != start:
            return False
        start *= sizes[d]
    return True


def fills(sizes: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether these dimensions are dense in memory, and in order."""
    return _fills(sizes, strides, 1, ordered=True)


def is_turned(sizes: Sequence[int], strides: Sequence[int], feature_dims: int) -> bool:
    """Whether the features lie outside of the positions in memory, [N, C, P].

    csrc/geometry.cpp states the same.
    """
    split = len(sizes) - feature_dims
    features = [d for d in range(split, len(sizes)) if sizes[d] != 1]
    if not features or 0 in sizes:
        return False
    positions = strides[features[-1]]
    if positions <= 1 or not _fills(sizes[split:], strides[split:], positions, ordered=True):
        return False
    step, inside = 1, True
    for d in range(split)[::-1]:
        if sizes[d] == 1:
            continue
        if inside and step == positions:
            step, inside = step * product(sizes[split:]), False
        if strides[d] != step:
            return False
        step *= sizes[d]
    return not inside or step == positions


def kept_strides(x: Tensor, axes: Axes) -> tuple[int, ...]:
    """Strides of the result: the input's own where its memory is dense with the channels outside or
    inside the positions (contiguous, channels_last, permuted positions or samples), else those of
    the nearest of the two after one copy. csrc/geometry.cpp states the same rule.
    """
    shape, strides = x.shape, x.stride()
    if x.is_contiguous():
        return strides
    if axes.feature_dims:
        split = x.dim() - axes.feature_dims
        inner = product(shape[split:])
        if _fills(shape[split:], strides[split:], 1, ordered=True) and _fills(
            shape[:split], strides[:split], inner, ordered=False
        ):
            return strides
        if axes.as_given and is_turned(shape, strides, axes.feature_dims):
            return strides
        return contiguous_strides(shape)
    n, c, s = ncs(shape, axes)
    if n == 1 or strides[0] == c * s:
        rows = _fills(shape[2:], strides[2:], 1, ordered=False) and (c == 1 or strides[1] == s)
        columns = (c == 1 or strides[1] == 1) and _fills(shape[2:], strides[2:], c, ordered=False)
        if rows or columns:
            return strides
    if x.dim() > 2 and c > 1 and strides[1] == 1:
        inside = contiguous_strides((shape[0], *shape[2:], c))
        return (inside[0], 1, *inside[1:-1])
    return contiguous_strides(shape)


def contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def empty_result(x: Tensor, axes: Axes) -> Tensor:
    return x.new_empty_strided(x.shape, kept_strides(x, axes))
