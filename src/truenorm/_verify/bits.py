"""Bit for bit: threads, repetition, the rest of the batch, NaN and Inf, and the memory format."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .cases import LRN_SIZE, Spec, groups_of, in_layout, layouts_of
from .measure import Check, Setting, attempt, gradients
from .sections import Options, Section

CONDITIONS = ("format", "threads", "runs", "alone", "company", "NaN, Inf")
_INTEGERS = {torch.float32: torch.int32}
# some kernel of ours or torch's cuts shapes of this size into parts for its threads
_LARGE = {3: (8, 24, 2047), 4: (8, 24, 33, 63), 5: (8, 24, 9, 15, 17)}
_LARGE_FEATURES = (16, 513, 64)

Results = dict[str, Tensor]


def _differing(a: Tensor, b: Tensor) -> int:
    """How many values differ in at least one bit."""
    integers = _INTEGERS[a.dtype]
    return int((a.contiguous().view(integers) != b.contiguous().view(integers)).sum())


def _all_differing(a: Results, b: Results) -> int:
    return sum(_differing(a[name], b[name]) for name in a)


def _run(layer: Any, spec: Spec, x: Tensor, grad: Tensor) -> Results:
    """Output and gradients of a step that leaves the layer as it was."""
    if spec.axes == "batch" and spec.training:
        layer.reset_running_stats()
    return gradients(layer, x, grad)


def _across_threads(layer: Any, spec: Spec, x: Tensor, grad: Tensor) -> int:
    before = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, max(before, 3)):
            torch.set_num_threads(count)
            results.append(_run(layer, spec, x, grad))
    finally:
        torch.set_num_threads(before)
    return sum(_all_differing(results[0], other) for other in results[1:])


def _across_runs(layer: Any, spec: Spec, x: Tensor, grad: Tensor, runs: int) -> int:
    first = _run(layer, spec, x, grad)
    return sum(_all_differing(first, _run(layer, spec, x, grad)) for _ in range(runs - 1))


def _per_sample(results: Results, sample: int) -> Results:
    return {name: results[name][sample : sample + 1] for name in ("output", "input")}


def _alone(layer: Any, spec: Spec, x: Tensor, grad: Tensor) -> int:
    """Each of the first samples by itself, against itself in the batch."""
    whole = _run(layer, spec, x, grad)
    return sum(
        _all_differing(
            _per_sample(whole, i),
            _per_sample(_run(layer, spec, x[i : i + 1], grad[i : i + 1]), 0),
        )
        for i in range(min(2, x.shape[0]))
    )


def _in_company(layer: Any, spec: Spec, x: Tensor, grad: Tensor) -> int:
    """The second sample, where the others become huge or NaN."""
    whole = _per_sample(_run(layer, spec, x, grad), 1)
    count = 0
    for value in (1e30, math.nan):
        other = x.clone()
        other[0], other[2:] = value, value
        count += _all_differing(whole, _per_sample(_run(layer, spec, other, grad), 1))
    return count


def _touched(spec: Spec, x: Tensor) -> tuple[Tensor, Tensor]:
    """Which outputs, and which input gradients, may depend on x[1, 1, 1, …]."""
    output = torch.zeros(x.shape, dtype=torch.bool)
    if spec.axes == "window":
        gradient = output.clone()
        # the gradient reaches a window of windows
        for mask, reach in ((output, LRN_SIZE // 2), (gradient, 2 * (LRN_SIZE // 2))):
            mask[(1, slice(max(0, 1 - reach), 2 + reach), *[1] * (x.dim() - 2))] = True
        return output, gradient
    if not spec.training:
        output[(1,) * x.dim()] = True
    elif spec.axes == "batch":
        output[:, 1] = True
    elif spec.axes == "instance":
        output[1, 1] = True
    elif spec.axes == "group":
        output[1, : x.shape[1] // groups_of(x.shape[1])] = True
    else:
        output[(1,) * (x.dim() - 1)] = True
    return output, output


def _poison(layer: Any, spec: Spec, x: Tensor, grad: Tensor) -> int:
    """NaN and Inf: values of other statistics that change, and values of its own that hide a NaN."""
    clean = _run(layer, spec, x, grad)
    count = 0
    for value in (math.nan, math.inf):
        poisoned = x.clone()
        poisoned[(1,) * x.dim()] = value
        found = _run(layer, spec, poisoned, grad)
        masks = dict(zip(("output", "input"), _touched(spec, x), strict=True))
        for name, mask in masks.items():
            count += _differing(clean[name][~mask], found[name][~mask])
        if math.isnan(value):
            count += int((~found["output"][masks["output"]].isnan()).sum())
    return count


def _format_lost(layer: Any, spec: Spec, x: Tensor, grad: Tensor) -> int:
    return int(_run(layer, spec, x, grad)["output"].stride() != x.stride())


def _spec_checks(spec: Spec, quick: bool) -> Iterator[Check]:
    large = _LARGE_FEATURES if spec.axes == "features" else _LARGE[spec.rank]
    runs = 4 if quick else 20
    for layout in ("contiguous", "channels_last"):
        if layout not in layouts_of(spec):
            continue

        tests: list[tuple[str, str, tuple[int, ...], Callable[[Any, Tensor, Tensor], int]]] = [
            ("memory format", "format", spec.shapes[0], lambda m, x, g: _format_lost(m, spec, x, g)),
            ("1, 2 and 3 threads", "threads", large, lambda m, x, g: _across_threads(m, spec, x, g)),
            (f"{runs} runs", "runs", large, lambda m, x, g: _across_runs(m, spec, x, g, runs)),
            ("NaN and Inf", "NaN, Inf", spec.shapes[0], lambda m, x, g: _poison(m, spec, x, g)),
        ]
        if spec.per_sample:
            for shape in (spec.shapes[0], large):
                tests += [
                    ("sample alone", "alone", shape, lambda m, x, g: _alone(m, spec, x, g)),
                    ("in company", "company", shape, lambda m, x, g: _in_company(m, spec, x, g)),
                ]
        for what, condition, shape, test in tests:
            setting = Setting(spec, shape, torch.float32, 1.0, random_parameters=True)
            x = in_layout(setting.data.x, layout)
            generator = torch.Generator().manual_seed(22)
            grad = in_layout(torch.randn(shape, generator=generator), layout)
            ours, theirs = setting.layers()
            count = float(test(ours, x, grad))
            torch_count = attempt(lambda: float(test(theirs, x, grad)))  # noqa: B023
            yield Check(
                "bits", spec, what, "float32", layout, shape, condition, count, torch_count, 0.0
            )


def checks(options: Options) -> Iterator[Check]:
    """Every bit-for-bit promise, output and gradients."""
    if "float32" not in options.dtypes:
        return
    for spec in options.specs:
        yield from _spec_checks(spec, options.quick)


SECTIONS = (
    Section(
        "bits",
        "bit for bit: how many values change with the number of threads, from run to run, for a "
        "sample alone or in other company, outside a NaN's statistic; memory formats lost",
        CONDITIONS,
        checks,
        lambda check: (check.spec.family, "all layouts"),
    ),
)
