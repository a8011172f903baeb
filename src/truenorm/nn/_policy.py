"""What running statistics do: frozen, gathered over micro-batches, spared what is not finite.

And what small batches are normalized by: ghost batches, Batch Renormalization, one value per
channel. All of it is composed of the operators that every layer has.
"""

from __future__ import annotations

from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _NormBase

from .._core import checks, exchange, masks, route
from .._core.call import Call, Running
from .._core.geometry import BATCH
from .._core.normalize import normalize, normalize_together, statistics
from .._core.operators import within_backward
from ._base import Direct
from ._options import OnSingle, Option

_RECORD = "truenorm"  # in a state_dict's metadata


class Policed(Direct, _NormBase):
    """A layer with running statistics, and what these do beyond torch's layers."""

    statistics_frozen: bool
    on_single: OnSingle
    skip_nonfinite: bool
    # gathered moments, within `accumulate`
    _gathered: Any = None
    _own_options: ClassVar[dict[str, Option | None]] = {
        "statistics_frozen": Option(False, checks.check_flag("statistics_frozen")),
        "on_single": Option("error", checks.check_on_single),
        "skip_nonfinite": Option(False, checks.check_flag("skip_nonfinite")),
    }
    _asked_by_short_way = Direct._asked_by_short_way | {"statistics_frozen"}

    def _check_options(self, chosen: dict[str, Any]) -> None:
        super()._check_options(chosen)
        if self._buffers.get("running_mean") is None or not self.track_running_stats:
            for name in ("statistics_frozen", "skip_nonfinite", "renorm"):
                checks.check_tracks(name, chosen.get(name, False))
            checks.check_tracks("on_single", chosen.get("on_single") == "running")

    def reset_running_stats(self) -> None:
        # frozen means frozen, whoever resets: torch.optim.swa_utils.update_bn does, for one
        if not self._truenorm_options.statistics_frozen:
            super().reset_running_stats()

    def _statistics_are_own(self) -> bool:
        """Whether this call's statistics are the input's."""
        return self.training and not self._truenorm_options.statistics_frozen

    def _is_plain(self) -> bool:
        return super()._is_plain() and self._gathered is None

    def _running(self) -> Running | None:
        """The running statistics that this call's own move."""
        mean, var = self.running_mean, self.running_var
        if mean is None or var is None or not self.track_running_stats:
            return None
        skip = self._truenorm_options.skip_nonfinite
        return Running(mean, var, self.num_batches_tracked, self.momentum, skip, self._gathered)

    def _may_be_alone(self) -> bool:
        """Whether a statistic may span one value."""
        return self._truenorm_options.on_single != "error"

    def _normalized(self, call: Call) -> Tensor:
        if call.given is not None or not self._may_be_alone():
            return super()._normalized(call)
        on_single = self._truenorm_options.on_single
        if route.tracing():
            asks, remedy = "whether there is one value per channel", 'set on_single="error"'
            checks.fail_untraceable("on_single", on_single, asks, remedy)
        if call.mask is not None:
            return self._some_alone(call, call.mask)
        if call.values_per_statistic() != 1 or call.x.numel() == 0:
            return super()._normalized(call)
        return normalize(self._by_constants(call))

    def _by_constants(self, call: Call) -> Call:
        """What a value that is alone is normalized by."""
        by_running = self._truenorm_options.on_single == "running"
        if by_running:
            given = _steady(self, call.x)
        else:
            dtype = torch.promote_types(call.x.dtype, torch.float32)
            mean = call.x.new_zeros(call.x.shape[1], dtype=dtype)
            given = mean, torch.ones_like(mean)
        form = call.form._replace(
            axes=BATCH, eps=call.form.eps if by_running else 0.0, constant=True
        )
        return call._replace(form=form, given=given, running=None)

    def _some_alone(self, call: Call, mask: Tensor) -> Tensor:
        """Of each statistic by itself, whether its valid values are one."""
        x = call.x
        valid = masks.against(mask, x).expand(x.shape)
        dims = [d for d in range(x.dim()) if d != 1 and not (d == 0 and call.form.axes.num_groups)]
        alone = valid.sum(dims, keepdim=True) == 1
        can_ask = route.way_of(call.x) == route.KERNEL
        if can_ask and not alone.any():
            return super()._normalized(call)
        # by the running statistics as they are before they move
        constant = normalize(self._by_constants(call))
        if can_ask and alone.all():
            return constant
        return torch.where(alone, constant, super()._normalized(call))

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
        "virtual_batch_size": Option(None, checks.check_virtual_batch_size),
        "renorm": Option(False, checks.check_flag("renorm")),
        "rmax": Option(3.0, checks.check_rmax),
        "dmax": Option(5.0, checks.check_dmax),
    }
    _asked_by_short_way = Policed._asked_by_short_way | {"rmax", "dmax"}

    def _check_options(self, chosen: dict[str, Any]) -> None:
        super()._check_options(chosen)
        checks.check_small_batches(chosen)

    def _normalized(self, call: Call) -> Tensor:
        options = self._truenorm_options
        size = options.virtual_batch_size
        if call.given is not None or (size is None and not options.renorm):
            return super()._normalized(call)
        if size is not None and route.tracing():
            asks, remedy = "how many samples there are", "set virtual_batch_size=None"
            checks.fail_untraceable("virtual_batch_size", size, asks, remedy)
        # over processes every one takes part, one without values too
        lone = call.group is None
        one_value = call.values_per_statistic() == 1 and call.mask is None
        if lone and (call.x.numel() == 0 or one_value):
            return super()._normalized(call)
        if options.renorm:
            return super()._normalized(self._renormalized(call))
        assert size is not None
        parts = _ghosts(call, _chunks(call.x, size))
        if call.group is not None:
            exchange.check_as_many_parts(len(parts), call.x.device, call.group)
            made = normalize_together(parts, call.group)
        else:
            made = [super(SmallBatches, self)._normalized(part) for part in parts]
        return made[0] if len(made) == 1 else torch.cat(made)

    def _makes_several_calls(self) -> bool:
        options = self._truenorm_options
        return options.renorm or options.virtual_batch_size is not None

    def _renormalized(self, call: Call) -> Call:
        """The call with r and d in weight and bias."""
        rmax, dmax = self._truenorm_options.rmax, self._truenorm_options.dmax
        x, weight, bias, form = call[:4]
        mean, var = statistics(call)
        known_mean, known_var = _steady(self, x)
        sigma = torch.sqrt(known_var.to(var.dtype) + form.eps)
        r = (torch.sqrt(var + form.eps) / sigma).clamp(1.0 / rmax, rmax)
        d = ((mean - known_mean.to(mean.dtype)) / sigma).clamp(-dmax, dmax)
        # wider than half precision, so that the output alone is rounded to it
        wide = torch.promote_types(x.dtype, torch.float32)
        if weight is not None:
            wide = torch.promote_types(wide, weight.dtype)
        scale, shift = (t.to(wide) if weight is None else weight * t.to(wide) for t in (r, d))
        return call._replace(weight=scale, bias=shift if bias is None else bias + shift)


def _ghosts(call: Call, sizes: list[int]) -> list[Call]:
    """The call on some samples each."""

    def of_each(name: str) -> Any:
        t = getattr(call, name)
        of_all = t is None or (name in ("scale", "shift") and t.shape[0] == 1)
        return [t] * len(sizes) if of_all else t.split(sizes)

    names = "x", "mask", "residual", "scale", "shift"
    parts = zip(*map(of_each, names), strict=True)
    return [call._replace(**dict(zip(names, part, strict=True))) for part in parts]


def _chunks(x: Tensor, size: int) -> list[int]:
    """Samples of each ghost batch; the last one is not left with one value per channel."""
    samples, rest = x.shape[0], x.shape[0] % size
    sizes = [size] * (samples // size) + ([rest] if rest else []) or [0]
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
    if route.way_of(x) != route.KERNEL:
        return mean.clone(), var.clone()
    if within_backward() and "_truenorm_found" in vars(layer):
        return cast(tuple[Tensor, Tensor], vars(layer)["_truenorm_found"])
    found = mean.clone(), var.clone()
    vars(layer)["_truenorm_found"] = found
    return found
