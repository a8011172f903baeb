"""Backward: the errors of the gradients for every mix of memory formats."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from .cases import Spec, exact_gradients, exact_output, in_layout, layouts_of
from .measure import Check, Setting, attempt, gradient_promise, gradients, relative_error
from .sections import DTYPES, HALF, RUNNING_SCALES, SCALES, Options, Section, offset_label

# gradients are promised up to 1e4: at 1e6 the input itself has but 16 values per standard deviation
OFFSETS = (0.0, 1e2, 1e4)
# input and output gradient each in one of these; a gradient may also repeat one sample (stride 0)
FORMATS = ("contiguous", "channels_last", "transposed", "permuted", "sliced")
# batch 1, one channel, 1×1 and n×1 maps, and a map that a kernel splits. At least 5 values to a
# statistic: with 2, the exact gradient is zero
_ODD_MAPS = ((1, 6, 9, 11), (4, 1, 5, 7), (1, 1, 6, 5), (8, 15, 1, 1), (4, 6, 9, 1))
_LARGE_MAP = (2, 24, 33, 31)
_ODD_FEATURES = ((1, 9, 35), (7, 1, 35), (1, 1, 35), (513, 7, 64))
# many rows: weight and bias gradients are sums over all of them
TALL = {"features": (16384, 64), "other": (64, 8, 32, 16)}


def _odd_shapes(spec: Spec) -> Iterator[tuple[int, ...]]:
    if spec.axes == "features":
        yield from _ODD_FEATURES
        return
    if spec.layer in ("BatchNorm1d", "SyncBatchNorm", "GroupNorm"):
        yield (33, 15)
    for n, c, h, w in (*_ODD_MAPS, _LARGE_MAP):
        shapes = {3: (n, c, h * w), 4: (n, c, h, w), 5: (n, c, h, w, 1)}
        # one position per channel has no variance
        if not (spec.axes == "instance" and h * w == 1):
            yield shapes[spec.rank]


def _cancels(spec: Spec, shape: tuple[int, ...]) -> bool:
    """Whether one gradient for every sample is one per statistic: its exact result is zero."""
    return spec.axes == "batch" and math.prod(shape[2:]) == 1


def _grad(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(22)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def _checks(
    section: str, setting: Setting, layout: str, grad_layout: str, condition: str | dict[str, str]
) -> Iterator[Check]:
    """One check for the output and one for each gradient.

    condition: the column, or the columns of the input's gradient and of the parameters'.
    """
    spec = setting.spec
    x = in_layout(setting.data.x, layout)
    grad = in_layout(_grad(setting.shape, setting.dtype), grad_layout)
    ours, theirs = setting.layers()
    exact = exact_gradients(ours, spec, grad, x)
    wanted = {"output": exact_output(ours, spec, x), "input": exact.input}
    wanted |= {k: v for k in ("weight", "bias") if (v := getattr(exact, k)) is not None}
    found = gradients(ours, x, grad)
    torch_found: dict[str, Tensor] = {}

    def run_torch() -> float:
        torch_found.update(gradients(theirs, x, grad))
        return 0.0

    attempt(run_torch)
    for what, value in wanted.items():
        if what == "output" and setting.dtype != torch.float32:
            continue
        got, torch_got = found[what], torch_found.get(what)
        if got.shape != x.shape and what in ("output", "input"):
            raise AssertionError(f"{spec.name}: {what} of shape {tuple(got.shape)}")
        promise = gradient_promise(got.dtype, setting.offset)
        error = relative_error(got, value)
        torch_error = None if torch_got is None else relative_error(torch_got, value)
        if section == "dtypes":
            # in units of the promise, so that one row serves all dtypes
            error, torch_error = error / promise, torch_error and torch_error / promise
            promise = 1.0
        dtype = str(setting.dtype).removeprefix("torch.")
        label = condition
        if isinstance(label, dict):
            label = label["input" if what == "input" else "parameters"]
        yield Check(
            f"gradient {section}", spec, "output" if what == "output" else f"{what} gradient",
            dtype, f"{layout}, output gradient {grad_layout}", setting.shape, label,
            error, torch_error, promise,
        )  # fmt: skip


def float32(options: Options) -> Iterator[Check]:
    """Every mix of the formats of input and output gradient, random weight and bias."""
    if "float32" not in options.dtypes:
        return
    for spec in options.specs:
        shapes = (spec.shapes[0], *_odd_shapes(spec))
        formats = [name for name in FORMATS if name in layouts_of(spec)]
        for shape in shapes:
            large = shape == shapes[-1]
            offsets = (0.0, 1e4) if options.quick or shape != shapes[0] else OFFSETS
            for layout in formats:
                for grad_layout in (*formats, "expanded"):
                    if grad_layout == "expanded" and _cancels(spec, shape):
                        continue
                    plain = {layout, grad_layout} <= {"contiguous", "channels_last"}
                    if not plain and (large or (options.quick and shape != shapes[0])):
                        continue
                    for offset in offsets:
                        setting = Setting(
                            spec, shape, torch.float32, offset, random_parameters=True
                        )
                        label = offset_label(offset)
                        yield from _checks("float32", setting, layout, grad_layout, label)


def scales(options: Options) -> Iterator[Check]:
    """Gradients of inputs of extreme size."""
    if "float32" not in options.dtypes:
        return
    for spec in options.specs:
        # at 1e30 the exact gradient of LocalResponseNorm is smaller than float32 can hold
        narrow = (spec.axes == "batch" and not spec.training) or spec.axes == "window"
        for scale in RUNNING_SCALES if narrow else SCALES:
            setting = Setting(
                spec, spec.shapes[0], torch.float32, 0.0, scale, random_parameters=True
            )
            label = f"{scale:.0e}"
            for layout in ("contiguous", "channels_last"):
                if layout in layouts_of(spec):
                    yield from _checks("scale", setting, layout, layout, label)


def half(options: Options) -> Iterator[Check]:
    """Half precision, parameters stored in the input's dtype and in float32; also many rows."""
    for dtype in (d for d in HALF if d in options.dtypes):
        for spec in options.specs:
            tall = TALL["features"] if spec.axes == "features" else TALL["other"]
            shapes: tuple[tuple[int, ...], ...] = (spec.shapes[0],)
            if len(tall) == spec.rank or spec.axes == "features":
                shapes += (tall,)
            for shape in shapes:
                for layout in ("contiguous", "channels_last"):
                    if layout not in layouts_of(spec):
                        continue
                    setting = Setting(spec, shape, DTYPES[dtype], random_parameters=True)
                    short = {"bfloat16": "bf16", "float16": "fp16"}[dtype]
                    labels = {"input": f"{short} x", "parameters": f"{short} w,b"}
                    yield from _checks("dtypes", setting, layout, layout, labels)
                    setting = replace(setting, parameter_dtype=torch.float32)
                    labels = {"input": f"{short} x", "parameters": "fp32 w,b"}
                    yield from _checks("dtypes", setting, layout, "contiguous", labels)


