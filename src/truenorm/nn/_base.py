"""What layers share: running statistics that stay wide, and being a leaf to torch.fx."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Proxy
from torch.nn.parameter import is_lazy


class Traceable(torch.nn.Module):
    """A layer stays one node under torch.fx, as torch's own layers do."""

    @staticmethod
    def _is_traced(input: Any) -> bool:
        return isinstance(input, Proxy)

    def _as_leaf(self, input: Any) -> Any:
        tracer = input.tracer
        return tracer.create_proxy("call_module", tracer.path_of_module(self), (input,), {})


class RunningStatistics(torch.nn.Module):
    """Keeps running_mean and running_var in float32 or wider under .half() and .bfloat16().

    A deliberate difference from torch: float16 statistics lose the updates of small batches
    (pytorch#70901). Statistics that were built in half precision, by the layer's `dtype` argument,
    stay as asked.
    """

    num_features: int
    eps: float
    momentum: float | None
    affine: bool
    track_running_stats: bool
    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        wide = {
            name: buffer
            for name in ("running_mean", "running_var")
            if (buffer := self._buffers.get(name)) is not None
            and not is_lazy(buffer)
            and buffer.dtype in (torch.float32, torch.float64)
        }
        super()._apply(fn, recurse)
        for name, before in wide.items():
            after = self._buffers[name]
            assert after is not None
            if after.dtype in (torch.float16, torch.bfloat16):
                # from the values before: fn has already rounded those in `after`
                self._buffers[name] = before.to(after.device)
        return self
