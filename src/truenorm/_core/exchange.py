"""Messages between the processes of a torch.distributed group, and what keeps these in step.

A backend that gets messages of different lengths ends the process (gloo) or mixes up the numbers,
so lengths are compared before the first message of a layer, and every message says what it holds.
"""

from __future__ import annotations

from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from . import checks
from .merging import add_pairs

# as `process_group`: every process, found out when the layer is called
WORLD = "world"
# no other process, also for SyncBatchNorm
ALONE = "alone"

# torch 2.13 gave it another name
_all_gather: Any = getattr(dist, "all_gather_single", None) or getattr(
    dist, "all_gather_into_tensor", None
)

# layer: group (its name and identity), and numbers of statistics that all ranks agreed upon in it
_ANY = -1
_AGREED: WeakKeyDictionary[Any, tuple[tuple[str, int], set[int]]] = WeakKeyDictionary()


def active_group(process_group: Any) -> Any:
    """The group to exchange statistics with, or None where this process is alone in it.

    process_group: a ProcessGroup, or None or "world" for all processes.
    """
    if not (dist.is_available() and dist.is_initialized()) or process_group == ALONE:
        return None
    if process_group is None or process_group == WORLD:
        process_group = dist.group.WORLD
    checks.check_process_group(process_group)
    return process_group if dist.get_world_size(process_group) > 1 else None


def gather(message: Tensor, group: Any) -> Tensor:
    """The messages of all ranks (equally long), in rank order: (ranks, length)."""
    ranks = dist.get_world_size(group)
    if torch.compiler.is_compiling():
        functional = torch.ops._c10d_functional
        gathered = functional.all_gather_into_tensor(message, ranks, group.group_name)
        return cast(Tensor, functional.wait_tensor(gathered)).view(ranks, -1)
    gathered = message.new_empty(ranks * message.numel())
    try:
        _all_gather(gathered, message, group=group)
    except RuntimeError as error:
        checks.exchange_failed(dist.get_rank(group), ranks, error)
    return gathered.view(ranks, -1)


class _AllSum(Function):
    """The sum over all ranks, of which the gradient is the sum of all ranks' gradients."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return add_pairs(gather(values.reshape(-1), group)).view(values.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return all_sum(grad, ctx.group), None


def all_sum(values: Tensor, group: Any) -> Tensor:
    """Sum over all ranks, differentiable any number of times."""
    return cast(Tensor, _AllSum.apply(values, group))  # type: ignore[no-untyped-call]


def _key(group: Any) -> tuple[str, int]:
    return group.group_name, id(group)


def take_to_agree(layer: Any) -> None:
    """Take the layer to have as many statistics on all ranks of its group, however many."""
    group = layer._statistics_group()
    if group is not None:
        _AGREED[layer] = _key(group), {_ANY}


def agree(layer: Any, statistics: int, device: torch.device, group: Any) -> None:
    """Compare the number of statistics of a layer over all ranks, once for each layer and group.

    Not in a graph, which one rank may compile again alone: a compiled layer is taken to agree, also
    where a rank later goes on without its graph.
    """
    if torch.compiler.is_compiling():
        layer._is_taken_to_agree(id(layer))
        return
    key = _key(group)
    known, numbers = _AGREED.get(layer, (None, set()))
    if known == key and (statistics in numbers or _ANY in numbers):
        return
    # of fixed length, whatever the ranks disagree about
    found = gather(torch.tensor([statistics], device=device), group)[:, 0].tolist()
    checks.check_same_statistics(type(layer).__name__, found)
    _AGREED[layer] = key, {statistics} | (numbers if known == key else set())


def check_as_many_parts(parts: int, device: torch.device, group: Any) -> None:
    """That a batch is cut into as many parts on every rank, which exchange them together.

    At every call, since one rank's batch may be the shorter one. Not in a graph, as in `agree`.
    """
    if not torch.compiler.is_compiling():
        found = gather(torch.tensor([parts], device=device), group)[:, 0].tolist()
        checks.check_same_parts(found)


def _is_readable(values: Tensor) -> bool:
    """Whether values can be looked at without waiting for a device."""
    return values.is_cpu and not torch.compiler.is_compiling()


def check_messages(values: Tensor, statistics: Tensor, x: Tensor, *, per_sample: bool) -> None:
    """The messages of all ranks hold as many statistics as this one's, and values enough.

    values, statistics: of each rank's message, how many values a statistic spans and how many
    statistics there are.
    """
    if _is_readable(values):
        checks.check_same_statistics("A layer", statistics.tolist())
        total = sum(values.tolist())
        checks.check_more_than_one_value_of_all(x, total, per_sample=per_sample)
        return
    # on the device, where nobody waits for the answer
    torch._assert_async(
        (statistics == statistics[:1]).all(),
        "truenorm: a layer has other numbers of channels in other processes",
    )
    torch._assert_async(
        values.sum() != 1,
        "truenorm: expected more than 1 value per statistic over all processes when training",
    )