def double(options: Options) -> Iterator[Check]:
    """float64 gradients, at an offset of 0, where the oracle is as exact as what it judges."""
    if "float64" not in options.dtypes:
        return
    for spec in options.specs:
        for layout in ("contiguous", "channels_last"):
            if layout in layouts_of(spec):
                setting = Setting(spec, spec.shapes[0], torch.float64, random_parameters=True)
                yield from _checks("dtypes", setting, layout, "contiguous", "fp64")


def _mix(check: Check) -> tuple[str, str]:
    x, _, grad = check.layout.partition(", output gradient ")
    return check.spec.family, "same format" if x == grad else "mixed formats"


SECTIONS = (
    Section(
        "gradient float32",
        "float32 gradients, input and output gradient in one memory format or two, by offset "
        "(relative, norm-wise)",
        tuple(offset_label(o) for o in OFFSETS),
        float32,
        _mix,
    ),
    Section(
        "gradient scale",
        "float32 gradients at a standard deviation of 1e-30 … 1e30 (relative, norm-wise)",
        tuple(f"{s:.0e}" for s in SCALES),
        scales,
        lambda check: (check.spec.family, "gradients"),
    ),
    Section(
        "gradient dtypes",
        "gradients of input x, weight w, bias b in other dtypes (norm-wise, in units of what is "
        "promised: one rounding; float32 parameters 5e-6; float64 1e-14)",
        ("bf16 x", "bf16 w,b", "fp16 x", "fp16 w,b", "fp32 w,b", "fp64"),
        lambda options: (c for run in (half, double) for c in run(options)),
        lambda check: (check.spec.family, "gradients"),
    ),
)
