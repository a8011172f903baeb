"""SyncBatchNorm: batch statistics over every process of a group (here: one process, any device)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from .. import _checks, _exchange
from ._batch import BatchForward


class SyncBatchNorm(BatchForward, torch.nn.SyncBatchNorm):
    """Normalize each channel by its statistics over the whole batch, of every process.

    y = (x − E[x]) / sqrt(Var[x] + eps) · weight + bias

    In one process this is `BatchNorm` for inputs of any rank from 2 up, on any device, CPU
    included (torch's accepts no CPU tensors once torch.distributed runs). With more than one
    process the call goes to torch's own implementation, with its limits: accelerators only.

    Shapes: input (N, C, *); output the same; weight, bias, running_mean, running_var (C,).

    Errors: as in `BatchNorm1d`.

    Source: Ioffe and Szegedy 2015, https://arxiv.org/abs/1502.03167. Arguments as in
    torch.nn.SyncBatchNorm.
    """

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
        return _exchange.active_group(self.process_group)

    @classmethod
    def convert_sync_batchnorm(cls, module: Module, process_group: Any = None) -> Module:
        """Replace every BatchNorm layer below `module` by a truenorm.SyncBatchNorm."""
        from ..convert import convert

        base: Any = super()
        converted: Module = base.convert_sync_batchnorm(module, process_group)
        return convert(converted, only=(torch.nn.SyncBatchNorm,))
