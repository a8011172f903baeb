"""Running statistics over the micro-batches of a gradient-accumulation step."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.parameter import is_lazy

from .._core import checks, plain
from .._core.merging import merge_pairs
from ..nn._policy import Policed

__all__ = ["accumulate"]

M = TypeVar("M", bound=Module)


class Gathered:
    """Moments of the micro-batches so far, in tensors that stay the same ones.

    For statistics per sample (InstanceNorm) what is merged are the samples' means and unbiased
    variances, which the running statistics are averages of.
    """

    def __init__(self, running: Tensor, per_sample: bool) -> None:
        wide = torch.float32 if running.device.type == "mps" else torch.float64
        self.per_sample = per_sample
        self.mean = torch.zeros(running.numel(), dtype=wide, device=running.device)
        self.count = torch.zeros_like(self.mean)
        self.second = torch.zeros_like(self.mean)
        self.batches = torch.zeros(1, dtype=torch.int64, device=running.device)

    def add(self, record: Tensor, num_features: int, skip: bool) -> None:
        """Merge a micro-batch's statistics."""
        with torch.no_grad():
            fine = plain.all_finite(record) if skip else torch.ones_like(record[0, :1]).bool()
            if self.per_sample:
                count, seen, second = plain.observed(record, num_features)
            else:
                seen, var, count = plain.wide(record)
                second = var * count
            count = torch.where(fine, count, 0.0)
            kept = count > 0
            seen, second = (torch.where(kept, t, 0.0) for t in (seen, second))
            if self.per_sample:
                share = count / (self.count + count).clamp(min=1.0)
                self.mean.add_((seen - self.mean) * share)
                self.second.add_((second - self.second) * share)
                self.count.add_(count)
            else:
                total, merged, m2 = merge_pairs(
                    torch.stack([self.count, count]),
                    torch.stack([self.mean, seen]),
                    torch.stack([self.second, second]),
                )
                self.count.copy_(total)
                self.mean.copy_(merged)
                self.second.copy_(m2)
            self.batches.add_(fine.reshape(1))

    def apply(self, layer: Policed) -> None:
        """Move the layer's running statistics towards all of them, once."""
        mean, var = layer.running_mean, layer.running_var
        assert mean is not None and var is not None
        with torch.no_grad():
            counted = None if self.per_sample else layer.num_batches_tracked
            momentum = layer.momentum
            if momentum is None:
                momentum_now = 0.0 if counted is None else 1.0 / (counted.double() + 1.0)
            else:
                momentum_now = momentum
            observed, least = self.second, 1
            if not self.per_sample:
                # fewer than two values have no variance
                observed, least = self.second / (self.count - 1.0).clamp(min=1.0), 2
            for running, seen in ((mean, self.mean), (var, observed)):
                wide = running.to(seen.dtype)
                moved = (1.0 - momentum_now) * wide + momentum_now * seen
                running.copy_(torch.where(self.count >= least, moved, wide))
            if counted is not None:
                counted.add_((self.batches > 0).reshape(counted.shape))


@contextlib.contextmanager
def accumulate(model: M) -> Iterator[M]:
    """Let running statistics move once for all micro-batches within the block.

        with truenorm.accumulate(model):
            for micro_batch in micro_batches:
                loss(model(micro_batch)).backward()
        optimizer.step()

    Each micro-batch is normalized by its own statistics, as ever: that is what its gradients are
    of. The running statistics stay as they are within the block and move once at its end, towards
    mean and unbiased variance of all micro-batches' values together, merged exactly (Chan et al.
    1983): running = (1 − momentum) · running + momentum · observed, num_batches_tracked + 1. For
    layers whose statistics span processes these are the values of all processes; InstanceNorm's
    observed statistics are averages over all samples. A recomputation by a checkpoint does not
    count, neither do frozen layers or those in evaluation.

    If the block is left by an exception the running statistics are as they were before it.

    model: a model, or one layer, with truenorm's BatchNorm, SyncBatchNorm or tracking InstanceNorm.

    Errors: TypeError where `model` is no module; ValueError where it has no such layer;
    RuntimeError within another `accumulate` of the same layers. Nothing is changed then.
    """
    checks.check_module("model", model)
    layers: dict[str, Policed] = {}
    for name, module in model.named_modules():
        if isinstance(module, Policed) and module._buffers.get("running_mean") is not None:
            mean: Any = module.running_mean
            checks.check_initialized(name, is_lazy(mean))
            if module.track_running_stats:
                layers[name] = module
    checks.check_freezable(layers, {}, "accumulated")
    checks.check_not_gathering([n for n, layer in layers.items() if layer._gathered is not None])
    gathered = {}
    try:
        for layer in layers.values():
            mean = layer.running_mean
            assert mean is not None
            gathered[layer] = Gathered(mean, isinstance(layer, _InstanceNorm))
            vars(layer)["_gathered"] = gathered[layer]
            layer._choose_way()
        yield model
        for layer, moments in gathered.items():
            moments.apply(layer)
    finally:
        for layer in gathered:
            vars(layer).pop("_gathered", None)
            layer._choose_way()
