"""Every tolerance of the suite, each beside its reason."""

from __future__ import annotations

import torch
from torch import Tensor

# float64 in, float64 out: the two sides differ in the order of their sums only.
FLOAT64 = 1e-11
# The promise for float32: an error of 2e-6 standard deviations forward, 5e-6 by norm backward.
FLOAT32_FORWARD = 2e-6
FLOAT32_GRADIENT = 5e-6
# Two float32 implementations against one another, torch's included: each within the promise above,
# torch's also within a few hundred roundings of 6e-8 at the offsets used in the comparisons.
FLOAT32_BETWEEN = 2e-5
# Losses of a network after some steps: the roundings of a float32 training run grow by the step.
LOSS_AFTER_TRAINING = 1e-3

# bits of a half-precision mantissa and the smallest exponent of a normal number
_MANTISSA = {torch.bfloat16: (7, -126), torch.float16: (10, -14)}


def last_place(value: Tensor, dtype: torch.dtype) -> Tensor:
    """One unit in the last place of `dtype` at each value, float64."""
    mantissa, smallest = _MANTISSA[dtype]
    exponent = torch.frexp(value.double().abs()).exponent.sub(1).clamp(min=smallest)
    return torch.ldexp(torch.ones_like(value, dtype=torch.float64), exponent - mantissa)


def assert_output(actual: Tensor, exact: Tensor) -> None:
    """`actual`, in its dtype, is the float64 result up to the promised error."""
    assert actual.shape == exact.shape
    if actual.numel() == 0:
        return
    assert not torch.isnan(actual).any()
    error = (actual.double() - exact).abs()
    if actual.dtype in _MANTISSA:
        # rounded once, to the nearest: half a unit, and what rounding to float32 on the way adds
        unit = last_place(exact.to(actual.dtype), actual.dtype)
        assert bool((error <= 0.501 * unit).all()), f"{(error / unit).max():.3f} units off"
        return
    bound = FLOAT64 if actual.dtype == torch.float64 else FLOAT32_FORWARD
    scale = exact.abs().max().clamp(min=1.0)
    assert error.max() <= bound * scale, f"error {error.max():.2e} at a scale of {scale:.2e}"


def relative(actual: Tensor, exact: Tensor) -> float:
    """The error by norm, relative to the exact result's."""
    exact = exact.double()
    size = exact.norm().item()
    return (actual.double() - exact).norm().item() / (size or 1.0)


def assert_gradient(actual: Tensor, exact: Tensor) -> None:
    """`actual` is the float64 gradient up to the promised error, by norm."""
    assert actual.shape == exact.shape
    bound = {
        torch.float64: FLOAT64,
        torch.float32: FLOAT32_GRADIENT,
    }.get(actual.dtype)
    if bound is None:
        # rounded to half precision once: half a unit in the last place of each value
        bound = torch.finfo(actual.dtype).eps / 2 * 1.05
    error = relative(actual, exact)
    assert error <= bound, f"gradient off by {error:.2e}, allowed {bound:.2e}"
