"""What keeps the processes of a group in step, and says so where they are not.

A backend that gets messages of different lengths ends the process (gloo) or mixes up the numbers,
so lengths are compared before the first message of a layer, and every message says what it holds.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from . import _checks
from ._axes import Axes

# layer: group (its name and identity), and numbers of statistics that all ranks agreed upon in it
_AGREED: WeakKeyDictionary[Any, tuple[tuple[str, int], set[int]]] = WeakKeyDictionary()


@contextmanager
def explained(group: Any) -> Iterator[None]:
    """Say what a failed exchange means, beside what the backend says."""
    try:
        yield
    except RuntimeError as error:
        _checks.exchange_failed(dist.get_rank(group), dist.get_world_size(group), error)


def agree(layer: Any, statistics: int, device: torch.device, group: Any) -> None:
    """Compare the number of statistics of a layer over all ranks, once for each layer and group.

    Not while compiling: a graph may be compiled again by one rank alone.
    """
    if torch.compiler.is_compiling():
        return
    key = group.group_name, id(group)
    known, numbers = _AGREED.get(layer, (None, set()))
    if known == key and statistics in numbers:
        return
    from .distributed import gather

    # of fixed length, whatever the ranks disagree about
    found = gather(torch.tensor([statistics], device=device), group)[:, 0].tolist()
    _checks.check_same_statistics(type(layer).__name__, found)
    _AGREED[layer] = key, {statistics} | (numbers if known == key else set())


def check_messages(heads: Tensor, x: Tensor, axes: Axes) -> None:
    """The messages of all ranks hold as many statistics as this one's, and values enough.

    heads: (ranks, 2), values per statistic and number of statistics.
    """
    per_sample = axes.num_groups > 0
    if heads.is_cpu and not torch.compiler.is_compiling():
        values, statistics = heads.t().tolist()
        _checks.check_same_statistics("A layer", statistics)
        _checks.check_more_than_one_value_of_all(x, sum(values), per_sample=per_sample)
        return
    # on the device, where nobody waits for the answer
    torch._assert_async(
        (heads[:, 1] == heads[:1, 1]).all(),
        "truenorm: a layer has other numbers of channels in other processes",
    )
    torch._assert_async(
        heads[:, 0].sum() != 1,
        "truenorm: expected more than 1 value per statistic over all processes when training",
    )
