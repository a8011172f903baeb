"""What is found of a layer, as plain dataclasses."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

SEVERITIES = ("error", "warning", "note")


@dataclass(frozen=True)
class Finding:
    """Something about a layer that a person should know.

    severity: "error" (results are wrong), "warning" (they suffer), or "note".
    layer: name of the layer.
    measure: what shows it, a field of `Channels` or `LayerTable`.
    channels: the channels concerned, the worst first; empty where it is the whole layer.
    text: a sentence in plain words.
    remedy: a line of Python that helps, where `model` is the model.
    """

    severity: str
    layer: str
    measure: str
    channels: tuple[int, ...]
    text: str
    remedy: str


@dataclass(frozen=True)
class Histogram:
    """How many of a sample of values lie in each of equal bins from low to high.

    Values outside are counted in the first and the last bin; NaN and Inf are left out.
    """

    low: float
    high: float
    counts: tuple[int, ...]


@dataclass(frozen=True)
class Channels:
    """One number per channel (layers over trailing dimensions: per feature) and measure.

    mean, std: of the input, over all samples and positions.
    offset: |mean| / std, the largest over the statistics that the layer normalizes with.
    eps_share: eps / (variance + eps) of the variance that the layer divides by, averaged over its
        statistics; near 1 the channel is constant or dead.
    running_mean, running_std: the layer's own; empty without running statistics.
    z: (mean − running_mean) / running_std.
    kl: of the Gaussian of this data from that of the running statistics,
        ½ · (log(running_var / var) + (var + (mean − running_mean)²) / running_var − 1).
    weight: the layer's; empty without.
    nonfinite: NaN and Inf in the input.
    """

    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    offset: tuple[float, ...] = ()
    eps_share: tuple[float, ...] = ()
    running_mean: tuple[float, ...] = ()
    running_std: tuple[float, ...] = ()
    z: tuple[float, ...] = ()
    kl: tuple[float, ...] = ()
    weight: tuple[float, ...] = ()
    nonfinite: tuple[int, ...] = ()


@dataclass(frozen=True)
class LayerTable:
    """One normalization layer.

    name, kind: its name in the model and its class.
    calls: how often it was called in all batches.
    shape, dtype, channels_last: of its first input.
    num_channels: channels, or features of layers over trailing dimensions.
    eps: the layer's.
    uses_running: whether it normalized by running statistics.
    values_per_statistic: the fewest in a call (0 for LocalResponseNorm, which has no statistic).
    values_seen: values of a channel in all batches.
    offset: largest |mean| / standard deviation of a statistic.
    eps_share: median of eps / (variance + eps) over statistics, largest in `eps_share_largest`.
    nan, inf: how many values of the input.
    zero_weights: channels whose weight is nearly zero.
    torch_error, truenorm_error: largest error of each library's kernel on the values with the
        largest offset, against float64, in standard deviations; None where it could not be run.
    before, after: distributions of a sample of the first input and output.
    """

    name: str
    kind: str
    calls: int
    shape: tuple[int, ...]
    dtype: str
    channels_last: bool
    num_channels: int
    eps: float
    uses_running: bool
    values_per_statistic: int
    values_seen: int
    offset: float
    eps_share: float
    eps_share_largest: float
    nan: int
    inf: int
    zero_weights: tuple[int, ...]
    torch_error: float | None
    truenorm_error: float | None
    before: Histogram | None
    after: Histogram | None
    channels: Channels


def grouped(findings: tuple[Finding, ...]) -> list[tuple[Finding, ...]]:
    """Findings of one severity and measure together, in the order of the first of each."""
    same: dict[tuple[str, str], list[Finding]] = {}
    for f in findings:
        same.setdefault((f.severity, f.measure), []).append(f)
    return [tuple(group) for group in same.values()]


def median(values: tuple[float, ...]) -> float | None:
    """The median of the finite values; None without any."""
    finite = sorted(v for v in values if math.isfinite(v))
    return finite[len(finite) // 2] if finite else None


def plain(value: Any, number: Callable[[float], Any]) -> Any:
    """Dictionaries, lists and numbers for JSON."""
    if isinstance(value, float):
        return number(value)
    if isinstance(value, dict):
        return {k: plain(v, number) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return [plain(v, number) for v in value]
    return value
