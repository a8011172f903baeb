"""What is seen of one layer while a model runs: its moments, merged over calls, and a sample."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from .. import moments
from ..layers import GROUP, INSTANCE, LAYER, RESPONSE, RMS, View, eps_of, trailing, view
from . import valid
from .histograms import sample
from .kernels import kernel_errors

# layers over (C, H, W), say: more features than a table can show
MAX_FEATURES = 2**15

NOTHING: Mapping[str, Any] = MappingProxyType({})


class Merged:
    """Count, mean and biased variance of each channel over all calls, by Chan's formula."""

    def __init__(self) -> None:
        # merged at the end: a small layer's time is all calls
        self._parts: list[tuple[float, Tensor, Tensor]] = []

    def add(self, count: float, mean: Tensor, var: Tensor) -> None:
        self._parts.append((count, mean, var))

    def total(self) -> tuple[float, Tensor, Tensor] | None:
        """(count, mean, variance); None where nothing was added."""
        if not self._parts:
            return None
        counts, means, variances = zip(*self._parts, strict=True)
        count = sum(counts)
        if len(counts) == 1:
            return count, means[0].cpu(), variances[0].cpu()
        # of all calls at once, about the common mean: a few operations instead of a few per call
        shares = torch.tensor(counts, dtype=torch.float64).div_(count).unsqueeze(1)
        each, within = torch.stack(means).cpu(), torch.stack(variances).cpu()
        # about the first: a large offset takes no digits
        mean = each[0] + ((each - each[0]) * shares).sum(0)
        var = ((within + (each - mean).square_()) * shares).sum(0)
        return count, mean, var


class Own:
    """The statistics that a layer normalizes with: mean and variance, one row per call or sample.

    Columns are channels; of a layer over trailing dimensions there is one column.
    """

    def __init__(self) -> None:
        self._parts: list[tuple[Tensor, Tensor]] = []

    def add(self, mean: Tensor, var: Tensor) -> None:
        self._parts.append((mean, var))

    def all(self) -> tuple[Tensor, Tensor] | None:
        """(|mean| / std, variance); None where nothing was added."""
        if not self._parts:
            return None
        mean, var = (torch.cat([p[i] for p in self._parts]).cpu() for i in (0, 1))
        return ratio(mean, var), var


def ratio(mean: Tensor, var: Tensor) -> Tensor:
    """|mean| / std; 0 / 0 is 0."""
    return torch.where(mean == 0, 0.0, mean.abs() / var.sqrt())


def _finite(var: Tensor) -> bool:
    return math.isfinite(var.sum().item())


class Observer:
    """Sees the inputs and outputs of one layer."""

    def __init__(self, name: str, module: Module, kind: str) -> None:
        self.name, self.module, self.kind = name, module, kind
        self.calls = 0
        self.shape: tuple[int, ...] = ()
        self.dtype = torch.float32
        self.channels_last = False
        self.values_per_statistic = 0
        self.merged, self.own = Merged(), Own()
        self.nan = self.inf = 0
        self.nonfinite: Tensor | None = None
        self.errors: tuple[float | None, float | None] = (None, None)
        self.before: Tensor | None = None
        self.after: Tensor | None = None

    def see_input(self, x: Any, given: Mapping[str, Any] = NOTHING) -> None:
        """given: what the call was given by name; of padding nothing is seen."""
        if not (isinstance(x, Tensor) and x.is_floating_point() and x.numel()):
            return
        seen = view(self.module, self.kind, x.detach())
        if seen is None:
            return
        parts = valid.parts(self.module, self.kind, x, seen.x, given) if given else [seen.x]
        if not parts:
            return
        first = not self.calls
        self.calls += 1
        if first:
            self.shape, self.dtype = tuple(x.shape), x.dtype
            self.channels_last = x.dim() in (4, 5) and not x.is_contiguous() and x.stride(1) == 1
            whole = parts[0] is seen.x
            self.before = sample(x if whole else torch.cat([p.flatten() for p in parts]))
        for part in parts:
            self._see_part(View(part, seen.axes), first)
            first = False

    def _see_part(self, seen: View, first: bool) -> None:
        values = seen.values_per_statistic
        if first:
            self.values_per_statistic = values
        self.values_per_statistic = min(self.values_per_statistic, values)
        own = self._see(seen.x)
        if first and own is not None:
            self.errors = kernel_errors(self.module, self.kind, seen, ratio(*own))

    def see_output(self, y: Any) -> None:
        if self.after is None and isinstance(y, Tensor) and y.is_floating_point() and y.numel():
            self.after = sample(y)

    def _see(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """Keep the moments of an input; returns mean and variance of its statistics."""
        if self.kind in (LAYER, RMS):
            return self._see_rows(x)
        if self.kind in (INSTANCE, GROUP):
            return self._see_samples(x)
        mean, var = moments.of_channels(x)
        self._merge(x, x.numel() // x.shape[1], mean, var)
        if self.kind == RESPONSE:
            return None
        self.own.add(mean[None], var[None])
        return mean, var

    def _see_samples(self, x: Tensor) -> tuple[Tensor, Tensor]:
        n, c = x.shape[:2]
        mean, var = moments.of_samples(x)
        centre = mean.mean(0)
        self._merge(x, x.numel() // c, centre, var.mean(0) + (mean - centre).square().mean(0))
        if self.kind == GROUP:
            groups = int(getattr(self.module, "num_groups"))  # noqa: B009
            mean, var = mean.view(n, groups, -1), var.view(n, groups, -1)
            centre = mean.mean(2, keepdim=True)
            var = var.mean(2, keepdim=True) + (mean - centre).square().mean(2, keepdim=True)
            each = (n, groups, c // groups)
            mean, var = (t.expand(each).reshape(n, c) for t in (centre, var))
        self.own.add(mean, var)
        return mean, var

    def _see_rows(self, x: Tensor) -> tuple[Tensor, Tensor]:
        dims = trailing(self.module)
        features = x.shape[x.dim() - dims :].numel()
        mean, var = moments.of_rows(x, dims, centred=self.kind == LAYER)
        self.own.add(mean[:, None], var[:, None])
        if features <= MAX_FEATURES:
            flat = x.reshape(-1, features)
            self._merge(flat, flat.shape[0], *moments.of_channels(flat))
        elif not _finite(var):
            self._count_nonfinite(x.reshape(1, 1, -1))
        return mean, var

    def _merge(self, x: Tensor, count: int, mean: Tensor, var: Tensor) -> None:
        if not _finite(var):
            self._count_nonfinite(x)
        self.merged.add(count, mean, var)

    def _count_nonfinite(self, x: Tensor) -> None:
        others = [d for d in range(x.dim()) if d != 1]
        nan, inf = (f(x).sum(others) for f in (torch.isnan, torch.isinf))
        self.nan += int(nan.sum())
        self.inf += int(inf.sum())
        both = nan + inf
        self.nonfinite = both if self.nonfinite is None else self.nonfinite + both

    def eps(self) -> float:
        return 0.0 if self.kind == RESPONSE else eps_of(self.module, self.dtype)
