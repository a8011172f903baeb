"""Where the installed torch differs from the formula on CPU, measured: `--against-torch`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ... import nn
from .bits import across_threads
from .cases import Spec, exact_gradients, in_layout
from .measure import (
    FLOAT32_GRADIENT,
    FLOAT32_OUTPUT,
    Setting,
    attempt,
    exact_for,
    gradients,
    last_places,
    output_error,
    output_promise,
    relative_error,
)
from .table import number

BEGIN, END = "<!-- table:begin -->", "<!-- table:end -->"

BATCH = Spec("BatchNorm2d", "batch", 4)
EVAL = Spec("BatchNorm2d", "batch", 4, training=False)
INSTANCE = Spec("InstanceNorm2d", "instance", 4)
GROUP = Spec("GroupNorm", "group", 4)
LAYER = Spec("LayerNorm", "features", 3)
RMS = Spec("RMSNorm", "features", 3)
WINDOW = Spec("LocalResponseNorm", "window", 4)

Errors = tuple[float, float | None]


@dataclass(frozen=True)
class Difference:
    """One case, measured. torch is None where torch refuses it."""

    section: str
    case: str
    unit: str
    truenorm: float
    torch: float | None
    promise: float

    @property
    def passed(self) -> bool:
        return self.truenorm <= self.promise

    @property
    def torch_right(self) -> bool:
        return self.torch is not None and self.torch <= self.promise

    def as_dict(self) -> dict[str, Any]:
        def plain(value: float | None) -> float | str | None:
            return value if value is None or math.isfinite(value) else "inf"

        return {**vars(self), "truenorm": plain(self.truenorm), "torch": plain(self.torch)}


def _output(
    spec: Spec,
    layout: str = "contiguous",
    offset: float = 0.0,
    scale: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> Errors:
    setting = Setting(spec, spec.shapes[-1], dtype, offset, scale)
    x = in_layout(setting.data.x, layout)
    ours, theirs = setting.layers()
    with torch.no_grad():
        exact = exact_for(ours, setting, x)
        return output_error(ours(x), exact), attempt(lambda: output_error(theirs(x), exact))


def _gradient(
    setting: Setting, name: str, layout: str = "contiguous", grad_layout: str = "contiguous"
) -> Errors:
    generator = torch.Generator().manual_seed(22)
    grad = torch.randn(setting.shape, generator=generator).to(setting.dtype)
    x, grad = in_layout(setting.data.x, layout), in_layout(grad, grad_layout)
    ours, theirs = setting.layers()
    exact: Tensor = getattr(exact_gradients(ours, setting.spec, grad, x), name)

    def error(layer: Any) -> float:
        return relative_error(gradients(layer, x, grad)[name], exact)

    return error(ours), attempt(lambda: error(theirs))


def _batch_one(name: str) -> Errors:
    setting = Setting(INSTANCE, (1, 16, 32, 32), torch.float32, random_parameters=True)
    return _gradient(setting, name, "contiguous", "channels_last")


def _many_rows(dtype: torch.dtype, name: str) -> Errors:
    return _gradient(Setting(LAYER, (16384, 64), dtype, random_parameters=True), name)


def _many_values() -> Errors:
    setting = Setting(BATCH, (32, 4, 128, 128), torch.float32, 1.0, random_parameters=True)
    return _gradient(setting, "input", "channels_last", "channels_last")


def _formats(spec: Spec) -> Errors:
    setting = Setting(spec, spec.shapes[0], torch.float32)
    x = in_layout(setting.data.x, "channels_last")
    ours, theirs = (float(layer(x).stride() != x.stride()) for layer in setting.layers())
    return ours, theirs


def _threads(spec: Spec, layout: str) -> Errors:
    shape = (8192, 64) if spec.axes == "features" else (8, 24, 33, 63)
    setting = Setting(spec, shape, torch.float32, 1.0, random_parameters=True)
    x = in_layout(setting.data.x, layout)
    grad = in_layout(torch.randn(shape, generator=torch.Generator().manual_seed(22)), layout)
    ours, theirs = (float(across_threads(m, spec, x, grad)) for m in setting.layers())
    return ours, theirs


def _half_statistics() -> Errors:
    """Distance of running_mean from the batches' mean, 1, after 3,000 steps of momentum 0.001."""
    x = torch.tensor([[0.5], [1.5]], dtype=torch.float16)
    errors = []
    for library in (nn, torch.nn):
        layer = library.BatchNorm1d(1, momentum=0.001).half()
        for _ in range(3000):
            layer(x)
        errors.append(abs(float(layer.running_mean) - (1.0 - 0.999**3000)))
    return errors[0], errors[1]


def _window_half() -> Errors:
    setting = Setting(WINDOW, WINDOW.shapes[0], torch.bfloat16)
    ours, theirs = setting.layers()
    exact = exact_for(ours, setting, setting.data.x)

    def error(layer: Any) -> float:
        return last_places(layer(setting.data.x), exact)

    return error(ours), attempt(lambda: error(theirs))


