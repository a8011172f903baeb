"""GroupNorm: statistics of each sample's groups of channels."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from .. import functional
from .._core import checks, eager
from .._core.call import GROUPS, Call
from .._core.eager import INSTANCE
from .._core.in_graph import call as in_graph
from ._activation import Activated
from ._base import Spanning
from ._options import with_options
from ._padded import Padded


@with_options
class GroupNorm(Activated, Padded, Spanning, torch.nn.GroupNorm):
    """Normalize each group of channels of each sample by its own mean and variance.

    y = (x − E[x]) / sqrt(Var[x] + eps) · weight + bias

    Mean and variance (biased) span the num_channels / num_groups channels of a group and all
    positions. Training and evaluation are the same.

    Shapes: input (N, C, *), contiguous or channels_last; output the same, in the same memory
    format; weight, bias (C,).

    Errors: ValueError where num_groups does not divide num_channels, or eps is negative;
    RuntimeError for another channel count or device.

    Source: Wu and He 2018, https://arxiv.org/abs/1803.08494. Arguments as in torch.nn.GroupNorm,
    and `process_group`: a torch.distributed group, or "world", over whose processes each sample's
    positions are spread, as in `InstanceNorm1d`, with N·num_groups statistics.
    """

    # its signature is that of the installed torch
    @functools.wraps(torch.nn.GroupNorm.__init__)  # type: ignore[misc]
    def __init__(self, num_groups: int, num_channels: int, *args: Any, **kwargs: Any) -> None:
        checks.check_num_groups_divide(num_groups, num_channels)
        super().__init__(num_groups, num_channels, *args, **kwargs)

    def _directly(self, input: Tensor, after: eager.After | None) -> Tensor | None:
        parameters, eps = self._parameters, self.eps
        try:
            weight, bias = parameters["weight"], parameters["bias"]
        except KeyError:
            return None
        if not (eps >= 0 and self.num_groups > 0):
            return None
        if self._truenorm_options.process_group is not None:
            return None
        form = eager.group(self.num_groups)
        return eager.call(eager.OWN, input, weight, bias, form, eps, (), after)

    def _in_graph(self, input: Tensor, after: eager.After | None) -> Tensor | None:
        groups, eps = self.num_groups, self.eps
        if input.dim() < 2 or groups < 1 or eps < 0.0:
            return None
        channels = input.shape[1]
        if channels % groups or input.numel() == groups:
            return None
        if self._truenorm_options.process_group is not None:
            return None
        form = INSTANCE if groups == channels else groups << GROUPS
        shape = (channels,)
        return in_graph(input, self.weight, self.bias, shape, form, eps, None, None, after)

    def _call(self, x: Tensor, mask: Tensor | None) -> Call:
        checks.check_eps(self.eps, "GroupNorm")
        group = self._statistics_group()
        args = x, self.num_groups, self.weight, self.bias, self.eps
        one_value = mask is not None or group is not None
        call = functional.group_call(*args, one_value=one_value)
        return call._replace(group=group, layer=self)
