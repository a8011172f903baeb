"""Bit for bit: threads, repetition, the rest of the batch, NaN and Inf, and the memory format."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .cases import LRN_SIZE, Spec, groups_of, in_layout, layouts_of
from .measure import Check, Setting, attempt, gradients
from .sections import Options, Section

CONDITIONS = ("format", "threads", "runs", "alone", "company", "NaN, Inf")
# shapes that are cut into parts for the threads
_LARGE = {3: (6, 24, 1023), 4: (6, 24, 33, 31), 5: (6, 24, 9, 11, 11)}
_LARGE_FEATURES = (6, 513, 64)

Results = dict[str, Tensor]
_Test = Callable[[Any, Spec, Tensor, Tensor], int]


def _differing(a: Tensor, b: Tensor) -> int:
    """How many values differ in at least one bit."""
    bits_a, bits_b = (t.contiguous().view(torch.int32) for t in (a, b))
    return int((bits_a != bits_b).sum())


def _all_differing(a: Results, b: Results) -> int:
    return sum(_differing(a[name], b[name]) for name in a)


def _run(layer: Any, spec: Spec, x: Tensor, grad: Tensor) -> Results:
    """Output and gradients of a step that leaves the layer as it was."""
    if spec.axes == "batch" and spec.training:
        layer.reset_running_stats()
    return gradients(layer, x, grad)


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(count)
        yield
    finally:
        torch.set_num_threads(before)


def across_threads(layer: Any, spec: Spec, x: Tensor, grad: Tensor) -> int:
    """How many values of output and gradients change with the number of threads."""
    results = []
    for count in (1, 2, 3):
        with _threads(count):
            results.append(_run(layer, spec, x, grad))
    return sum(_all_differing(results[0], other) for other in results[1:])


def _across_runs(layer: Any, spec: Spec, x: Tensor, grad: Tensor, runs: int) -> int:
    with _threads(2):
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
            window: tuple[Any, ...] = (1, slice(max(0, 1 - reach), 2 + reach))
            mask[window + (1,) * (x.dim() - 2)] = True
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
    """NaN and Inf: values of other statistics that change, and own values that hide a NaN."""
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
    # threads are slow to start: the whole of it for one rank of each formula
    same_kernels = spec.layer[-2:] in ("1d", "3d")
    runs = 3 if quick or same_kernels else 20
    for layout in ("contiguous", "channels_last"):
        if layout not in layouts_of(spec):
            continue
        small = spec.shapes[0]
        tests: list[tuple[str, str, tuple[int, ...], _Test]] = [
            ("memory format", "format", small, _format_lost),
            ("NaN and Inf", "NaN, Inf", small, _poison),
        ]
        if not (quick and same_kernels):
            repeated = functools.partial(_across_runs, runs=runs)
            tests.append(("1, 2 and 3 threads", "threads", large, across_threads))
            tests.append((f"{runs} runs", "runs", large, repeated))
        if spec.per_sample:
            for shape in (small,) if quick else (small, large):
                tests.append(("sample alone", "alone", shape, _alone))
                tests.append(("in company", "company", shape, _in_company))
        for what, condition, shape, test in tests:
            setting = Setting(spec, shape, torch.float32, 1.0, random_parameters=True)
            x = in_layout(setting.data.x, layout)
            generator = torch.Generator().manual_seed(22)
            grad = in_layout(torch.randn(shape, generator=generator), layout)
            ours, theirs = setting.layers()
            count = float(test(ours, spec, x, grad))
            torch_count = attempt(functools.partial(test, theirs, spec, x, grad))
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
