"""Inputs that are DTensors: each process normalizes its own part, and gives it back as one.

Values, gradients and running statistics are those of the whole tensor on one process, however it is
cut (sharding.py has the rules).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _axes, _checks, _exchange, _ops
from .._axes import BATCH, Axes
from .._pairs import add_pairs
from . import activated, activation, sharding, synchronized
from .activation import Epilogue
from .autograd import Running, track
from .parts import Spec
from .sharding import Plan, Role


class _Parts(NamedTuple):
    """This process's part of a call: what comes after is in the same pass, or later."""

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    axes: Axes
    after: Epilogue | None
    later: Epilogue | None


def _cut(
    x: Tensor, weight: Any, bias: Any, axes: Axes, after: Any, plan: Plan, *, apart: bool = False
) -> _Parts:
    """apart: whether there is no pass that does what comes after too."""
    own, weight, bias = plan.part(x), plan.parameter(weight), plan.parameter(bias)
    if after is not None:
        after = after._replace(residual=plan.part(after.residual))
        # nor is there one where this process has no values
        apart = apart or not activated.serves(own, after.residual, weight, bias)
    if Role.CHANNELS in plan.roles and axes.num_groups:
        axes = axes._replace(num_groups=own.shape[1] * axes.num_groups // x.shape[1])
    split = (None, after) if apart else (after, None)
    return _Parts(own, weight, bias, axes, *split)


def _finish(y: Tensor, after: Epilogue | None) -> Tensor:
    if after is None:
        return y
    z = y if after.residual is None else y + after.residual
    return activation.act(z, after.act, after.parameter)


# ---------------------------------------------------------------- running statistics


def _plain(t: Any) -> Any:
    return t.to_local() if sharding.wanted(t) else t


def _moving(running: Running | None, plan: Plan) -> tuple[Running | None, Callable[[], None]]:
    """Running statistics of this process's channels, and what takes them back when they moved."""
    if running is None:
        return None, lambda: None
    kept = running.mean, running.var
    with torch.no_grad():
        parts = [plan.statistic(t) for t in kept]
        if Role.CHANNELS in plan.roles:
            parts = [t.clone() for t in parts]
        count = _plain(running.num_batches_tracked)

    def take_back() -> None:
        if Role.CHANNELS not in plan.roles:
            return  # they were written where they are
        with torch.no_grad():
            for t, part in zip(kept, parts, strict=True):
                made = plan.statistic_joined(part, t)
                sharded: Any = t
                if sharding.wanted(t):
                    t.copy_(made.redistribute(plan.mesh, sharded.placements))
                else:
                    t.copy_(made.full_tensor())

    return running._replace(mean=parts[0], var=parts[1], num_batches_tracked=count), take_back


def _move_by_samples(
    running: Running, x: Tensor, mean: Tensor, var: Tensor, axes: Axes, groups: Sequence[Any]
) -> None:
    """Running statistics towards the average over the samples of all processes."""
    features = running.mean.numel()
    with torch.no_grad():
        sums = [t.reshape(-1, features).sum(0) for t in (mean, var)]
        message = torch.cat([mean.new_full((1,), x.shape[0]), *sums])
        for group in groups:
            message = add_pairs(_exchange.gather(message, group))
        samples = message[:1]
        averaged = message[1:].view(2, -1) / samples.clamp(min=1.0)
        values = samples.sign() * _axes.values_per_statistic(x.shape, axes)
        track(running, x, averaged[0], averaged[1], values)


# ---------------------------------------------------------------- what _ops/__init__.py calls


def normalize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    axes: Axes,
    eps: float,
    running: Running | None,
    after: Epilogue | None,
) -> Tensor:
    gathered = running is not None and running.gathered is not None
    plan = sharding.plan(x, axes, never=(Role.CHANNELS,) if gathered else ())
    across, samples = plan.groups(Role.ACROSS), plan.groups(Role.SAMPLES)
    averaged = bool(samples) and running is not None
    own = _cut(x, weight, bias, axes, after, plan, apart=averaged or bool(across))
    moving, take_back = _moving(running, plan)
    args = own.x, own.weight, own.bias
    if across:
        y = synchronized.part(*args, Spec(own.axes, eps), moving, across[0])
    elif moving is not None and averaged:
        y, mean, var = _ops.normalize_with_statistics(*args, own.axes, eps)
        _move_by_samples(moving, own.x, mean, var, own.axes, samples)
    else:
        y = _ops.normalize(*args, own.axes, eps, moving, own.after)
    take_back()
    return plan.joined(_finish(y, own.later), x, axes)


def normalize_fixed(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    after: Epilogue | None,
) -> Tensor:
    plan = sharding.plan(x, BATCH, fixed=True)
    own = _cut(x, weight, bias, BATCH, after, plan)
    with torch.no_grad():
        mean, var = plan.statistic(mean), plan.statistic(var)
    y = _ops.normalize_fixed(own.x, mean, var, own.weight, own.bias, eps, own.after)
    return plan.joined(_finish(y, own.later), x, BATCH)


def normalize_with_statistics(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, axes: Axes, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The statistics are plain tensors, the same in every process."""
    plan = sharding.plan(x, axes, never=tuple(Role))
    own = _cut(x, weight, bias, axes, None, plan)
    args = own.x, own.weight, own.bias, own.axes, eps
    y, mean, var = _ops.normalize_with_statistics(*args)
    return plan.joined(y, x, axes), mean, var


def channel_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """As DTensors, for the arithmetic that follows."""
    plan = sharding.plan(x, BATCH, never=tuple(Role))
    mean, var = _ops.channel_moments(plan.part(x))
    return plan.statistic_joined(mean, mean), plan.statistic_joined(var, var)


def local_response_norm(x: Tensor, size: int, alpha: float, beta: float, k: float) -> Tensor:
    plan = sharding.plan(x, BATCH, fixed=True, never=(Role.CHANNELS,))
    y = _ops.local_response_norm(plan.part(x), size, alpha, beta, k)
    return plan.joined(y, x, BATCH)


# ---------------------------------------------------------------- masks, and groups of processes


def by_mask(
    call: Callable[..., Tensor], x: Tensor, mask: Tensor, parameters: Sequence[Any], *rest: Any
) -> Tensor:
    """call(x, mask, *parameters, *rest) of the whole tensors, in every process."""
    plan = sharding.plan(x, BATCH, never=tuple(Role))
    y = call(plan.part(x), plan.part(mask), *(plan.part(p) for p in parameters), *rest)
    return plan.joined(y, x, BATCH)


def whole_running(running: Running | None) -> Running | None:
    """Running statistics as plain tensors, the same in every process."""
    if running is None:
        return None
    mean, var, count = (_plain(t) for t in running[:3])
    return running._replace(mean=mean, var=var, num_batches_tracked=count)


def check_group(x: Any, group: Any) -> None:
    """A DTensor is the whole batch: of a layer's `process_group` no process may be outside."""
    ranks = torch.distributed.get_process_group_ranks(group)
    _checks.check_mesh_holds(ranks, x.device_mesh.mesh.flatten().tolist())
