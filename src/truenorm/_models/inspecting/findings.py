"""What is wrong with a layer, in plain words, and a line of code that helps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ..layers import BATCH, GROUP, INSTANCE, LAYER, RESPONSE, RMS
from .observer import Observer
from .tables import Finding, LayerTable

# An error of torch's kernel that a person would see, in standard deviations, and one that ruins
# results; float32's own roundings stay below 1e-6.
ERROR_SEEN, ERROR_RUINS = 1e-3, 0.1
# share of a standard deviation that the input's own rounding takes
ROUNDING = 0.02
# eps is half of the denominator: the layer shrinks the channel instead of normalizing it
EPS_HALF = 0.5
# Divergence of the data from the running statistics, in nats: 0.1 is a shift of 0.45 standard
# deviations, or a variance 1.6 times as large; at 1.0 evaluation sees another input than training.
KL_SEEN, KL_RUINS = 0.1, 1.0
# a mean of fewer values is off by more than a fifth, a third of a standard deviation
FEW_BATCH, FEW_OWN = 24, 8

Rule = Callable[[Observer, LayerTable], Iterator[Finding]]


def _worst(values: Sequence[float], above: float) -> tuple[int, ...]:
    """Where values exceed a bound, the largest first; what is no number counts as the largest."""
    known = [math.inf if math.isnan(v) else v for v in values]
    return tuple(sorted((i for i, v in enumerate(known) if v > above), key=lambda i: -known[i]))


def _share(count: int, total: int, what: str = "channel") -> str:
    return f"{count:,} of {total:,} {what}s" if total != 1 else f"its only {what}"


def _layer(name: str) -> str:
    return f'model.get_submodule("{name}")' if name else "model"


def _not_finite(o: Observer, t: LayerTable) -> Iterator[Finding]:
    if t.nan or t.inf:
        channels = _worst(t.channels.nonfinite, 0.0)
        kinds = " and ".join(f"{n:,} {k}" for n, k in ((t.nan, "NaN"), (t.inf, "Inf")) if n)
        yield Finding(
            "error", t.name, "nonfinite", channels,
            f"its input holds {kinds}, and every statistic with one of them gives NaN",
            "torch.autograd.set_detect_anomaly(True)  # names the operation they come from",
        )  # fmt: skip
    running = t.channels.running_mean + t.channels.running_std
    if not all(map(math.isfinite, running)):
        size = len(t.channels.running_mean)
        channels = tuple(sorted({i % size for i, v in enumerate(running) if not math.isfinite(v)}))
        yield Finding(
            "error", t.name, "running_std", channels,
            f"the running statistics of {_share(len(channels), size)} are not finite: evaluation "
            "gives NaN, though the weights may be fine",
            f"{_layer(t.name)}.reset_running_stats()  # then run some training batches",
        )  # fmt: skip


def _few_values(o: Observer, t: LayerTable) -> Iterator[Finding]:
    n = t.values_per_statistic
    if t.uses_running or o.kind == RESPONSE:
        return
    if n == 1 and o.kind != RMS:
        yield Finding(
            "error", t.name, "values_per_statistic", (),
            f"each statistic spans one value, which is its own mean: the output is the bias alone, "
            f"whatever the input of shape {t.shape} is",
            f"{_parent(t.name)} = torch.nn.Identity()  # or a larger input",
        )  # fmt: skip
    elif o.kind in (INSTANCE, GROUP) and n < FEW_OWN:
        yield Finding(
            "warning", t.name, "values_per_statistic", (),
            f"each statistic spans only {n} values: the output says little of the input's scale",
            f"{_parent(t.name)} = torch.nn.GroupNorm(1, {t.num_channels})  # all channels together",
        )  # fmt: skip
    elif o.kind == BATCH and n < FEW_BATCH:
        yield Finding(
            "warning", t.name, "values_per_statistic", (),
            f"a channel's statistics span only {n} values, and are noise of "
            f"{n**-0.5:.0%} of a standard deviation",
            f"{_parent(t.name)} = torch.nn.GroupNorm({_groups(t.num_channels)}, {t.num_channels})"
            "  # or a larger batch",
        )  # fmt: skip


def _groups(channels: int) -> int:
    return next(g for g in (32, 16, 8, 4, 2, 1) if channels % g == 0)


def _parent(name: str) -> str:
    parent, _, child = name.rpartition(".")
    holder = _layer(parent)
    return f'{holder}._modules["{child}"]' if child else "model"


def _kernel_error(o: Observer, t: LayerTable) -> Iterator[Finding]:
    error, ours = t.torch_error, t.truenorm_error
    if error is None or ours is None or type(o.module).__module__.startswith("truenorm"):
        return
    if error > ERROR_SEEN and error > 4.0 * ours:
        yield Finding(
            "error" if error > ERROR_RUINS else "warning", t.name, "torch_error", (),
            f"torch's kernel is off by {error:.1g} standard deviations on this input "
            f"({t.dtype}{', channels_last' if t.channels_last else ''}, means up to "
            f"{t.offset:.3g} standard deviations from zero), truenorm's by {ours:.1g}",
            "truenorm.convert(model)",
        )  # fmt: skip


def _offset(o: Observer, t: LayerTable) -> Iterator[Finding]:
    if o.kind in (RMS, RESPONSE):
        return
    lost = torch.finfo(o.dtype).eps / 2.0
    if not t.offset * lost > ROUNDING:
        return
    channels = _worst(t.channels.offset, ROUNDING / lost)
    where = f"in {_share(len(channels), t.num_channels)}" if channels else "in some statistics"
    if t.offset == math.inf:
        return  # constant: the share of eps says so
    yield Finding(
        "warning", t.name, "offset", channels,
        f"{where} the mean is up to {t.offset:.3g} standard deviations from zero: {t.dtype} rounds "
        f"the input by {t.offset * lost:.0%} of a standard deviation before the layer sees it",
        f"{_layer(t.name)}.register_forward_pre_hook(lambda m, x: print(x[0].mean()))"
        "  # find what shifts it; keep that part in float32",
    )  # fmt: skip


def _eps(o: Observer, t: LayerTable) -> Iterator[Finding]:
    if o.kind in (LAYER, RMS):
        if t.eps_share > EPS_HALF:
            yield Finding(
                "warning", t.name, "eps_share", (),
                f"eps ({t.eps:g}) is {t.eps_share:.0%} of the denominator: the input is so small "
                "that the layer shrinks it instead of normalizing it",
                f"{_layer(t.name)}.eps = {_smaller(t)}",
            )  # fmt: skip
        return
    channels = _worst(t.channels.eps_share, EPS_HALF)
    if not channels:
        return
    stds = t.channels.running_std if t.uses_running else t.channels.std
    constant = [c for c in channels if not stds[c] > 0.0]
    if 2 * len(channels) > t.num_channels and len(constant) < len(channels):
        yield Finding(
            "warning", t.name, "eps_share", channels,
            f"eps ({t.eps:g}) is more than half of the denominator in "
            f"{_share(len(channels), t.num_channels)}: the input is so small that the layer "
            "shrinks it instead of normalizing it",
            f"{_layer(t.name)}.eps = {_smaller(t)}",
        )  # fmt: skip
        return
    of_them = f", {len(constant)} of them constant" if constant else ""
    yield Finding(
        "warning", t.name, "eps_share", channels,
        f"{_share(len(channels), t.num_channels)} hardly vary{of_them}: they are dead, and pass "
        "only their bias on",
        f"{_layer(t.name)}.weight.data[{_indices(channels)}] = 0.0"
        "  # prune them, or look at the layer before",
    )  # fmt: skip


def _smaller(t: LayerTable) -> str:
    """An eps that is a thousandth of the typical variance."""
    typical = t.eps * (1.0 - t.eps_share) / max(t.eps_share, 1e-30)
    return f"{max(1e-3 * typical, 1e-30):.0e}"


def _indices(channels: Sequence[int]) -> str:
    shown = ", ".join(map(str, sorted(channels)[:8]))
    return f"[{shown}{', …' if len(channels) > 8 else ''}]"


def _gap(o: Observer, t: LayerTable) -> Iterator[Finding]:
    if not t.channels.kl:
        return
    tracked = getattr(o.module, "num_batches_tracked", None)
    never = isinstance(tracked, Tensor) and tracked.numel() == 1 and int(tracked) == 0
    untouched = not any(t.channels.running_mean) and set(t.channels.running_std) == {1.0}
    if never and untouched:
        yield Finding(
            "error", t.name, "kl", (),
            "its running statistics were never updated (mean 0, variance 1): evaluation does not "
            "normalize",
            "truenorm.recalibrate(model, loader)",
        )  # fmt: skip
        return
    # what a sample of this size gives by chance
    chance = 5.0 / max(t.values_seen, 1)
    channels = _worst(t.channels.kl, KL_SEEN + chance)
    channels = tuple(c for c in channels if t.channels.std[c] > 0.0)
    if not channels:
        return
    ruined = sum(t.channels.kl[c] > KL_RUINS + chance for c in channels)
    worst = channels[0]
    yield Finding(
        "error" if 2 * ruined > t.num_channels else "warning", t.name, "kl", channels,
        f"{_share(len(channels), t.num_channels)} see other data in evaluation than the running "
        f"statistics say; channel {worst} has mean {t.channels.mean[worst]:.3g} and deviation "
        f"{t.channels.std[worst]:.3g}, the layer expects {t.channels.running_mean[worst]:.3g} and "
        f"{t.channels.running_std[worst]:.3g}",
        "truenorm.recalibrate(model, loader)  # on data as in use",
    )  # fmt: skip


def _weights(o: Observer, t: LayerTable) -> Iterator[Finding]:
    if not t.zero_weights:
        return
    if len(t.zero_weights) == len(t.channels.weight):
        yield Finding(
            "note", t.name, "weight", (),
            "all its weights are zero: nothing passes but the bias (some networks begin so)",
            f"torch.nn.init.ones_({_layer(t.name)}.weight)",
        )  # fmt: skip
        return
    kind = "feature" if o.kind in (LAYER, RMS) else "channel"
    yield Finding(
        "note", t.name, "weight", t.zero_weights,
        f"{_share(len(t.zero_weights), len(t.channels.weight), kind)} have a weight near zero and "
        "can be pruned",
        f'from torch.nn.utils import prune; prune.l1_unstructured({_layer(t.name)}, "weight", '
        f"amount={len(t.zero_weights)})",
    )  # fmt: skip


def _low_statistics(o: Observer, t: LayerTable) -> Iterator[Finding]:
    running = getattr(o.module, "running_var", None)
    if isinstance(running, Tensor) and running.dtype in (torch.float16, torch.bfloat16):
        dtype = str(running.dtype).removeprefix("torch.")
        yield Finding(
            "warning", t.name, "running_std", (),
            f"its running statistics are {dtype}, which loses the updates of small batches",
            "truenorm.convert(model.float()).to(dtype)  # truenorm keeps them in float32",
        )  # fmt: skip


def left_in_training(name: str) -> Finding:
    """A layer in training mode in a model that is not."""
    return Finding(
        "warning", name, "uses_running", (),
        "it was left in training mode, though the model is in evaluation mode",
        f"{_layer(name)}.eval()",
    )  # fmt: skip


RULES: tuple[Rule, ...] = (
    _not_finite, _few_values, _kernel_error, _gap, _eps, _offset, _weights, _low_statistics,
)  # fmt: skip


def find(o: Observer, t: LayerTable) -> Iterator[Finding]:
    """Everything that is to be said about one layer."""
    for rule in RULES:
        yield from rule(o, t)
