"""What is measured: a layer of truenorm and of torch, each against float64, on the same input."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ... import nn
from .cases import Data, Spec, build, data, exact_output

# one rounding to float32 is 6e-8 of the value; the largest values of a normal sample are some 5
# standard deviations, and the mean, the scale and the result are rounded once each
FLOAT32_OUTPUT = 2e-6
# norm-wise, so large values do not stand out; the sums run over up to 1e5 values in blocks
FLOAT32_GRADIENT = 5e-6
# float64 has no wider type to sum in: the mean is rounded, by up to 1.1e-16 of the offset, wherever
# two blocks are merged, and 8 times over covers the merges that a value meets in these shapes
# (8.9e-10 at an offset of 1e6). The first term is 5 standard deviations, rounded some 10 times
FLOAT64_OUTPUT, FLOAT64_PER_OFFSET = 1e-14, 8 * 2.0**-53


def output_promise(dtype: torch.dtype, offset: float) -> float:
    """The largest error promised: in standard deviations, for half precision in last places."""
    if dtype == torch.float32:
        return FLOAT32_OUTPUT
    if dtype == torch.float64:
        return FLOAT64_OUTPUT + FLOAT64_PER_OFFSET * offset
    return 1.0


def gradient_promise(dtype: torch.dtype, offset: float) -> float:
    """The largest relative norm-wise error promised of a gradient stored in `dtype`."""
    if dtype == torch.float32:
        return FLOAT32_GRADIENT
    if dtype == torch.float64:
        return FLOAT64_OUTPUT + FLOAT64_PER_OFFSET * offset
    # computed wider and rounded once: at most half a unit in the last place of each value
    return torch.finfo(dtype).eps / 2


@dataclass(frozen=True)
class Check:
    """One measurement, and what is promised of it.

    truenorm and torch are errors; torch is None where torch refuses the case or none is measured.
    """

    section: str
    spec: Spec
    what: str
    dtype: str
    layout: str
    shape: tuple[int, ...]
    condition: str
    truenorm: float
    torch: float | None
    promise: float

    @property
    def passed(self) -> bool:
        return self.truenorm <= self.promise

    @property
    def torch_passed(self) -> bool:
        return self.torch is None or self.torch <= self.promise

    def as_dict(self) -> dict[str, Any]:
        """For JSON, which has no infinity: a result that is not finite is the word "inf"."""

        def number(value: float | None) -> float | str | None:
            return value if value is None or math.isfinite(value) else "inf"

        return {
            "section": self.section,
            "layer": self.spec.layer,
            "mode": "train" if self.spec.training else "eval",
            "what": self.what,
            "dtype": self.dtype,
            "layout": self.layout,
            "shape": list(self.shape),
            "condition": self.condition,
            "truenorm": number(self.truenorm),
            "torch": number(self.torch),
            "promise": self.promise,
            "passed": self.passed,
            "torch_passed": self.torch_passed,
        }

    def __str__(self) -> str:
        case = (self.spec.name, self.what, self.dtype, self.layout, f"shape {tuple(self.shape)}")
        error = f"{self.truenorm:.2g}, promised {self.promise:.2g}"
        return f"{', '.join(case)}, {self.condition}: {error}"


def _finite(error: Tensor | float) -> float:
    """An error that is not a number is an infinite error."""
    value = float(error)
    return value if math.isfinite(value) else math.inf


def output_error(y: Tensor, exact: Tensor) -> float:
    """Largest error, in units of the root mean square of the exact output.

    For a normalized output of weight 1 that is its standard deviation.
    """
    unit = exact.square().mean().sqrt()
    return _finite((y.detach().double() - exact).abs().max() / unit)


def last_places(y: Tensor, exact: Tensor) -> float:
    """Largest distance from the correctly rounded result, in units in its last place."""
    info = torch.finfo(y.dtype)
    rounded = exact.to(y.dtype).double()
    _, exponent = torch.frexp(rounded.abs().clamp(min=info.tiny))
    place = torch.ldexp(torch.full_like(rounded, info.eps), exponent - 1)
    return _finite(((y.detach().double() - rounded).abs() / place).max())


def relative_error(gradient: Tensor, exact: Tensor) -> float:
    """Norm of the error, relative to the norm of the exact gradient."""
    error = torch.linalg.vector_norm(gradient.detach().double() - exact)
    return _finite(error / torch.linalg.vector_norm(exact))


@dataclass(frozen=True)
class Setting:
    """What a layer is measured on."""

    spec: Spec
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: float = 0.0
    scale: float = 1.0
    # of the variance; None is the layer's default, 1e-5
    relative_eps: float | None = 1e-5
    random_parameters: bool = False
    parameter_dtype: torch.dtype | None = None

    @property
    def data(self) -> Data:
        return data(self.spec, self.shape, self.dtype, self.offset, self.scale)

    def layers(self) -> tuple[Any, Any]:
        """The layer of truenorm, and torch's with the same parameters and statistics."""
        eps = 1e-5 if self.relative_eps is None else self.relative_eps * self.scale**2
        pair = tuple(build(library, self.spec, self.shape, eps) for library in (nn, torch.nn))
        generator = torch.Generator().manual_seed(21)
        dtype = self.parameter_dtype or self.dtype
        for name in ("weight", "bias"):
            if getattr(pair[0], name, None) is None:
                continue
            size = getattr(pair[0], name).shape
            values = torch.full(size, 1.0 if name == "weight" else 0.0)
            if self.random_parameters:
                values = torch.randn(size, generator=generator) * 0.5 + values
            for layer in pair:
                setattr(layer, name, torch.nn.Parameter(values.to(dtype)))
        if self.spec.axes == "batch":
            # torch keeps running statistics in the parameters' dtype: values that both can hold
            mean, var = self.data.running_mean.to(dtype), self.data.running_var.to(dtype)
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            for layer, stored in zip(pair, (wide, dtype), strict=True):
                layer.running_mean = mean.to(stored, copy=True)
                layer.running_var = var.to(stored, copy=True)
        return pair[0], pair[1]


def gradients(layer: Any, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """Output, and gradients of input, weight and bias, each as far as the layer has it."""
    # a leaf with the strides of x: clone() would make a non-dense x dense
    leaf = x.detach().requires_grad_()
    parameters = {
        name: p for name in ("weight", "bias") if (p := getattr(layer, name, None)) is not None
    }
    y = layer(leaf)
    found = torch.autograd.grad(y, [leaf, *parameters.values()], grad)
    return {"output": y.detach(), **dict(zip(("input", *parameters), found, strict=True))}


def attempt(run: Callable[[], float]) -> float | None:
    """torch's error, or None where torch refuses the case."""
    try:
        with warnings.catch_warnings():
            # torch warns where it takes a slow path, which is no matter here
            warnings.simplefilter("ignore")
            return run()
    except (RuntimeError, ValueError, NotImplementedError):
        return None


def exact_for(layer: Any, setting: Setting, x: Tensor) -> Tensor:
    """The oracle's output; for float64 inputs it is given the same problem moved to the origin.

    There the oracle is no more exact than what it judges, and x − centre is exact.
    """
    if setting.dtype != torch.float64 or not setting.spec.follows_offset:
        return exact_output(layer, setting.spec, x)
    centre = setting.data.centre
    if setting.spec.axes != "batch":
        return exact_output(layer, setting.spec, x - centre)
    before = layer.running_mean
    layer.running_mean = before - centre.reshape(-1)
    try:
        return exact_output(layer, setting.spec, x - centre)
    finally:
        layer.running_mean = before
