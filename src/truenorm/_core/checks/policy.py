"""Errors of what running statistics do, and of the options for small batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any


def check_flag(name: str) -> Callable[[Any], None]:
    """A check that the option `name` is True or False."""

    def check(value: Any) -> None:
        if not isinstance(value, bool):
            raise TypeError(f"`{name}` must be True or False, but got {value!r}")

    return check


def check_on_single(value: Any) -> None:
    if value not in ("error", "running", "skip"):
        raise ValueError(
            f'`on_single` must be "error", "running" or "skip", but got {value!r}: it says what '
            "a training step does with one value per channel"
        )


def check_virtual_batch_size(value: Any) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(
            "`virtual_batch_size` must be a whole number of at least 1 (samples of a ghost batch), "
            f"or None for the whole batch, but got {value!r}"
        )


def _check_number(name: str, value: Any, least: float, meaning: str) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not value >= least:
        raise ValueError(
            f"`{name}` must be a number of at least {least}, but got {value!r}: {meaning}"
        )


def check_rmax(value: Any) -> None:
    meaning = "r is clipped to [1 / rmax, rmax]; 1 with dmax=0 is plain BatchNorm"
    _check_number("rmax", value, 1, meaning)


def check_dmax(value: Any) -> None:
    _check_number(
        "dmax", value, 0, "d is clipped to [-dmax, dmax]; 0 with rmax=1 is plain BatchNorm"
    )


def check_tracks(option: str, chosen: bool) -> None:
    if chosen:
        raise ValueError(
            f"`{option}` needs running statistics, and this layer has none: build it with "
            f"track_running_stats=True, or leave {option} out"
        )


FOR_ONE_PROCESS = ("on_single",)


def check_small_batches(chosen: Mapping[str, Any]) -> None:
    """virtual_batch_size goes not with renorm, nor on_single with other processes."""
    size, group = chosen.get("virtual_batch_size"), chosen.get("process_group")
    if size is not None and chosen.get("renorm"):
        raise ValueError(
            f"`virtual_batch_size` (={size}) makes a batch smaller, and `renorm` (=True) makes up "
            "for a small one: choose one of them"
        )
    # what recalibrate sets meanwhile is no group
    if group is None or group == "alone":
        return
    for name in FOR_ONE_PROCESS:
        if name in chosen:
            raise ValueError(
                f"`{name}` (={chosen[name]!r}) is for the batch of one process, and "
                f"`process_group` (={group!r}) spreads it over several: leave one of them out"
            )


def check_torch_has(layer: str, chosen: Mapping[str, Any]) -> None:
    """No options, before torch makes a layer of its own that has none."""
    if chosen:
        said = ", ".join(f"{name}={value!r}" for name, value in chosen.items())
        raise ValueError(
            f"`module` has a layer, {layer or 'itself'!r}, with {said}, which torch's "
            "SyncBatchNorm would drop: call truenorm.convert(model, sync=True), which keeps it"
        )


def check_no_lazy(name: str, layers: Sequence[str]) -> None:
    if layers:
        raise ValueError(
            f"`{name}` has a lazy layer, {layers[0] or 'itself'!r}, that does not know its "
            "num_features yet: call the model once before"
        )


def check_may_span(layers: Mapping[str, Any], group: Any) -> None:
    """No layer, by name and options, has one that is for the batch of one process."""
    for name, options in layers.items():
        chosen = options.different()
        for option in FOR_ONE_PROCESS:
            if option in chosen:
                raise ValueError(
                    f"`model` has a layer, {name or 'itself'!r}, whose `{option}` "
                    f"(={chosen[option]!r}) is for the batch of one process, and `process_group` "
                    f"(={group!r}) spreads it over several: set layer.{option} back to its default "
                    "first"
                )


def check_freezable(layers: Mapping[str, Any], why_not: Mapping[str, str], verb: str) -> None:
    """At least one layer can be frozen, and none stands in the way."""
    if why_not:
        name, why = next(iter(why_not.items()))
        more = f" (and {len(why_not) - 1} more)" if len(why_not) > 1 else ""
        raise ValueError(
            f"`model` has a layer, {name or 'itself'!r}, that {why}{more}: nothing was {verb}"
        )
    if not layers:
        raise ValueError(
            f"`model` has no truenorm layer with running statistics, nothing was {verb}: call "
            "truenorm.convert(model) first, and build layers with track_running_stats=True"
        )


def check_not_frozen(frozen: Sequence[str]) -> None:
    if frozen:
        raise ValueError(
            f"`model` has {len(frozen)} frozen layer(s), the first {frozen[0]!r}, and torch's "
            "layers cannot be frozen: call truenorm.unfreeze(model) before revert, and "
            "keep them in eval()"
        )


def check_not_gathering(nested: Sequence[str]) -> None:
    if nested:
        raise RuntimeError(
            f"`model` already accumulates (layer {nested[0]!r}): truenorm.accumulate cannot be "
            "nested; end the first one before"
        )
