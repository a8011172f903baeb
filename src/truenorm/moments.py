"""Moments: count, mean and sum of squared deviations, and their exact merge."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ._core import checks
from ._core.merging import merge_pairs
from ._core.normalize import channel_moments

__all__ = ["Moments"]

_FORMAT = "truenorm.Moments 1"


@dataclass(frozen=True)
class Moments:
    """How many values each statistic spans, their mean, and their summed squared deviations.

    merged: n = n₁ + n₂;  δ = mean₂ − mean₁;  mean = mean₁ + δ · n₂ / n;
            m2 = m2₁ + m2₂ + δ² · n₁ · n₂ / n

    The merge is exact up to float64's rounding at any offset, so parts of a batch, batches, data
    sets and processes all give what one pass over everything would.

    Shapes: count (); mean, m2 (C,), all float64 (float32 where the device has no float64).

    Source: Chan, Golub and LeVeque 1983, https://doi.org/10.1080/00031305.1983.10483115.
    """

    count: Tensor
    mean: Tensor
    m2: Tensor

    @classmethod
    def empty(cls, num_features: int, device: Any = None) -> Moments:
        """Moments of no values: merged with others they change nothing."""
        zero = torch.zeros(num_features, dtype=torch.float64, device=device)
        return cls(torch.zeros((), dtype=torch.float64, device=device), zero, zero.clone())

    @classmethod
    def of(cls, input: Tensor) -> Moments:
        """Moments of each channel of an input (N, C, *), over samples and positions.

        Errors: TypeError for a non-tensor, ValueError for fewer than two dimensions,
        NotImplementedError for a dtype that is not floating.
        """
        checks.check_tensor("input", input)
        checks.check_floating(input)
        checks.check_at_least_2d(input, ValueError)
        mean, var = channel_moments(input.detach())
        count = mean.new_full((), input.numel() // max(input.shape[1], 1))
        return cls(count, mean, var * count)

    def merge(self, *others: Moments) -> Moments:
        """Moments of these values and those of `others`, merged in pairs of neighbours.

        Errors: ValueError where the number of features differs.
        """
        parts = [self, *others]
        for other in others:
            checks.check_same_features(self.mean.numel(), other.mean.numel())
        stacked = [torch.stack([getattr(p, name) for p in parts]) for name in ("mean", "m2")]
        count = torch.stack([p.count for p in parts])
        total, mean, m2 = merge_pairs(count[:, None], *stacked)
        return Moments(total[0], mean, m2)

    def variance(self, *, unbiased: bool = False) -> Tensor:
        """m2 / count, or with `unbiased` m2 / (count − 1); NaN where that divides by zero."""
        return self.m2 / (self.count - 1 if unbiased else self.count)

    def update(
        self, running_mean: Tensor, running_var: Tensor, momentum: float = 0.1
    ) -> tuple[Tensor, Tensor]:
        """New running statistics, moved towards these moments; the given ones stay as they are.

        running = (1 − momentum) · running + momentum · observed, the observed variance unbiased;
        in the dtypes of the running ones. Without values they are the same.
        """
        found = []
        for running, seen in (
            (running_mean, self.mean),
            (running_var, self.variance(unbiased=True)),
        ):
            wide = running.to(seen.dtype)
            moved = (1.0 - momentum) * wide + momentum * seen
            found.append(torch.where(self.count > 0, moved, wide).to(running.dtype))
        return found[0], found[1]

    def to(self, device: Any) -> Moments:
        """The same on another device."""
        return Moments(self.count.to(device), self.mean.to(device), self.m2.to(device))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write them to a file for `load`; one that is there is replaced in one step."""
        save_named(path, {"": self}, {})

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Moments:
        """Read what `save` wrote.

        Errors: ValueError where the file holds something else, FileNotFoundError where there is
        none.
        """
        named, _ = load_named(path)
        if list(named) != [""]:
            raise ValueError(
                f"`path` (={os.fspath(path)!r}) holds the moments of {len(named)} layers, not of "
                "one: pass it to truenorm.recalibrate(…, resume=path)"
            )
        return named[""]


def save_named(
    path: str | os.PathLike[str], named: dict[str, Moments], note: dict[str, Any]
) -> None:
    """Write moments by name; the file is whole at every moment, even where the process dies."""
    path = Path(path)
    content = {
        "format": _FORMAT,
        "moments": {n: [m.count.cpu(), m.mean.cpu(), m.m2.cpu()] for n, m in named.items()},
        "note": note,
    }
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        torch.save(content, beside)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def load_named(path: str | os.PathLike[str]) -> tuple[dict[str, Moments], dict[str, Any]]:
    """Read what `save_named` wrote."""
    try:
        content = torch.load(path, weights_only=True)
        if content["format"] != _FORMAT:
            raise KeyError(content["format"])
    except OSError:
        raise
    except Exception as error:  # whatever torch.load meets in foreign bytes
        raise ValueError(
            f"`path` (={os.fspath(path)!r}) is no file of moments, or not of this version: delete "
            "it, or name another one"
        ) from error
    return {name: Moments(*parts) for name, parts in content["moments"].items()}, content["note"]


def merge_named(parts: Sequence[dict[str, Moments]]) -> dict[str, Moments]:
    """Merge moments name by name; a part may lack some names."""
    names = dict.fromkeys(name for part in parts for name in part)
    merged = {}
    for name in names:
        first, *others = [part[name] for part in parts if name in part]
        merged[name] = first.merge(*others) if others else first
    return merged


# a Moments may come out of torch.func's transforms, of torch.compile and of tree_map
torch.utils._pytree.register_dataclass(Moments)
