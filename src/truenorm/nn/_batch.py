"""BatchNorm1d, 2d, 3d and their lazy forms: statistics of a channel over the whole batch."""

from __future__ import annotations

from math import nan
from typing import Any

import torch
from torch import Tensor

from .. import functional
from .._core import checks, eager
from .._core.call import CONSTANT, Call
from .._core.eager import BATCH
from .._core.in_graph import call as in_graph
from ._activation import Activated
from ._base import FixedRank, LazyFeatures, RunningStatistics, Spanning
from ._options import DEFAULTS, with_options
from ._padded import Padded
from ._policy import SmallBatches


class BatchForward(Activated, Padded, FixedRank, Spanning, SmallBatches, RunningStatistics):
    """forward() of every layer with batch statistics; mixed in before torch's class."""

    def _directly(self, input: Tensor, after: eager.After | None) -> Tensor | None:
        parameters, buffers = self._parameters, self._buffers
        try:
            weight, bias = parameters["weight"], parameters["bias"]
            mean, var = buffers["running_mean"], buffers["running_var"]
            count = buffers["num_batches_tracked"]
        except KeyError:
            return None
        if input.dim() not in self._dims:
            return None
        # one size: `shape` would be made first
        if input.size(1) != self.num_features and weight is None and mean is None:
            return None
        momentum, eps = self.momentum, self.eps
        if (mean is None) != (var is None):
            return None
        training = self.training
        options = self._truenorm_options if training else DEFAULTS
        if (not training or (options is not DEFAULTS and options.statistics_frozen)) and (
            mean is not None
        ):
            if not eps >= 0:
                return None
            return eager.call(eager.GIVEN, input, weight, bias, CONSTANT, eps, (mean, var), after)
        if not (eps > 0 and (momentum is None or 0 <= momentum <= 1)):
            return None
        if options is not DEFAULTS and options.process_group is not None:
            return None
        # a batch that is computed again in the backward pass moves nothing
        if mean is None or not self.track_running_stats or eager.graph_task() != -1:
            return eager.call(eager.OWN, input, weight, bias, BATCH, eps, (), after)
        running = mean, var, count, nan if momentum is None else momentum
        return eager.call(eager.MOVING, input, weight, bias, BATCH, eps, running, after)

    def _in_graph(self, input: Tensor, after: eager.After | None) -> Tensor | None:
        options, training, channels = self._truenorm_options, self.training, self.num_features
        mean, var, momentum, eps = self.running_mean, self.running_var, self.momentum, self.eps
        if input.dim() not in self._dims or input.shape[1] != channels:
            return None
        if (mean is None) != (var is None) or eps < 0.0:
            return None
        if training and momentum is not None and not 0.0 <= momentum <= 1.0:
            return None
        given = input, self.weight, self.bias, (channels,)
        own = training and not options.statistics_frozen
        if not own and mean is not None:
            return in_graph(*given, CONSTANT, eps, (mean, var), None, after)
        if eps <= 0.0 or input.numel() == channels:
            return None
        if not own:
            return in_graph(*given, BATCH, eps, None, None, after)
        if options.process_group is not None:
            return None
        moving = None
        if mean is not None and self.track_running_stats:
            moving = mean, var, self.num_batches_tracked, momentum
        return in_graph(*given, BATCH, eps, None, moving, after)

    def _statistics_group(self) -> Any:
        # in evaluation the ranks need not be in step, even without running statistics
        return super()._statistics_group() if self._statistics_are_own() else None

    def _check_input(self, input: Tensor) -> None:
        self._check_input_dim(input)
        # as torch: what the layer holds decides, and pruning may leave num_features behind
        held = self.weight, self.bias, self.running_mean, self.running_var
        if all(t is None or t.numel() != input.shape[1] for t in held):
            checks.check_num_features(input, 1, self.num_features, RuntimeError)
        if self.training and self.momentum is not None:
            checks.check_momentum(self.momentum)

    def _call(self, x: Tensor, mask: Tensor | None) -> Call:
        self._check_input(x)
        mean, var = self.running_mean, self.running_var
        # as torch: the running statistics serve evaluation wherever they exist, and are updated
        # in training only while they are tracked
        own = self._statistics_are_own()
        group = self._statistics_group()
        one_value = mask is not None or group is not None or (own and self._may_be_alone())
        training = own or (mean is None and var is None)
        args = x, mean, var, self.weight, self.bias, training, self.eps
        call = functional.batch_call(*args, one_value=one_value)
        if not own:
            return call
        return call._replace(running=self._running(), group=group, layer=self)


