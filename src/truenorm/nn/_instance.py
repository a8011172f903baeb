"""InstanceNorm1d, 2d, 3d and their lazy forms: statistics of each sample's channel alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import functional
from .._core import checks, eager
from .._core.call import CONSTANT, Call, Running
from .._core.eager import INSTANCE
from .._core.in_graph import call as in_graph
from ._activation import Activated
from ._base import FixedRank, LazyFeatures, RunningStatistics, Spanning
from ._options import DEFAULTS, with_options
from ._padded import Padded
from ._policy import Policed


class InstanceForward(Activated, Padded, FixedRank, Spanning, Policed, RunningStatistics):
    """forward() of the InstanceNorm layers; mixed in before torch's class."""

    def _directly(self, input: Tensor, after: eager.After | None) -> Tensor | None:
        parameters, buffers = self._parameters, self._buffers
        try:
            weight, bias = parameters["weight"], parameters["bias"]
            mean, var = buffers["running_mean"], buffers["running_var"]
        except KeyError:
            return None
        if input.dim() != self._dims[1] or input.size(1) != self.num_features:
            return None
        momentum, eps = self.momentum, self.eps
        if not (eps >= 0 and (momentum is None or 0 <= momentum <= 1)):
            return None
        options = self._truenorm_options
        given = not self.training or (options is not DEFAULTS and options.statistics_frozen)
        if given and self.track_running_stats:
            if mean is None or var is None:
                return None
            return eager.call(eager.GIVEN, input, weight, bias, CONSTANT, eps, (mean, var), after)
        if options is not DEFAULTS and options.process_group is not None:
            return None
        # a batch that is computed again in the backward pass moves nothing
        if mean is None or var is None or eager.graph_task() != -1:
            return eager.call(eager.OWN, input, weight, bias, INSTANCE, eps, (), after)
        running = mean, var, None, momentum or 0.0
        return eager.call(eager.MOVING, input, weight, bias, INSTANCE, eps, running, after)

    def _in_graph(self, input: Tensor, after: eager.After | None) -> Tensor | None:
        options, channels = self._truenorm_options, self.num_features
        mean, var, momentum, eps = self.running_mean, self.running_var, self.momentum, self.eps
        if input.dim() != self._dims[1] or input.shape[1] != channels or eps < 0.0:
            return None
        if momentum is not None and not 0.0 <= momentum <= 1.0:
            return None
        if (mean is None) != (var is None):
            return None
        of_layer = input, self.weight, self.bias, (channels,)
        own = self.training and not options.statistics_frozen
        if not own and self.track_running_stats:
            if mean is None:
                return None
            return in_graph(*of_layer, CONSTANT, eps, (mean, var), None, after)
        if options.process_group is not None or input.numel() == input.shape[0] * channels:
            return None
        moving = None if mean is None else (mean, var, None, momentum or 0.0)
        return in_graph(*of_layer, INSTANCE, eps, None, moving, after)

    def _statistics_group(self) -> Any:
        own = self._statistics_are_own() or not self.track_running_stats
        return super()._statistics_group() if own else None

    def _batched(self, input: Tensor) -> Tensor:
        """The input, checked, as a batch."""
        self._check_input_dim(input)
        unbatched = input.dim() == self._dims[0]
        channel_dim = 0 if unbatched else 1
        if self.affine or self.running_mean is not None:
            note = f", read as unbatched {self._shapes.split(' or ')[0]}" if unbatched else ""
            checks.check_num_features(input, channel_dim, self.num_features, ValueError, note)
        else:
            checks.warn_num_features(input, channel_dim, self.num_features)
        checks.check_eps(self.eps, type(self).__name__)
        if self.momentum is not None:
            checks.check_momentum(self.momentum)
        return input.unsqueeze(0) if unbatched else input

    def _is_unbatched(self, input: Tensor) -> bool:
        return input.dim() == self._dims[0]

    def _call(self, x: Tensor, mask: Tensor | None) -> Call:
        x = self._batched(x)
        own = self._statistics_are_own() or not self.track_running_stats
        group = self._statistics_group()
        alone = self._statistics_are_own() and self._may_be_alone()
        args = x, self.running_mean, self.running_var, self.weight, self.bias, own, self.eps
        one_value = mask is not None or group is not None or alone
        call = functional.instance_call(*args, one_value=one_value)
        if not own:
            return call
        return call._replace(running=self._running(), group=group, layer=self)

    def _running(self) -> Running | None:
        """As torch: the running statistics that there are, whether they are tracked or not."""
        mean, var = self.running_mean, self.running_var
        if mean is None or var is None:
            return None
        skip = self._truenorm_options.skip_nonfinite
        return Running(mean, var, None, self.momentum or 0.0, skip, self._gathered)


