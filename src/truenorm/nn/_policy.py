"""What running statistics do: frozen, gathered over micro-batches, spared what is not finite.

And what small batches are normalized by: ghost batches, Batch Renormalization, one value per
channel. All of it is composed of the operators that every layer has.
"""

from __future__ import annotations

from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _NormBase

from .. import _axes, _checks, _ops
from .._axes import BATCH, Axes
from .._ops import Running, route
from ._options import Configurable, OnSingle, Option

_RECORD = "truenorm"  # in a state_dict's metadata


class Policed(Configurable, _NormBase):
    """A layer with running statistics, and what these do beyond torch's layers."""

    statistics_frozen: bool
    on_single: OnSingle
    skip_nonfinite: bool
    # gathered moments, within `accumulate`
    _gathered: Any = None
    _own_options: ClassVar[dict[str, Option | None]] = {
        "statistics_frozen": Option(False, _checks.check_flag("statistics_frozen")),
        "on_single": Option("error", _checks.check_on_single),
        "skip_nonfinite": Option(False, _checks.check_flag("skip_nonfinite")),
    }
    _asked_by_short_way = Configurable._asked_by_short_way | {"statistics_frozen"}

    def _check_options(self, chosen: dict[str, Any]) -> None:
        super()._check_options(chosen)
        if self._buffers.get("running_mean") is None or not self.track_running_stats:
            for name in ("statistics_frozen", "skip_nonfinite", "renorm"):
                _checks.check_tracks(name, chosen.get(name, False))
            _checks.check_tracks("on_single", chosen.get("on_single") == "running")

    def reset_running_stats(self) -> None:
        # frozen means frozen, whoever resets: torch.optim.swa_utils.update_bn does, for one
        if not self._truenorm_options.statistics_frozen:
            super().reset_running_stats()

    def _statistics_are_own(self) -> bool:
        """Whether this call's statistics are the input's."""
        return self.training and not self._truenorm_options.statistics_frozen

    def _is_plain(self) -> bool:
        return super()._is_plain() and self._gathered is None

    def _has_policy(self) -> bool:
        options = self._truenorm_options
        return (
            self._gathered is not None
            or options.on_single != "error"
            or options.skip_nonfinite
            or options.virtual_batch_size is not None
            or options.renorm
        )

    def _running(self, count_batches: bool) -> Running | None:
        mean, var = self.running_mean, self.running_var
        if mean is None or var is None or not self.track_running_stats:
            return None
        batches = self.num_batches_tracked if count_batches else None
        momentum = self.momentum if count_batches or self.momentum is not None else 0.0
        return Running(
            mean, var, batches, momentum, self._truenorm_options.skip_nonfinite, self._gathered
        )

    def _alone(self, x: Tensor, axes: Axes) -> bool:
        """Whether each statistic spans one value, and something other than an error follows."""
        values = _axes.values_per_statistic(x.shape, axes) if x.shape[1] else 0
        on_single = self._truenorm_options.on_single
        if on_single != "error" and route.tracing():
            asks, remedy = "whether there is one value per channel", 'set on_single="error"'
            _checks.fail_untraceable("on_single", on_single, asks, remedy)
        if values != 1 or x.numel() == 0:
            return False
        if on_single == "error":
            _checks.check_more_than_one_value(x, 1, per_sample=axes.num_groups > 0)
        return True

    def _normalize_alone(self, x: Tensor) -> Tensor:
        by_running = self._truenorm_options.on_single == "running"
        if by_running:
            mean, var = _steady(self, x)
        else:
            mean = x.new_zeros(x.shape[1], dtype=torch.promote_types(x.dtype, torch.float32))
            var = torch.ones_like(mean)
        eps = self.eps if by_running else 0.0
        return _ops.normalize_fixed(x, mean, var, self.weight, self.bias, eps)

    def _by_policy(self, x: Tensor, axes: Axes) -> Tensor:
        """The training step of a checked input (N, C, *)."""
        if self._alone(x, axes):
            return self._normalize_alone(x)
        return _ops.normalize(
            x, self.weight, self.bias, axes, self.eps, self._running(not axes.num_groups)
        )

    # --- frozen is part of the state, in the metadata, which torch's layers load and ignore

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        metadata = getattr(destination, "_metadata", None)
        if self._truenorm_options.statistics_frozen and metadata is not None:
            metadata.setdefault(prefix[:-1], {})[_RECORD] = {"frozen": True}

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, *args: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)
        if local_metadata.get(_RECORD, {}).get("frozen") and self.running_mean is not None:
            self._choose("statistics_frozen", True)


