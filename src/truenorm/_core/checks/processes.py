"""Errors of statistics over several processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch.distributed
from torch import Tensor


def check_same_features(one: int, other: int) -> None:
    if one != other:
        raise ValueError(
            f"moments of {one} and of {other} features cannot be merged: merge those of one layer"
        )


def check_process_group(group: Any) -> None:
    """A torch.distributed.ProcessGroup that this process is a member of, or "world"."""
    if group == "world":
        return
    if group is torch.distributed.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(
            "`process_group` is a group that this process is not a member of: build the layer with "
            "the group that holds this rank"
        )
    if not isinstance(group, torch.distributed.ProcessGroup):
        raise TypeError(
            '`process_group` must be a torch.distributed.ProcessGroup or "world", but got '
            f"{type(group).__name__}: make one with torch.distributed.new_group(ranks)"
        )


def check_no_transform(active: bool) -> None:
    if active:
        raise NotImplementedError(
            "statistics over several processes have no vmap and no forward-mode derivative: call "
            "the layer outside torch.func's transforms, or without its `process_group`"
        )


def check_same_statistics(layer: str, ranks: Sequence[float]) -> None:
    """Every rank of a group exchanges as many statistics as the others."""
    if any(n != ranks[0] for n in ranks):
        by_rank = ", ".join(f"{n:.0f} on rank {rank}" for rank, n in enumerate(ranks))
        raise ValueError(
            f"{layer} has other numbers of statistics (channels; samples times groups) in other "
            f"processes of its group: {by_rank}. Build the model the same, and where samples are "
            "cut over ranks give every rank its part of each"
        )


def check_same_parts(ranks: Sequence[int]) -> None:
    """Every rank of a group cuts its batch into as many ghost batches as the others."""
    if any(n != ranks[0] for n in ranks):
        by_rank = ", ".join(f"{n} on rank {rank}" for rank, n in enumerate(ranks))
        raise ValueError(
            f"`virtual_batch_size` cuts the batch into other numbers of parts in other processes: "
            f"{by_rank}. Give every rank as many samples, or drop the last batch (drop_last=True)"
        )


def check_more_than_one_value_of_all(input: Tensor, count: float, *, per_sample: bool) -> None:
    """`count` values in all processes together, of which `input` is this one's part."""
    if count == 1:
        what = "spatial element" if per_sample else "value per channel"
        raise ValueError(
            f"Expected more than 1 {what} when training, over all processes together, got input "
            f"size {input.shape}: one value has no variance; use a larger batch, or call eval()"
        )


def exchange_failed(rank: int, ranks: int, error: Exception) -> NoReturn:
    raise RuntimeError(
        f"the exchange of statistics failed on rank {rank} of {ranks}: another process of the "
        "group has died, has not called this layer within the group's timeout, or has called "
        f"another one. What that process printed says why; the backend says: {error}"
    ) from error


def check_pass_of_rank(rank: int, failed: str | None) -> None:
    if failed is not None:
        raise RuntimeError(
            f"recalibrate failed on rank {rank}, and so on all: nothing was changed. There: "
            f"{failed}"
        )


def check_together(layers: Sequence[Any], inputs: Sequence[Any], kind: type) -> None:
    for layer in layers:
        if not isinstance(layer, kind):
            raise TypeError(
                f"`layers` holds a {type(layer).__name__}, whose statistics do not span processes: "
                "give BatchNorm, SyncBatchNorm, InstanceNorm and GroupNorm layers of truenorm"
            )
    if len(layers) != len(inputs):
        raise ValueError(
            f"`inputs` (={len(inputs)} of them) must be as many as `layers` (={len(layers)})"
        )
    if len({id(layer) for layer in layers}) < len(layers):
        raise ValueError("`layers` holds a layer twice: call it a second time by itself")


def check_one_group(groups: Sequence[Any]) -> None:
    if any(group is not groups[0] for group in groups):
        raise ValueError(
            "`layers` exchange statistics with different groups, or only some of them do: give "
            "those of one `process_group`, all in training or all in evaluation"
        )


def check_none_sharded(found: Sequence[Any], input: Any) -> None:
    if found:
        raise TypeError(
            f"a parameter is a DTensor of shape {tuple(found[0].shape)}, and `input` is a plain "
            f"{type(input).__name__}: give a DTensor (torch.distributed.tensor.distribute_tensor, "
            "or SequenceParallel in parallelize_module), or a layer with plain parameters"
        )


def check_same_mesh(mesh: Any, of_input: Any) -> None:
    if mesh != of_input:
        raise ValueError(
            f"`input` is a DTensor on the mesh {of_input}, and a parameter, residual or statistic "
            f"on {mesh}: distribute both over one mesh"
        )


def check_mesh_holds(ranks: Sequence[int], mesh: Sequence[int]) -> None:
    outside = sorted(set(ranks) - set(mesh))
    if outside:
        raise ValueError(
            f"`process_group` holds ranks {outside}, which are outside the mesh of the DTensor "
            "`input`, itself the whole batch of its mesh: distribute it over all of the group, or "
            "leave out `process_group`"
        )
