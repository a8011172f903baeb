"""What was seen of a layer, as its table."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..layers import BATCH, GROUP, INSTANCE, uses_running
from .observer import MAX_FEATURES, Observer
from .tables import Channels, Histogram, LayerTable

# a weight below this share of the layer's largest hardly passes its channel on
NEARLY_ZERO = 1e-3


def _floats(values: Tensor | None) -> tuple[float, ...]:
    return () if values is None else tuple(values.detach().cpu().double().tolist())


def _weight(o: Observer) -> Tensor | None:
    weight = getattr(o.module, "weight", None)
    if not isinstance(weight, Tensor) or weight.numel() > MAX_FEATURES:
        return None
    return weight.detach().flatten().cpu().double()


def _running(o: Observer) -> tuple[Tensor, Tensor] | None:
    held = tuple(getattr(o.module, name, None) for name in ("running_mean", "running_var"))
    if not all(isinstance(t, Tensor) for t in held):
        return None
    mean, var = (t.detach().cpu().double() for t in held if t is not None)
    return mean, var


def _gap(mean: Tensor, var: Tensor, running: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """(z, KL divergence) of each channel's data from the running statistics."""
    apart = mean - running[0]
    z = apart / running[1].sqrt()
    kl = 0.5 * ((running[1] / var).log() + (var + apart * apart) / running[1] - 1.0)
    return z, kl


def _eps_shares(o: Observer, eps: float, var: Tensor, running: Any) -> tuple[Tensor, float]:
    """(share of eps in each channel, or of the layer over trailing dimensions; largest)."""
    used = var
    if running is not None and uses_running(o.module, o.kind):
        used = running[1][None]
    if not eps:
        return torch.zeros(used.shape[1], dtype=torch.float64), 0.0
    least = used.nan_to_num(torch.inf).min().item()
    return eps / (used.mean(0) + eps), eps / (least + eps)


def table(o: Observer, before: Histogram | None, after: Histogram | None) -> LayerTable:
    """The table of one layer that was called."""
    eps, weight, running, own = o.eps(), _weight(o), _running(o), o.own.all()
    per_channel = o.kind in (BATCH, INSTANCE, GROUP)
    mean = std = z = kl = offset = shares = None
    channels, largest = 0, 0.0
    if own is not None:
        shares, largest = _eps_shares(o, eps, own[1], running)
        offset = own[0].amax(0)
    if (total := o.merged.total()) is not None:
        count, mean, var = total
        std, channels = var.sqrt(), mean.numel()
        if running is not None:
            if o.kind == INSTANCE and own is not None:
                # its running variance is the average of the samples' own
                var, count = own[1].mean(0), float(o.values_per_statistic)
            z, kl = _gap(mean, var * (count / max(count - 1.0, 1.0)), running)
    zero: tuple[int, ...] = ()
    if weight is not None and weight.numel():
        size = weight.abs()
        zero = tuple((size <= NEARLY_ZERO * size.max()).nonzero().flatten().tolist())
    return LayerTable(
        name=o.name,
        kind=type(o.module).__name__,
        calls=o.calls,
        shape=o.shape,
        dtype=str(o.dtype).removeprefix("torch."),
        channels_last=o.channels_last,
        num_channels=channels,
        eps=eps,
        uses_running=uses_running(o.module, o.kind),
        values_per_statistic=o.values_per_statistic,
        values_seen=0 if total is None else int(total[0]),
        offset=0.0 if offset is None else offset.max().item(),
        eps_share=0.0 if shares is None else shares.median().item(),
        eps_share_largest=largest,
        nan=o.nan,
        inf=o.inf,
        zero_weights=zero,
        torch_error=o.errors[0],
        truenorm_error=o.errors[1],
        before=before,
        after=after,
        channels=Channels(
            mean=_floats(mean),
            std=_floats(std),
            offset=_floats(offset if per_channel else None),
            eps_share=_floats(shares if per_channel else None),
            running_mean=_floats(running[0] if running else None),
            running_std=_floats(running[1].sqrt() if running else None),
            z=_floats(z),
            kl=_floats(kl),
            weight=_floats(weight),
            nonfinite=() if o.nonfinite is None else tuple(int(n) for n in o.nonfinite.tolist()),
        ),
    )