Case = tuple[str, str, str, float, Callable[[], Errors]]
_STD, _RELATIVE = "standard deviations", "relative"
_LARGE_MEAN, _SCALE = "A large mean", "Large and small values"
_FORMATS, _BITS = "Memory formats", "The same bits"
_GRADIENTS, _HALF = "Gradients", "Half precision"


def _cases() -> list[Case]:
    output = FLOAT32_OUTPUT
    double = output_promise(torch.float64, 1e6)
    bfloat16, float16 = (torch.finfo(d).eps / 2 for d in (torch.bfloat16, torch.float16))

    def mean(spec: Spec, offset: float, layout: str = "contiguous") -> Case:
        case = f"{spec.name}, {layout}, mean of {number(offset)} std"
        return _LARGE_MEAN, case, _STD, output, lambda: _output(spec, layout, offset)

    def scale(spec: Spec, size: float) -> Case:
        case = f"{spec.name}, values of {number(size)}"
        return _SCALE, case, _STD, output, lambda: _output(spec, scale=size)

    return [
        *(mean(BATCH, offset) for offset in (1e4, 1e6)),
        *(mean(BATCH, offset, "channels_last") for offset in (1e4, 1e6)),
        mean(EVAL, 1e4),
        mean(INSTANCE, 1e4),
        mean(GROUP, 1e4),
        *(mean(GROUP, offset, "channels_last") for offset in (1e2, 1e3)),
        (_LARGE_MEAN, "GroupNorm, channels_last, float64, mean of 1e6 std", _STD, double,
         lambda: _output(GROUP, "channels_last", 1e6, dtype=torch.float64)),
        mean(LAYER, 1e4),
        *(scale(spec, 1e18) for spec in (BATCH, GROUP, RMS)),
        scale(WINDOW, 1e20),
        *(scale(spec, size) for size in (1e30, 1e-30) for spec in (INSTANCE, LAYER)),
        *((_GRADIENTS, f"InstanceNorm2d, batch 1, output gradient in channels_last: {name}",
           _RELATIVE, FLOAT32_GRADIENT, lambda name=name: _batch_one(name))
          for name in ("input", "weight", "bias")),
        (_GRADIENTS, "BatchNorm2d, channels_last, 524,288 values per channel, mean of 1 std: input",
         _RELATIVE, FLOAT32_GRADIENT, _many_values),
        (_HALF, "LayerNorm, bfloat16, 16,384 rows: bias gradient", _RELATIVE, bfloat16,
         lambda: _many_rows(torch.bfloat16, "bias")),
        (_HALF, "LayerNorm, float16, 16,384 rows: bias gradient", _RELATIVE, float16,
         lambda: _many_rows(torch.float16, "bias")),
        (_HALF, "LocalResponseNorm, bfloat16 images", "last places", 1.0, _window_half),
        (_HALF, "BatchNorm1d.half(), momentum 0.001: running mean after 3,000 steps", "of 0.95",
         FLOAT32_OUTPUT * 10, _half_statistics),
        (_FORMATS, "InstanceNorm2d, channels_last input", "formats lost", 0.0,
         lambda: _formats(INSTANCE)),
        (_FORMATS, "BatchNorm1d, channels innermost", "formats lost", 0.0,
         lambda: _formats(Spec("BatchNorm1d", "batch", 3))),
        (_BITS, "BatchNorm2d, channels_last, 1, 2 and 3 threads", "values that differ", 0.0,
         lambda: _threads(BATCH, "channels_last")),
        (_BITS, "GroupNorm, channels_last, 1, 2 and 3 threads", "values that differ", 0.0,
         lambda: _threads(GROUP, "channels_last")),
        (_BITS, "LayerNorm, 1, 2 and 3 threads", "values that differ", 0.0,
         lambda: _threads(LAYER, "contiguous")),
    ]  # fmt: skip


def measure() -> list[Difference]:
    """Every case, for truenorm and for the installed torch."""
    found = []
    for section, case, unit, promise, run in _cases():
        ours, theirs = run()
        found.append(Difference(section, case, unit, ours, theirs, promise))
    return found


def markdown(found: Sequence[Difference]) -> str:
    """The cases as a table."""
    release = torch.__version__.partition("+")[0]
    lines = [
        f"| case | error in | truenorm | torch {release} | promised |",
        "| --- | --- | --: | --: | --: |",
    ]
    for d in found:
        theirs = number(d.torch) if d.torch is not None else "not supported"
        if d.torch_right:
            theirs = f"{theirs}: right"
        ours = number(d.truenorm) if d.passed else f"**{number(d.truenorm)}**"
        lines.append(f"| {d.case} | {d.unit} | {ours} | {theirs} | {number(d.promise)} |")
    return "\n".join(lines)


def replace(page: str, text: str) -> str:
    """The page with `text` between its markers; ValueError where it has none."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page needs the lines {BEGIN} and {END} where the table goes")
    return f"{before}{begin}\n{text}\n{end}{after}"