@with_options
class BatchNorm1d(BatchForward, torch.nn.BatchNorm1d):
    """Normalize each channel of a 2D or 3D input by its statistics over the whole batch.

    y = (x − E[x]) / sqrt(Var[x] + eps) · weight + bias

    A channel's mean and variance span all samples and positions: N values for (N, C), N·L for
    (N, C, L). In training they are the batch's, the variance biased (divided by n), and the running
    statistics move towards them: running = (1 − momentum) · running + momentum · observed, the
    stored variance unbiased (divided by n − 1). In evaluation the running statistics are used. With
    `momentum=None` they are the plain average over all batches seen.

    Shapes: input (N, C) or (N, C, L); output the same; weight, bias, running_mean and running_var
    (C,).

    Errors: ValueError for another rank, one value per channel in training, eps or momentum out of
    range; RuntimeError for another channel count or device. Running statistics stay untouched.

    Source: Ioffe and Szegedy 2015, https://arxiv.org/abs/1502.03167. Arguments as in
    torch.nn.BatchNorm1d, and `process_group`: a torch.distributed group, or "world", over whose
    processes the batch is spread in training, as `SyncBatchNorm` describes; None for this one.
    """

    _dims = (2, 3)
    _shapes = "(N, C) or (N, C, L)"


@with_options
class BatchNorm2d(BatchForward, torch.nn.BatchNorm2d):
    """Normalize each channel of a 4D input by its statistics over the whole batch.

    y = (x − E[x]) / sqrt(Var[x] + eps) · weight + bias

    A channel's mean and variance span all samples and positions, N·H·W values. Training,
    evaluation, momentum and errors as in `BatchNorm1d`.

    Shapes: input (N, C, H, W), contiguous or channels_last; output the same, in the same memory
    format; weight, bias, running_mean, running_var (C,).

    Source: Ioffe and Szegedy 2015, https://arxiv.org/abs/1502.03167. Arguments as in
    torch.nn.BatchNorm2d, and `process_group` as in `BatchNorm1d`.
    """

    _dims = (4,)
    _shapes = "(N, C, H, W)"


@with_options
class BatchNorm3d(BatchForward, torch.nn.BatchNorm3d):
    """Normalize each channel of a 5D input by its statistics over the whole batch.

    y = (x − E[x]) / sqrt(Var[x] + eps) · weight + bias

    A channel's mean and variance span all samples and positions, N·D·H·W values. Training,
    evaluation, momentum and errors as in `BatchNorm1d`.

    Shapes: input (N, C, D, H, W), contiguous or channels_last_3d; output the same, in the same
    memory format; weight, bias, running_mean, running_var (C,).

    Source: Ioffe and Szegedy 2015, https://arxiv.org/abs/1502.03167. Arguments as in
    torch.nn.BatchNorm3d, and `process_group` as in `BatchNorm1d`.
    """

    _dims = (5,)
    _shapes = "(N, C, D, H, W)"


@with_options
class LazyBatchNorm1d(LazyFeatures, BatchForward, torch.nn.LazyBatchNorm1d):
    """`BatchNorm1d` that reads `num_features` off dim 1 of its first input."""

    _dims = BatchNorm1d._dims
    _shapes = BatchNorm1d._shapes
    cls_to_become = BatchNorm1d


@with_options
class LazyBatchNorm2d(LazyFeatures, BatchForward, torch.nn.LazyBatchNorm2d):
    """`BatchNorm2d` that reads `num_features` off dim 1 of its first input."""

    _dims = BatchNorm2d._dims
    _shapes = BatchNorm2d._shapes
    cls_to_become = BatchNorm2d


@with_options
class LazyBatchNorm3d(LazyFeatures, BatchForward, torch.nn.LazyBatchNorm3d):
    """`BatchNorm3d` that reads `num_features` off dim 1 of its first input."""

    _dims = BatchNorm3d._dims
    _shapes = BatchNorm3d._shapes
    cls_to_become = BatchNorm3d