class SmallBatches(Policed):
    """BatchNorm for batches that are too small, or too large, to be one batch."""

    virtual_batch_size: int | None
    renorm: bool
    rmax: float
    dmax: float
    _own_options: ClassVar[dict[str, Option | None]] = {
        "virtual_batch_size": Option(None, _checks.check_virtual_batch_size),
        "renorm": Option(False, _checks.check_flag("renorm")),
        "rmax": Option(3.0, _checks.check_rmax),
        "dmax": Option(5.0, _checks.check_dmax),
    }
    _asked_by_short_way = Policed._asked_by_short_way | {"rmax", "dmax"}

    def _check_options(self, chosen: dict[str, Any]) -> None:
        super()._check_options(chosen)
        _checks.check_small_batches(chosen)

    def _by_policy(self, x: Tensor, axes: Axes) -> Tensor:
        options = self._truenorm_options
        size = options.virtual_batch_size
        if size is None and not options.renorm:
            return super()._by_policy(x, axes)
        if size is not None and route.tracing():
            asks, remedy = "how many samples there are", "set virtual_batch_size=None"
            _checks.fail_untraceable("virtual_batch_size", size, asks, remedy)
        if self._alone(x, axes):
            return self._normalize_alone(x)
        if options.renorm and x.numel():
            return self._renormalized(x)
        parts = x.split(_chunks(x, size or x.shape[0])) if x.numel() else [x]
        running = self._running(True)
        made = [_ops.normalize(p, self.weight, self.bias, axes, self.eps, running) for p in parts]
        return made[0] if len(made) == 1 else torch.cat(made)

    def _renormalized(self, x: Tensor) -> Tensor:
        rmax, dmax = self._truenorm_options.rmax, self._truenorm_options.dmax
        mean, var = _ops.channel_moments(x.detach())
        known_mean, known_var = _steady(self, x)
        sigma = torch.sqrt(known_var.to(var.dtype) + self.eps)
        r = (torch.sqrt(var + self.eps) / sigma).clamp(1.0 / rmax, rmax)
        d = ((mean - known_mean.to(mean.dtype)) / sigma).clamp(-dmax, dmax)
        weight, bias = self.weight, self.bias
        narrow = torch.promote_types(x.dtype, torch.float32) if weight is None else weight.dtype
        scale = r.to(narrow) if weight is None else weight * r.to(narrow)
        shift = d.to(narrow) if weight is None else weight * d.to(narrow)
        if bias is not None:
            shift = bias + shift
        return _ops.normalize(x, scale, shift, BATCH, self.eps, self._running(True))


def _chunks(x: Tensor, size: int) -> list[int]:
    """Samples of each ghost batch; the last one is not left with one value per channel."""
    samples, rest = x.shape[0], x.shape[0] % size
    sizes = [size] * (samples // size) + ([rest] if rest else [])
    if len(sizes) > 1 and sizes[-1] * (x.numel() // (samples * x.shape[1])) == 1:
        last = sizes.pop()
        sizes[-1] += last
    return sizes


def _steady(layer: Policed, x: Tensor) -> tuple[Tensor, Tensor]:
    """The running statistics that a batch is normalized by, as they were at its first forward.

    They move at the end of that, and a checkpoint that computes the same forward again, within the
    backward pass, must find what there was.
    """
    mean, var = layer.running_mean, layer.running_var
    assert mean is not None and var is not None
    if route.way(x) != route.KERNEL:
        return mean.clone(), var.clone()
    if _ops.within_backward() and "_truenorm_found" in vars(layer):
        return cast(tuple[Tensor, Tensor], vars(layer)["_truenorm_found"])
    found = mean.clone(), var.clone()
    vars(layer)["_truenorm_found"] = found
    return found
