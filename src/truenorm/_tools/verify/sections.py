"""Forward: the largest errors by offset, scale, layout and dtype."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ... import reference
from .cases import SPECS, Spec, in_layout, layouts_of
from .measure import (
    FLOAT32_OUTPUT,
    Check,
    Setting,
    attempt,
    exact_for,
    last_places,
    output_error,
    output_promise,
)

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
HALF = ("bfloat16", "float16")
OFFSETS = (0.0, 1e2, 1e4, 1e6)
# a bfloat16 has 8 significant bits: beyond 1e2 standard deviations from zero a normal sample has
# but one or two different values left; float16 has 11 bits, and carries 1e3
HALF_OFFSETS = {"bfloat16": (0.0, 1e1, 1e2), "float16": (0.0, 1e1, 1e2, 1e3)}
SCALES = (1e-30, 1e-18, 1e18, 1e30)
# the square of what a float32 running_var can hold
RUNNING_SCALES = (1e-18, 1e18)
# float16 ends at 6e-8 (some 20 different values within a standard deviation of 1e-6) and 65,504
HALF_SCALES = {"bfloat16": (1e-30, 1e30), "float16": (1e-6, 1.5e4)}


@dataclass(frozen=True)
class Options:
    """What of the whole to measure."""

    specs: tuple[Spec, ...] = SPECS
    dtypes: tuple[str, ...] = tuple(DTYPES)
    quick: bool = False


@dataclass(frozen=True)
class Section:
    """One table: its checks, and how they fall into rows and columns."""

    key: str
    title: str
    conditions: tuple[str, ...]
    checks: Callable[[Options], Iterator[Check]]
    row: Callable[[Check], tuple[str, str]]


def offset_label(offset: float) -> str:
    return f"{offset:.0e}".replace("e+0", "e") if offset >= 1e2 else f"{offset:g}"


def _shapes(spec: Spec, layout: str, quick: bool) -> tuple[tuple[int, ...], ...]:
    whole = not quick or layout in ("contiguous", "channels_last")
    return spec.shapes if whole else spec.shapes[:1]


def _output_check(
    section: str,
    setting: Setting,
    layout: str,
    condition: str,
    measure: Callable[[Tensor, Tensor], float],
) -> Check:
    x = in_layout(setting.data.x, layout)
    ours, theirs = setting.layers()
    with torch.no_grad():
        exact = exact_for(ours, setting, x)
        error = measure(ours(x), exact)
        torch_error = attempt(lambda: measure(theirs(x), exact))
    promise = output_promise(setting.dtype, setting.offset)
    dtype = str(setting.dtype).removeprefix("torch.")
    if setting.parameter_dtype is not None:
        condition += f", {str(setting.parameter_dtype).removeprefix('torch.')} parameters"
    return Check(
        section, setting.spec, "output", dtype, layout, setting.shape, condition,
        error, torch_error, promise,
    )  # fmt: skip


def by_offset(options: Options) -> Iterator[Check]:
    """float32 output, every layout, and the running statistics it leaves."""
    if "float32" not in options.dtypes:
        return
    for spec in options.specs:
        for layout in layouts_of(spec):
            for shape in _shapes(spec, layout, options.quick):
                for offset in OFFSETS:
                    setting = Setting(spec, shape, torch.float32, offset)
                    label = offset_label(offset)
                    yield _output_check("offset", setting, layout, label, output_error)
        if spec.axes in ("batch", "instance") and spec.training:
            yield from _running(spec)


def _running(spec: Spec) -> Iterator[Check]:
    """The running statistics after one training step."""
    for offset in OFFSETS:
        setting = Setting(spec, spec.shapes[-1], torch.float32, offset)
        x, channels = setting.data.x, spec.shapes[-1][1]
        errors = []
        for layer in setting.layers():
            layer.track_running_stats = True
            before = torch.linspace(-1.0, 1.0, channels), torch.linspace(0.5, 1.5, channels)
            layer.running_mean, layer.running_var = (b.clone() for b in before)
            layer(x)
            exact = reference.running_update(*before, x, 0.1, per_sample=spec.axes == "instance")
            after = (layer.running_mean, layer.running_var)
            # value by value: each channel has its own magnitude
            errors.append(
                max(
                    float(((a.double() - e).abs() / e.abs()).max())
                    for a, e in zip(after, exact, strict=True)
                )
            )
        yield Check(
            "offset", spec, "running statistics", "float32", "running statistics", x.shape,
            offset_label(offset), errors[0], errors[1], FLOAT32_OUTPUT,
        )  # fmt: skip


def by_scale(options: Options) -> Iterator[Check]:
    """float32 output from 1e-30 to 1e30, with eps small beside the variance, and with 1e-5."""
    if "float32" not in options.dtypes:
        return
    for spec in options.specs:
        running = spec.axes == "batch" and not spec.training
        for scale in RUNNING_SCALES if running else SCALES:
            # the default eps, 1e-5, swamps the variance of small inputs (y ≈ 0) and is lost beside
            # that of large ones; 1e-5 of the variance is the same problem at every scale
            for relative_eps in (1e-5, None):
                for layout in ("contiguous", "channels_last"):
                    if layout not in layouts_of(spec):
                        continue
                    setting = Setting(
                        spec, spec.shapes[0], torch.float32, 10.0, scale, relative_eps
                    )
                    yield _output_check("scale", setting, layout, f"{scale:.0e}", output_error)


def double(options: Options) -> Iterator[Check]:
    """float64 output, by offset."""
    if "float64" not in options.dtypes:
        return
    for spec in options.specs:
        for layout in ("contiguous", "channels_last", "sliced"):
            if layout in layouts_of(spec):
                for shape in _shapes(spec, layout, options.quick):
                    for offset in OFFSETS:
                        setting = Setting(spec, shape, torch.float64, offset)
                        label = offset_label(offset)
                        yield _output_check("float64", setting, layout, label, output_error)


def half(options: Options) -> Iterator[Check]:
    """bfloat16 and float16 output, random weight and bias, stored in that dtype and in float32."""
    for dtype in (d for d in HALF if d in options.dtypes):
        for spec in options.specs:
            layouts = ("contiguous", "channels_last", "unaligned")
            for layout in (name for name in layouts if name in layouts_of(spec)):
                for parameters in (None, torch.float32):
                    yield from _half(spec, dtype, layout, parameters, options.quick)


def _half(
    spec: Spec, dtype: str, layout: str, parameters: torch.dtype | None, quick: bool
) -> Iterator[Check]:
    for shape in spec.shapes if not quick else spec.shapes[:1]:
        for offset in HALF_OFFSETS[dtype]:
            setting = Setting(
                spec, shape, DTYPES[dtype], offset,
                random_parameters=True, parameter_dtype=parameters,
            )  # fmt: skip
            yield _output_check("half", setting, layout, offset_label(offset), last_places)
    running = spec.axes == "batch" and not spec.training
    scales = RUNNING_SCALES if running and dtype == "bfloat16" else HALF_SCALES[dtype]
    # running statistics of this size do not fit the parameters' own float16
    if parameters is None and (running or spec.axes == "batch"):
        return
    for scale, label in zip(scales, ("smallest", "largest"), strict=True):
        setting = Setting(
            spec, spec.shapes[0], DTYPES[dtype], 0.0, scale,
            random_parameters=True, parameter_dtype=parameters,
        )  # fmt: skip
        yield _output_check("half", setting, layout, label, last_places)


def _layout_row(check: Check) -> tuple[str, str]:
    named = ("contiguous", "channels_last", "running statistics")
    return check.spec.family, check.layout if check.layout in named else "other strides"


SECTIONS = (
    Section(
        "offset",
        "float32 output at a mean of 0 … 1e6 standard deviations (largest error, in std)",
        tuple(offset_label(o) for o in OFFSETS),
        by_offset,
        _layout_row,
    ),
    Section(
        "scale",
        "float32 output at a standard deviation of 1e-30 … 1e30 (largest error, in std)",
        tuple(f"{s:.0e}" for s in SCALES),
        by_scale,
        lambda check: (check.spec.family, "output"),
    ),
    Section(
        "float64",
        "float64 output at a mean of 0 … 1e6 standard deviations (largest error, in std)",
        tuple(offset_label(o) for o in OFFSETS),
        double,
        lambda check: (check.spec.family, "output"),
    ),
    Section(
        "half",
        "half precision output, by offset, and at the ends of the range (units in the last place)",
        (*(offset_label(o) for o in HALF_OFFSETS["float16"]), "smallest", "largest"),
        half,
        lambda check: (check.spec.family, check.dtype),
    ),
)
