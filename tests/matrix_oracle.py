"""The formula of every combination, by hand: float64, plain torch, differentiable by autograd.

Nothing of truenorm is asked here. What the options mean together is written in this file alone:

- a mask says which values a statistic is of; what is not valid is never read, and holds the padding
  value in the end;
- the order is: normalize, weight and bias, scale and shift, residual, activation, padding;
- ghost batches are slices of a batch, in turn. Over processes, each one's samples are sliced, and
  the first slices of all make the first ghost batch;
- renormalization takes the running statistics as they were before the batch;
- micro-batches of `accumulate` are normalized each by itself, and move running statistics once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from matrix import BATCH, INSTANCE, ROWS, Case
from torch import Tensor

EPS, MOMENTUM, PADDING = 1e-3, 0.3, -0.75
SLOPE, ALPHA = 0.2, 0.7
GROUPS, GHOST, RMAX, DMAX = 3, 2, 1.5, 0.5


class Batch(NamedTuple):
    """One call's tensors, each as the layer takes it."""

    x: Tensor
    grad: Tensor  # of the output
    residual: Tensor | None = None
    mask: Tensor | None = None
    lengths: Tensor | None = None
    scale: Tensor | None = None
    shift: Tensor | None = None


class State(NamedTuple):
    """Running statistics, float64."""

    mean: Tensor
    var: Tensor
    batches: int


class Statistics(NamedTuple):
    """Of each statistic's valid values: (N or 1, C, 1, …)."""

    mean: Tensor
    var: Tensor
    count: Tensor


def axis_of(case: Case, x: Tensor) -> int:
    return 1 if case.channel_axis == "axis 1" else x.dim() - 1


def valid_of(case: Case, batch: Batch) -> Tensor:
    """Which values of x count, in x's own shape."""
    x, axis = batch.x, axis_of(case, batch.x)
    if batch.lengths is not None:
        # (N, C, L) or (N, L, C)
        inside = torch.arange(x.shape[3 - axis]) < batch.lengths[:, None]
        return inside.unsqueeze(axis).expand(x.shape)
    if batch.mask is None:
        return torch.ones_like(x, dtype=torch.bool)
    if case.mask == "mask per channel":
        return batch.mask
    if case.layer in ROWS:
        return batch.mask.view(*batch.mask.shape, *(1 for _ in x.shape[2:])).expand(x.shape)
    return batch.mask.unsqueeze(axis).expand(x.shape)


def _normalized(case: Case, x: Tensor, valid: Tensor) -> tuple[Tensor, Statistics]:
    """x (N, C, *positions) by the statistics of its valid values."""
    if case.layer == "GroupNorm":
        shape = x.shape[0], GROUPS, -1
        x_hat, found = _centred(x.reshape(shape), valid.reshape(shape), (2,), True)
        return x_hat.reshape(x.shape), found
    dims = tuple(range(2, x.dim()))
    return _centred(x, valid, (0, *dims) if case.layer in BATCH else dims, case.layer != "RMSNorm")


def _centred(
    x: Tensor, valid: Tensor, dims: tuple[int, ...], has_mean: bool
) -> tuple[Tensor, Statistics]:
    count = valid.sum(dims, keepdim=True).double()
    some = count.clamp(min=1.0)
    values = torch.where(valid, x, 0.0)
    mean = values.sum(dims, keepdim=True) / some if has_mean else torch.zeros_like(count)
    d = torch.where(valid, values - mean, 0.0)
    var = (d * d).sum(dims, keepdim=True) / some
    return d / torch.sqrt(var + EPS), Statistics(mean, var, count)


def _by_running(x: Tensor, state: State) -> Tensor:
    """x (N, C, *positions) by running statistics."""
    shape = (1, -1, *(1 for _ in x.shape[2:]))
    return (x - state.mean.view(shape)) / torch.sqrt(state.var.view(shape) + EPS)


def _renormalized(x_hat: Tensor, found: Statistics, state: State) -> Tensor:
    """Ioffe 2017, algorithm 1: r and d are constants to the gradient."""
    mean, std = found.mean.detach(), torch.sqrt(found.var.detach() + EPS)
    sigma = torch.sqrt(state.var.view_as(mean) + EPS)
    r = (std / sigma).clamp(1.0 / RMAX, RMAX)
    d = ((mean - state.mean.view_as(mean)) / sigma).clamp(-DMAX, DMAX)
    return x_hat * r + d


def activated(case: Case, z: Tensor) -> Tensor:
    match case.activation:
        case "relu":
            return torch.where(z > 0, z, 0.0 * z)
        case "leaky_relu":
            return torch.where(z > 0, z, SLOPE * z)
        case "relu6":
            return z.clamp(0, 6)
        case "hardswish":
            return z * (z + 3).clamp(0, 6) / 6
        case "elu":
            return torch.where(z > 0, z, ALPHA * torch.expm1(torch.where(z > 0, 0.0 * z, z)))
        case "silu":
            return z / (1 + torch.exp(-z))
        case "gelu":
            return z * 0.5 * torch.erfc(-z / math.sqrt(2))
    return z


