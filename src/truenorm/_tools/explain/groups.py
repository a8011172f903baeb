"""Which values of an input share one statistic: in words, as indices, and counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["batch", "instance", "group", "layer", "rms", "local response"]
Index = tuple[int | slice, ...]


@dataclass(frozen=True)
class Group:
    """Values that share a statistic, with the statistics that their layer takes of them.

    variance is the biased one (divided by n) that the layer uses, unbiased_variance (divided by
    n − 1) the one that it does not. RMSNorm has mean_square, LocalResponseNorm sum_of_squares.
    """

    label: str
    count: int
    mean: float | None = None
    variance: float | None = None
    unbiased_variance: float | None = None
    mean_square: float | None = None
    sum_of_squares: float | None = None


def _plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def _times(factors: Sequence[int]) -> str:
    shown = "×".join(str(f) for f in factors)
    return shown if len(factors) < 2 else f"{shown} = {prod(factors):,}"


def _span(noun: str, first: int, last: int) -> str:
    return f"{noun} {first}" if first == last else f"{noun}s {first}–{last}"


@dataclass(frozen=True)
class Sharing:
    """Which values of one input share a statistic.

    leading: for instance, layer and rms, the number of leading dimensions; each of their indices
        has a statistic of its own.
    num_groups, size: of GroupNorm and of LocalResponseNorm's window.
    """

    kind: Kind
    shape: tuple[int, ...]
    leading: int = 0
    num_groups: int = 1
    size: int = 1

    @property
    def grid(self) -> tuple[int, ...]:
        """Sizes of the grid of statistics: one statistic for each of its cells."""
        if self.kind == "batch":
            return (self.shape[1],)
        if self.kind == "group":
            return (self.shape[0], self.num_groups)
        if self.kind == "local response":
            return self.shape
        return self.shape[: self.leading]

    @property
    def factors(self) -> tuple[int, ...]:
        """Sizes whose product is the number of values of one statistic."""
        if self.kind == "batch":
            return (self.shape[0], *self.shape[2:])
        if self.kind == "group":
            return (self.shape[1] // self.num_groups, *self.shape[2:])
        if self.kind == "local response":
            return (min(self.size, self.shape[1]),)
        return self.shape[self.leading :]

    @property
    def num_statistics(self) -> int:
        return prod(self.grid)

    @property
    def num_listed(self) -> int:
        """Of the windows, which differ at every position, those at the first one are listed."""
        return self.shape[1] if self.kind == "local response" else self.num_statistics

    def coordinates(self, g: int) -> tuple[int, ...]:
        """Statistic number g's place in the grid."""
        place: list[int] = []
        for size in reversed(self.grid):
            place.append(g % size)
            g //= size
        return tuple(reversed(place))

    def window(self, channel: int) -> tuple[int, int]:
        """First and last channel of LocalResponseNorm's window, cut off at the input's edges."""
        first = channel - self.size // 2
        return max(first, 0), min(first + self.size, self.shape[1]) - 1

    def _channels(self, g: int) -> tuple[int, int]:
        per_group = self.shape[1] // self.num_groups
        return g * per_group, (g + 1) * per_group - 1

    def index(self, g: int) -> Index:
        """x[index] are the values of statistic number g."""
        if self.kind == "batch":
            return (slice(None), g)
        if self.kind == "local response":
            first, last = self.window(g)
            return (0, slice(first, last + 1), *[0] * (len(self.shape) - 2))
        place = self.coordinates(g)
        if self.kind == "group":
            first, last = self._channels(place[1])
            return (place[0], slice(first, last + 1))
        return place

    def group_of(self, position: Sequence[int]) -> int:
        """Which statistic the value at this position belongs to."""
        place = tuple(position[: self.leading])
        if self.kind in ("batch", "local response"):
            return position[1]
        if self.kind == "group":
            place = (position[0], position[1] * self.num_groups // self.shape[1])
        g = 0
        for p, size in zip(place, self.grid, strict=True):
            g = g * size + p
        return g

    def label(self, g: int) -> str:
        """Statistic number g in words."""
        if self.kind == "batch":
            return f"channel {g}"
        if self.kind == "local response":
            return f"channel {g}: {_span('channel', *self.window(g))}"
        place = self.coordinates(g)
        if self.kind == "group":
            return f"sample {place[0]}, {_span('channel', *self._channels(place[1]))}"
        if self.kind == "instance":
            names = ("sample", "channel")[-len(place) :]
            return ", ".join(f"{name} {p}" for name, p in zip(names, place, strict=True))
        return f"x[{', '.join(map(str, place))}]" if place else "all of x"

    @property
    def sentence(self) -> str:
        """What shares a statistic, as a title says it."""
        if self.kind == "batch":
            return "each channel is normalized over the whole batch"
        if self.kind == "instance":
            return "each channel of each sample is normalized alone"
        if self.kind == "group":
            channels = _plural(self.shape[1] // self.num_groups, "channel")
            return f"each group of {channels} of each sample is normalized alone"
        if self.kind == "local response":
            return f"each value is divided by the energy of {self.size} neighbouring channels"
        what = "normalized alone" if self.kind == "layer" else "divided by its root mean square"
        sizes = "×".join(map(str, self.shape[self.leading :]))
        noun = "row" if len(self.shape) - self.leading == 1 else "block"
        return f"each {noun} of {sizes} values is {what}"

    @property
    def how_many_statistics(self) -> str:
        if self.kind == "local response":
            return f"{_times(self.grid)} windows, one for each value"
        if self.kind == "batch":
            return f"one group for each of the {_plural(self.grid[0], 'channel')}"
        if self.kind in ("instance", "group") and len(self.grid) == 2:
            inner = "channel" if self.kind == "instance" else "group"
            return (
                f"{_plural(self.grid[0], 'sample')} × {_plural(self.grid[1], inner)} = "
                f"{_plural(self.num_statistics, 'group')}"
            )
        if len(self.grid) > 1:
            return f"{_times(self.grid)} groups"
        return _plural(self.num_statistics, "group")

    @property
    def how_many_values(self) -> str:
        """How the number of values of one statistic comes about."""
        if self.kind == "local response":
            return f"{_plural(self.factors[0], 'value')} (fewer at the first and last channels)"
        if prod(self.factors) == 1:
            return "1 value"
        return f"{_times(self.factors)} values"

    def statistics(self, x: Tensor) -> list[Group]:
        """Every group's statistics, of a float64 x."""
        return [self._statistics(g, x[self.index(g)]) for g in range(self.num_listed)]

    def _statistics(self, g: int, values: Tensor) -> Group:
        label, n = self.label(g), values.numel()
        if self.kind == "local response":
            return Group(label, n, sum_of_squares=torch.sum(values**2).item())
        if self.kind == "rms":
            return Group(label, n, mean_square=torch.mean(values**2).item())
        return Group(
            label,
            n,
            mean=torch.mean(values).item(),
            variance=torch.var(values, correction=0).item(),
            unbiased_variance=torch.var(values, correction=1).item() if n > 1 else None,
        )
