"""A call's output: what functional.py and the layers call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from . import checks, dense, modulation, response, route, sharded
from .call import Call


def normalize(call: Call) -> Tensor:
    """y; x's own statistics move `running`."""
    inputs = *call.differentiated(), call.scale, call.shift
    if has_torch_function_variadic(*inputs):
        # a subclass has a say, as in torch's own functions
        given = tuple(t for t in inputs if t is not None)
        return handle_torch_function(normalize, given, call)
    if call.scale is not None or call.shift is not None:
        by_part = modulation.by_part(call)
        if by_part is None:
            return modulation.finished(normalize(modulation.bare(call)), call)
        call = by_part
    checks.check_running_has_no_gradient(call.given or (call.running and call.running[:2]))
    way = route.way_to_output(call)
    return sharded.normalize(call) if way == route.SHARDED else dense.normalize(call, way)


def normalize_with_statistics(call: Call) -> tuple[Tensor, Tensor]:
    """y and the record of x's own statistics, which are constants."""
    if route.way(call) == route.SHARDED:
        return sharded.normalize_with_statistics(call)
    return dense.normalize_with_statistics(call)


def normalize_together(calls: Sequence[Call], group: Any) -> list[Tensor]:
    """Outputs of several calls by the statistics of all processes of a group.

    With one exchange forward and one backward.
    """
    if any(route.way(c) == route.SHARDED for c in calls):
        return [normalize(c) for c in calls]
    if any(c.scale is not None or c.shift is not None for c in calls):
        made = normalize_together([modulation.bare(c) for c in calls], group)
        return [modulation.finished(y, c) for y, c in zip(made, calls, strict=True)]
    return dense.normalize_together(calls, group)


def statistics(call: Call) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of a call's own, over all processes of its group; constants."""
    if route.way(call) == route.SHARDED:
        return sharded.statistics(call)
    return dense.statistics(call)


def channel_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel of x (N, C, *); zeros where x is empty."""
    if route.way_of(x) == route.SHARDED:
        return sharded.channel_moments(x)
    return dense.channel_moments(x)


def local_response_norm(x: Tensor, size: int, alpha: float, beta: float, k: float) -> Tensor:
    """Divide each value of x (N, C, *) by a power of its neighbouring channels' energy."""
    if route.way_of(x) == route.SHARDED:
        return sharded.local_response_norm(x, size, alpha, beta, k)
    return response.local_response_norm(x, size, alpha, beta, k)