# ---------------------------------------------------------------- running statistics


def _observed(case: Case, found: Sequence[Statistics]) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and unbiased variance of each channel, of several batches together, and whether any."""
    if case.layer in INSTANCE:
        # the average over samples; one value has no unbiased variance
        mean, var, count = (torch.cat(each).flatten(1) for each in zip(*found, strict=True))
        share = (count > 1).double()
        samples = share.sum(0)
        unbiased = var * count / (count - 1).clamp(min=1)
        some = samples.clamp(min=1)
        return (mean * share).sum(0) / some, (unbiased * share).sum(0) / some, samples > 0
    mean, var, count = (torch.cat(each).flatten(1) for each in zip(*found, strict=True))
    total = count.sum(0)
    whole = (mean * count).sum(0) / total.clamp(min=1)
    m2 = (count * (var + (mean - whole) ** 2)).sum(0)
    return whole, m2 / (total - 1).clamp(min=1), total > 1


def _moved(case: Case, state: State, found: Sequence[Statistics]) -> State:
    """The state after batches whose statistics count as one's."""
    if case.has("skip_nonfinite"):
        found = [f for f in found if bool((f.mean.isfinite() & f.var.isfinite()).all())]
    if not found:
        return state
    mean, var, any_values = _observed(case, found)
    moved = (
        torch.where(any_values, (1 - MOMENTUM) * old + MOMENTUM * new.detach(), old)
        for old, new in ((state.mean, mean), (state.var, var))
    )
    # torch's InstanceNorm counts no batches
    return State(*moved, state.batches + (case.layer in BATCH))


# ---------------------------------------------------------------- whole calls


def _ghosts(case: Case, samples: int, ranks: Sequence[int]) -> list[list[int]]:
    """The samples of each ghost batch, of processes with so many samples each."""
    if not case.has("ghost batches"):
        return [list(range(samples))]
    found: dict[int, list[int]] = {}
    first = 0
    for own in ranks or [samples]:
        for sample in range(own):
            found.setdefault(sample // GHOST, []).append(first + sample)
        first += own
    return list(found.values())


def oracle(
    case: Case,
    batches: Sequence[Batch],
    weight: Tensor,
    bias: Tensor | None,
    state: State | None,
    ranks: Sequence[int] = (),
) -> tuple[list[Tensor], State | None]:
    """Outputs, and running statistics afterwards; everything in float64.

    ranks: where the batch is that of several processes, the samples of each.
    """
    outputs, gathered = [], []
    for batch in batches:
        axis, whole = axis_of(case, batch.x), valid_of(case, batch)
        x, valid = batch.x.movedim(axis, 1), whole.movedim(axis, 1)
        ghosts, made = _ghosts(case, x.shape[0], ranks), []
        for here in ghosts:
            y, found = _step(case, x[here], valid[here], state)
            made.append(y)
            if state is not None and found is not None:
                if case.has("accumulate"):
                    gathered.append(found)
                else:
                    state = _moved(case, state, [found])
        back = torch.tensor([place for here in ghosts for place in here]).argsort()
        y = torch.cat(made)[back]
        shape = () if case.layer in ROWS else (1, -1, *(1 for _ in x.shape[2:]))
        y = y * (weight.view(shape) if shape else weight)
        if bias is not None:
            y = y + (bias.view(shape) if shape else bias)
        y = y.movedim(1, axis)
        if batch.scale is not None and batch.shift is not None:
            y = y * (1.0 + torch.where(whole, batch.scale, 0.0))
            y = y + torch.where(whole, batch.shift, 0.0)
        if batch.residual is not None:
            y = y + torch.where(whole, batch.residual, 0.0)
        outputs.append(torch.where(whole, activated(case, y), PADDING))
    if state is not None and gathered:
        state = _moved(case, state, gathered)
    return outputs, state


def _step(
    case: Case, x: Tensor, valid: Tensor, state: State | None
) -> tuple[Tensor, Statistics | None]:
    """What is normalized, before weight and bias, and the statistics that running ones see."""
    if state is not None:
        kept = torch.where(valid, x, 0.0)
        if case.has("eval") or case.has("frozen"):
            return _by_running(kept, state), None
        x_hat, found = _normalized(case, x, valid)
        if case.has("on_single") and bool((found.count == 1).all()):
            return _by_running(kept, state), None
        if case.has("renorm"):
            x_hat = _renormalized(x_hat, found, state)
        return x_hat, found
    return _normalized(case, x, valid)[0], None