@with_options
class InstanceNorm1d(InstanceForward, torch.nn.InstanceNorm1d):
    """Normalize each channel of each sample by its own mean and variance.

    y = (x − E[x]) / sqrt(Var[x] + eps) · weight + bias

    Mean and variance (biased, divided by n) span the L positions of one sample's channel. By
    default (`affine=False`, `track_running_stats=False`) there is no weight, no bias, and training
    and evaluation are the same. With `track_running_stats=True` training also moves the running
    statistics towards the batch's average (unbiased variance), and evaluation uses them. As in
    torch, `momentum=None` leaves them where they are.

    Shapes: input (N, C, L), or (C, L) unbatched; output the same; weight, bias, running_mean,
    running_var (C,).

    Errors: ValueError for another rank, for another channel count where there are weights or
    running statistics of `num_features` (elsewhere a UserWarning, as torch's), for one position,
    and for eps or momentum out of range.

    Source: Ulyanov et al. 2016, https://arxiv.org/abs/1607.08022. Arguments as in
    torch.nn.InstanceNorm1d, and `process_group`: a torch.distributed group, or "world", over whose
    processes each sample's positions are spread, all with the same samples. The statistics span
    all of them, in training and evaluation alike; communication and errors are as in
    `SyncBatchNorm`, with N·C statistics.
    """

    _dims = (2, 3)
    _shapes = "(C, L) or (N, C, L)"


@with_options
class InstanceNorm2d(InstanceForward, torch.nn.InstanceNorm2d):
    """Normalize each channel of each image by its own mean and variance.

    y = (x − E[x]) / sqrt(Var[x] + eps) · weight + bias

    Mean and variance span the H·W positions of one sample's channel. Training, evaluation and
    errors as in `InstanceNorm1d`.

    Shapes: input (N, C, H, W), contiguous or channels_last, or (C, H, W) unbatched; output the
    same, in the same memory format; weight, bias, running_mean, running_var (C,).

    Source: Ulyanov et al. 2016, https://arxiv.org/abs/1607.08022. Arguments as in
    torch.nn.InstanceNorm2d, and `process_group` as in `InstanceNorm1d`.
    """

    _dims = (3, 4)
    _shapes = "(C, H, W) or (N, C, H, W)"


@with_options
class InstanceNorm3d(InstanceForward, torch.nn.InstanceNorm3d):
    """Normalize each channel of each volume by its own mean and variance.

    y = (x − E[x]) / sqrt(Var[x] + eps) · weight + bias

    Mean and variance span the D·H·W positions of one sample's channel. Training, evaluation and
    errors as in `InstanceNorm1d`.

    Shapes: input (N, C, D, H, W), contiguous or channels_last_3d, or (C, D, H, W) unbatched; output
    the same, in the same memory format; weight, bias, running_mean, running_var (C,).

    Source: Ulyanov et al. 2016, https://arxiv.org/abs/1607.08022. Arguments as in
    torch.nn.InstanceNorm3d, and `process_group` as in `InstanceNorm1d`.
    """

    _dims = (4, 5)
    _shapes = "(C, D, H, W) or (N, C, D, H, W)"


@with_options
class LazyInstanceNorm1d(LazyFeatures, InstanceForward, torch.nn.LazyInstanceNorm1d):
    """`InstanceNorm1d` that reads `num_features` off dim 1 of its first input (batched)."""

    _dims = InstanceNorm1d._dims
    _shapes = InstanceNorm1d._shapes
    cls_to_become = InstanceNorm1d


@with_options
class LazyInstanceNorm2d(LazyFeatures, InstanceForward, torch.nn.LazyInstanceNorm2d):
    """`InstanceNorm2d` that reads `num_features` off dim 1 of its first input (batched)."""

    _dims = InstanceNorm2d._dims
    _shapes = InstanceNorm2d._shapes
    cls_to_become = InstanceNorm2d


@with_options
class LazyInstanceNorm3d(LazyFeatures, InstanceForward, torch.nn.LazyInstanceNorm3d):
    """`InstanceNorm3d` that reads `num_features` off dim 1 of its first input (batched)."""

    _dims = InstanceNorm3d._dims
    _shapes = InstanceNorm3d._shapes
    cls_to_become = InstanceNorm3d
