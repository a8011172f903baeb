"""Inputs that are DTensors: each process normalizes its own part, and gives it back as one.

Values, gradients and running statistics are those of the whole tensor on one process, however it is
cut (sharding.py has the rules).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import checks, dense, exchange, geometry, response, route, running, sharding
from .call import Call, Running
from .geometry import BATCH
from .merging import add_pairs
from .sharding import Plan, Role


def _part(call: Call, plan: Plan) -> Call:
    """This process's part of a call, but for its running statistics."""
    form, x = call.form, plan.part(call.x)
    groups = form.axes.num_groups
    if Role.CHANNELS in plan.roles and groups:
        own = x.shape[1] * groups // call.x.shape[1]
        form = form._replace(axes=form.axes._replace(num_groups=own))
    given = call.given
    if given is not None:
        with torch.no_grad():
            given = plan.statistic(given[0]), plan.statistic(given[1])
    return call._replace(
        x=x,
        weight=plan.parameter(call.weight),
        bias=plan.parameter(call.bias),
        form=form,
        mask=plan.part(call.mask),
        residual=plan.part(call.residual),
        given=given,
        inplace=False,
    )


# ---------------------------------------------------------------- running statistics


def _moving(moving: Running | None, plan: Plan) -> tuple[Running | None, Callable[[], None]]:
    """Running statistics of this process's channels, and what takes them back when they moved."""
    if moving is None:
        return None, lambda: None
    kept = moving.mean, moving.var
    with torch.no_grad():
        parts = [plan.statistic(t) for t in kept]
        if Role.CHANNELS in plan.roles:
            parts = [t.clone() for t in parts]
        count: Any = moving.num_batches_tracked
        count = count.to_local() if sharding.wanted(count) else count

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

    return moving._replace(mean=parts[0], var=parts[1], num_batches_tracked=count), take_back


def _move_by_samples(moving: Running, call: Call, record: Tensor, groups: Sequence[Any]) -> None:
    """Running statistics towards the average over the samples of all processes."""
    features = moving.mean.numel()
    with torch.no_grad():
        sums = record[:2].reshape(2, -1, features).sum(1)
        message = torch.cat([record.new_full((1,), call.x.shape[0]), *sums])
        for group in groups:
            message = add_pairs(exchange.gather(message, group))
        samples = message[:1]
        averaged = message[1:].view(2, -1) / samples.clamp(min=1.0)
        values = samples.sign() * geometry.values_per_statistic(call.x.shape, call.form.axes)
        running.move(moving, torch.cat([averaged, values.expand(1, features)]))


# ---------------------------------------------------------------- what normalize.py calls


def normalize(call: Call) -> Tensor:
    never: tuple[Role, ...] = ()
    if call.group is not None:
        _check_group(call.x, call.group)
        call = call._replace(group=None)
    if call.mask is not None:
        never = tuple(Role)
    elif call.running is not None and call.running.gathered is not None:
        never = (Role.CHANNELS,)
    axes = call.form.axes
    plan = sharding.plan(call.x, axes, fixed=call.given is not None, never=never)
    across, samples = plan.groups(Role.ACROSS), plan.groups(Role.SAMPLES)
    moving, take_back = _moving(call.running, plan)
    own = _part(call, plan)._replace(running=moving)
    if across:
        y = dense.spanning([own], across[0])[0]
    elif moving is not None and samples:
        y, record = dense.normalize_with_statistics(own._replace(running=None))
        _move_by_samples(moving, own, record, samples)
    else:
        y = dense.normalize(own, route.way_to_output(own))
    take_back()
    return plan.joined(y, call.x, axes)


def normalize_with_statistics(call: Call) -> tuple[Tensor, Tensor]:
    """The statistics are plain tensors, the same in every process."""
    plan = sharding.plan(call.x, call.form.axes, never=tuple(Role))
    y, record = dense.normalize_with_statistics(_part(call, plan))
    return plan.joined(y, call.x, call.form.axes), record


def statistics(call: Call) -> tuple[Tensor, Tensor]:
    """As DTensors, for the arithmetic that follows."""
    plan = sharding.plan(call.x, call.form.axes, never=tuple(Role))
    mean, var = dense.statistics(_part(call._replace(group=None), plan))
    return plan.statistic_joined(mean, mean), plan.statistic_joined(var, var)


def channel_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """As DTensors, for the arithmetic that follows."""
    plan = sharding.plan(x, BATCH, never=tuple(Role))
    mean, var = dense.channel_moments(plan.part(x))
    return plan.statistic_joined(mean, mean), plan.statistic_joined(var, var)


def local_response_norm(x: Tensor, size: int, alpha: float, beta: float, k: float) -> Tensor:
    plan = sharding.plan(x, BATCH, fixed=True, never=(Role.CHANNELS,))
    y = response.local_response_norm(plan.part(x), size, alpha, beta, k)
    return plan.joined(y, x, BATCH)


def _check_group(x: Any, group: Any) -> None:
    """A DTensor is the whole batch: of a layer's `process_group` no process may be outside."""
    ranks = torch.distributed.get_process_group_ranks(group)
    checks.check_mesh_holds(ranks, x.device_mesh.mesh.flatten().tolist())
