"""Where the x of a norm over trailing dimensions lies, while all else of a call lies in rows."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .._core import geometry
from . import view

# as in tiles.py
IN_ROWS, TURNED, STRIDED = 0, 1, 2


class Placement(NamedTuple):
    """positions: how far apart the features are, where these lie outside of the positions.

    sizes, steps: of rows that lie apart, the sizes of the two inner of three dimensions, and how
        far apart the indices of all three are, in sixteen values.
    """

    kind: int = IN_ROWS
    positions: int = 0
    sizes: tuple[int | None, ...] = (None, None)
    steps: tuple[int | None, ...] = (None, None, None)


def turned(x: Tensor, feature_dims: int) -> int:
    """How far apart the features of an image (N, *positions, *features) are, or 0.

    Its positions are neighbours, and N is outside: what a row has as its neighbours must not
    depend on the batch.
    """
    split = x.dim() - feature_dims
    if split < 2 or not geometry.is_turned(x.shape, x.stride(), feature_dims):
        return 0
    features = zip(x.shape[split:], x.stride()[split:], strict=True)
    positions = next(step for size, step in reversed(list(features)) if size != 1)
    return positions if x.shape[0] == 1 or x.stride(0) > positions else 0


def _strided(x: Tensor, feature_dims: int) -> Placement:
    """Of dense rows in up to three dimensions, as the heads of an attention are: so aligned that
    the same is compiled as for rows that follow one another.
    """
    split = x.dim() - feature_dims
    features = geometry.product(x.shape[split:])
    rows: list[list[int]] = []
    for size, step in zip(x.shape[:split], x.stride()[:split], strict=True):
        if size == 1:
            continue
        if rows and rows[-1][1] == size * step:
            rows[-1] = [rows[-1][0] * size, step]
        else:
            rows.append([size, step])
    inside = geometry.fills(x.shape[split:], x.stride()[split:])
    fits = len(rows) <= 3 and not any(each % 16 for each in (features, *(r[1] for r in rows)))
    if not (inside and fits):
        return Placement()
    rows = [[1, 0]] * (3 - len(rows)) + rows
    return Placement(STRIDED, 0, tuple(r[0] for r in rows[1:]), tuple(r[1] // 16 for r in rows))


def of(x: Tensor, feature_dims: int, strides: tuple[int, ...], *, parted: bool) -> Placement:
    """How a kernel reads an x whose results have these strides, or that it is to be copied."""
    if x.stride() == strides:
        return Placement()
    if (positions := turned(x, feature_dims)) and not parted:
        return Placement(TURNED, positions)
    return _strided(x, feature_dims) if view.aligned(x) else Placement()
