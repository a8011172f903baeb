"""SyncBatchNorm: batch statistics over every process of a group, on any device and backend."""

from __future__ import annotations

import functools
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import Module

from .. import _checks, _exchange
from ._batch import BatchForward
from ._options import Option, with_options


@with_options
class SyncBatchNorm(BatchForward, torch.nn.SyncBatchNorm):
    """Normalize each channel by its statistics over the whole batch, of every process.

    y = (x − E[x]) / sqrt(Var[x] + eps) · weight + bias

    In training E and Var (biased, divided by n) span the batches of all processes of
    `process_group` (None: of all processes) together, n values in all, and the running statistics
    move as in `BatchNorm1d`, to the same bits in every process. N may differ from process to
    process, and be 0. Every process has to call the layer, forward and backward, in the same order
    as its others. The gradients of weight and bias are this process's share, which
    DistributedDataParallel and fully_shard add up. In evaluation, and in one process, this is
    `BatchNorm` for inputs of any rank from 2 up.

    Communication: one all-gather of 2·C + 2 float64 numbers forward, one of 2·C backward, and at a
    layer's first call one of a single number.

    Shapes: input (N, C, *); output the same; weight, bias, running_mean, running_var (C,).

    Errors: as in `BatchNorm1d`, of which "more than 1 value per channel" counts all processes;
    ValueError on every process where one has another number of channels; RuntimeError on the others
    where a process dies or does not call the layer within the group's timeout.

    Source: Ioffe and Szegedy 2015, https://arxiv.org/abs/1502.03167. Arguments as in
    torch.nn.SyncBatchNorm.
    """

    _own_options: ClassVar[dict[str, Option | None]] = {
        "process_group": None,
        # each of them asks how many values there are, or sums up by itself
        "on_single": None,
        "virtual_batch_size": None,
        "renorm": None,
        "rmax": None,
        "dmax": None,
    }

    def _check_input_dim(self, input: Tensor) -> None:
        _checks.check_tensor("input", input)
        if input.dim() < 2:
            raise ValueError(
                f"expected at least 2D input (got {input.dim()}D input): `input` of shape "
                f"{tuple(input.shape)} needs the dimensions (N, C, …)"
            )
        if input.shape[1] == 0:
            raise ValueError(
                "SyncBatchNorm number of input channels should be non-zero: `input` has shape "
                f"{tuple(input.shape)}"
            )

    def _statistics_group(self) -> Any:
        own = self._statistics_are_own()  # torch has process_group as an attribute
        return _exchange.active_group(self.process_group) if own else None

    @classmethod
    def convert_sync_batchnorm(cls, module: Module, process_group: Any = None) -> Module:
        """Replace every BatchNorm layer below `module` by a truenorm.SyncBatchNorm."""
        from ..convert import convert

        base: Any = super()
        converted: Module = base.convert_sync_batchnorm(module, process_group)
        return convert(converted, only=(torch.nn.SyncBatchNorm,))


def _let_ours_pass() -> None:
    """Let truenorm's SyncBatchNorm through a check of DistributedDataParallel.

    It refuses every SyncBatchNorm whose parameters are on a CPU, since torch's cannot run there.
    """
    parallel = torch.nn.parallel.DistributedDataParallel
    check: Any = getattr(parallel, "_passing_sync_batchnorm_handle", None)
    if check is None:  # another torch, without that check
        return

    @functools.wraps(check)
    def check_theirs(self: Any, module: Module) -> None:
        found = {isinstance(m, SyncBatchNorm) for m in module.modules() if _is_sync(m)}
        if found != {True}:
            check(self, module)

    parallel._passing_sync_batchnorm_handle = check_theirs  # type: ignore[method-assign]


def _is_sync(module: Module) -> bool:
    return isinstance(module, torch.nn.SyncBatchNorm)


_let_ours_pass()
