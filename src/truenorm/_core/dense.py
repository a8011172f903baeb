"""A dense call's output: by a kernel, in a graph, by the formula, or by torch's operators.

Eager calls go through `torch.autograd.Function` over an operator's raw handle (9 µs a call, against
34 µs through `register_autograd`); the compiler sees the operator itself, with the same formula
registered. Function transforms and forward-mode AD are served by the plain formulas.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from . import (
    by_plan,
    checks,
    exchange,
    fallback,
    geometry,
    gradients,
    operators,
    plain,
    recomputed,
    route,
    running,
    standard,
)
from . import spanning as _spanning
from .call import KEEP, Call, Form
from .exporting import is_exporting
from .geometry import BATCH


def normalize(call: Call, way: int) -> Tensor:
    """y; x's own statistics move `running`."""
    if call.group is not None:
        return normalize_together([call], call.group)[0]
    if way == route.STANDARD:
        return standard.norm(call)
    if way == route.TORCH:
        return fallback.norm(call)
    y, record = _made(call, way, keep=call.running is not None)
    if call.running is not None:
        _move(call, record)
    return y


def normalize_with_statistics(call: Call) -> tuple[Tensor, Tensor]:
    """y and the record of x's own statistics, which are constants."""
    way = route.way(call)
    if way == route.STANDARD:
        record = plain.statistics(call.x, call.mask, call.form.axes)
        return standard.norm(call), record.detach()
    return _made(call, way, keep=True)


def _made(call: Call, way: int, *, keep: bool) -> tuple[Tensor, Tensor]:
    x, weight, bias, form, mask, residual = call[:6]
    if way == route.PLAIN:
        if call.given is not None:
            # as torch: a backward sees none of it
            checks.check_running_constant(route.has_tangent(*call.given))
        return plain.norm(x, weight, bias, mask, residual, call.given, form)
    x = _in_order(call).x
    mean, var = (None, None) if call.given is None else call.given
    if way == route.KERNEL and _wants_gradient(call):
        tensors = x, weight, bias, residual, mask, mean, var
        kept: list[Tensor] = []
        y = gradients.Norm.apply(((form,), None, kept), *tensors)  # type: ignore[no-untyped-call]
        if recomputed.asked():
            _remember(y, kept[0], call)
        return y, kept[0]
    # what is exported without gradients may be trained all the same
    keep = keep or (way == route.GRAPH and (is_exporting() or _wants_gradient(call)))
    numbers = *form.numbers(x, KEEP if keep else 0), form.padding
    tensors = x, weight, bias, mask, residual, mean, var
    if way == route.KERNEL and call.inplace and x is call.x:
        record = operators.run(operators.norm_, *tensors, *numbers)
        # what has saved it for a backward pass is to notice
        if not x.is_inference():
            torch.autograd.graph.increment_version(x)
        return x, record
    if way == route.KERNEL:
        return cast(tuple[Tensor, Tensor], by_plan.run(operators.norm, tensors, numbers, 1))
    return cast(tuple[Tensor, Tensor], operators.run(operators.norm, *tensors, *numbers))


def _wants_gradient(call: Call) -> bool:
    # in one piece: small inputs notice each call
    x, weight, bias, residual = call.differentiated()
    return torch.is_grad_enabled() and (
        x.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
        or (residual is not None and residual.requires_grad)
    )


def _remember(y: Tensor, record: Tensor, call: Call) -> None:
    """How y is made."""
    # running statistics have moved when it is made again
    mean, var = (None, None) if call.given is None else record[:2]
    tensors = call.x, call.weight, call.bias, call.mask, call.residual, mean, var
    rest = *call.form.numbers(call.x), call.form.padding
    recomputed.remember(y, operators.norm, tensors, rest)


def _in_order(call: Call) -> Call:
    """With positions, or rows, that lie in memory as the dimensions say.

    As those of a mask do, and the parts of a batch that have parameters of their own.
    """
    x, features = call.x, call.form.axes.feature_dims
    first, last = (0, x.dim() - features) if features else (2, x.dim())
    asked = call.mask is not None or (features and call.by_part())
    if not asked or last - first < 2 or geometry.are_in_order(x, first, last):
        return call
    return call._replace(x=x.contiguous())


def _move(call: Call, record: Tensor) -> None:
    moving = call.running
    assert moving is not None
    if call.x.numel():
        running.move(moving, record)
    elif moving.gathered is not None or operators.within_backward():
        return
    elif moving.num_batches_tracked is not None:
        # as torch: an empty batch counts as a batch and leaves the statistics alone
        with torch.no_grad():
            moving.num_batches_tracked.add_(1)


def normalize_together(calls: Sequence[Call], group: Any) -> list[Tensor]:
    """Outputs of several calls by the statistics of all processes of a group.

    With one exchange forward and one backward.
    """
    numbers: dict[Any, int] = {}
    for c in calls:
        if route.standard():
            checks.fail_spanning(type(c.layer).__name__, group)
        checks.check_no_transform(route.transformed(*c.differentiated()))
        # under a mask messages are longer: as if it were another layer
        number = c.num_statistics() * (1 if c.mask is None else -1)
        numbers[c.layer] = numbers.get(c.layer, 0) + number
    for layer, number in numbers.items():
        exchange.agree(layer, number, calls[0].x.device, group)
    return spanning(calls, group)


def spanning(calls: Sequence[Call], group: Any) -> list[Tensor]:
    """The same, of calls that are known to have a part in every process."""
    forms = [c.form for c in calls]
    ordered = [_in_order(c) for c in calls]
    tensors = [t for c in ordered for t in (*c[:3], c.residual, c.mask, None, None)]
    made = gradients.Norm.apply((forms, group, None), *tensors)  # type: ignore[no-untyped-call]
    outputs, records = made[: len(calls)], made[len(calls) :]
    for call, record in zip(calls, records, strict=True):
        if call.running is not None:
            running.move(call.running, record)
    return list(outputs)


def channel_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel of x (N, C, *); zeros where x is empty."""
    way = route.way_of(x)
    if way in (route.PLAIN, route.STANDARD):
        mean, var, _ = plain.statistics(x, None, BATCH)
    else:
        mean, var, _ = operators.run(operators.statistics, x, None, Form(BATCH, 0.0).bits(x))
    return mean, var


def statistics(call: Call) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of a call's own, over all processes of its group; constants."""
    x, mask, form = call.x.detach(), call.mask, call.form
    way = route.way_of(x)
    x = _in_order(call._replace(x=x)).x
    if call.group is not None:
        (record,) = _spanning.statistics([form], [x], [mask], call.group)
    elif way in (route.PLAIN, route.STANDARD):
        record = plain.statistics(x, mask, form.axes)
    else:
        record = operators.run_masked(operators.statistics, x, mask, x, mask, form.bits(x))
    return record[0], record[1]
