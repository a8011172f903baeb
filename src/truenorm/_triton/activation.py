"""The activations, and the gradients of what they take, by the numbers of csrc/activation.h.

Those with an exponential have it from a polynomial, as csrc/kernel_smooth.h does: tails keep their
relative precision, and Triton's interpreter and a GPU compute the same.
"""

# what Triton compiles has no Python types
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

RELU = tl.constexpr(1)
LEAKY_RELU = tl.constexpr(2)
HARDSWISH = tl.constexpr(3)
ELU = tl.constexpr(4)
SILU = tl.constexpr(5)
GELU = tl.constexpr(6)
GELU_TANH = tl.constexpr(7)
RELU6 = tl.constexpr(8)


@triton.jit
def _exponential(v):
    """(scale, rest) of e^v = scale · (1 + rest), v taken into the range of a normal number."""
    # ln 2 in two parts; the first has so few bits that its product with an integer is exact
    if v.dtype == tl.float64:
        v = tl.where(v < -708.0, -708.0, v)
        v = tl.where(v > 709.0, 709.0, v)
        n = tl.floor(v * 1.4426950408889634 + 0.5)
        r = (v - n * 6.93147180369123816490e-01) - n * 1.90821492927058770002e-10
        p = 1 / 6227020800.0 * r + 1 / 479001600.0
        p = p * r + 1 / 39916800.0
        p = p * r + 1 / 3628800.0
        p = p * r + 1 / 362880.0
        p = p * r + 1 / 40320.0
        p = p * r + 1 / 5040.0
        scale = ((n.to(tl.int64) + 1023) << 52).to(tl.float64, bitcast=True)
    else:
        v = tl.where(v < -87.0, -87.0, v)
        v = tl.where(v > 88.0, 88.0, v)
        n = tl.floor(v * 1.4426950408889634 + 0.5)
        r = (v - n * 0.693359375) + n * 2.12194440e-4
        p = tl.full(v.shape, 1 / 5040.0, tl.float32)
        scale = ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
    p = p * r + 1 / 720.0
    p = p * r + 1 / 120.0
    p = p * r + 1 / 24.0
    p = p * r + 1 / 6.0
    p = p * r + 0.5
    return scale, r + r * r * p


@triton.jit
def exp(v):
    """0 where it is no normal number."""
    scale, rest = _exponential(v)
    LEAST: tl.constexpr = -708.0 if v.dtype == tl.float64 else -87.0
    return tl.where(v < LEAST, 0.0, scale + scale * rest)


@triton.jit
def _expm1(v):
    scale, rest = _exponential(v)
    return scale * rest + (scale - 1.0)


@triton.jit
def reciprocal(v):
    """1 / v, of a v that is finite and not zero. Rounded once: in float32 a division is not."""
    r = 1.0 / v
    return tl.fma(r, tl.fma(-v, r, 1.0 + tl.zeros_like(v)), r)


@triton.jit
def _normal_integral(z):
    """(Φ(z), φ(z)) of the normal distribution, by erfc(t) = e^(−t²) p(w) / (1 + 2 t),
    w = (t − 4) / (t + 4) (Shepherd and Laframboise 1981).
    """
    t = tl.abs(z * 0.7071067811865476)
    w = 1.0 - 8.0 / (t + 4.0)
    if z.dtype == tl.float64:
        p = -2.659599690242689e-10 * w + 9.311744978232572e-10
        p = p * w + 3.1695881915648173e-09
        p = p * w - 1.234686604382353e-08
        p = p * w - 2.05606492756992e-08
        p = p * w + 1.0633855618594884e-07
        p = p * w + 7.746992727017941e-08
        p = p * w - 8.210939042560568e-07
        p = p * w + 2.919733377963012e-07
        p = p * w + 5.706604414895734e-06
        p = p * w - 1.1221287012353486e-05
        p = p * w - 2.4397746422436416e-05
        p = p * w + 0.0001506214900124047
        p = p * w - 0.00019925714661091188
        p = p * w - 0.0007577732613730956
        p = p * w + 0.005031970067657489
        p = p * w - 0.016197734059799265
        p = p * w + 0.03716751552655567
        p = p * w - 0.06633036581218697
        p = p * w + 0.0937328349990944
        p = p * w - 0.10103906603630056
        p = p * w + 0.06809705425466908
        p = p * w + 0.015379652102619604
        p = p * w - 0.1396211168405623
        p = p * w + 1.2329951186255526
    else:
        # the end of this expansion: beyond, e^(−t²) is no float
        w = tl.where(w > 0.4, 0.4, w)
        p = 0.0009693977772258222 * w + 0.00731700612232089
        p = p * w - 0.015539879910647869
        p = p * w + 0.036551132798194885
        p = p * w - 0.06669545918703079
        p = p * w + 0.0937696099281311
        p = p * w - 0.10099269449710846
        p = p * w + 0.06809767335653305
        p = p * w + 0.015377769246697426
        p = p * w - 0.13962115347385406
        p = p * w + 1.2329951524734497
    bell = exp(z * z * -0.5)
    tail = 0.5 * bell * (p / (1.0 + 2.0 * t))
    return tl.where(z < 0, tail, 1.0 - tail), bell * 0.3989422804014327


@triton.jit
def _sigmoid(z, ACT: tl.constexpr):
    """(σ(u), 1 − σ(u), u'): u is z for silu, 2 √(2 / π) (z + 0.044715 z³) for gelu by tanh."""
    if ACT == GELU_TANH:
        square = z * z
        u = z * (1.5957691216057308 + 0.07135481627260025 * square)
        slope = 1.5957691216057308 + 0.21406444881780076 * square
    else:
        u = z
        slope = tl.full(z.shape, 1.0, z.dtype)
    # of −|u|, where nothing overflows
    e = exp(tl.where(u < 0, u, -u))
    near = reciprocal(1.0 + e)
    far = e * near
    return tl.where(u < 0, far, near), tl.where(u < 0, near, far), slope


@triton.jit
def act(z, parameter, ACT: tl.constexpr):
    """The activation's value, in z's type, as `parameter` is."""
    if ACT == RELU:
        return tl.where(z <= 0, 0.0, z)
    if ACT == LEAKY_RELU:
        return tl.where(z <= 0, z * parameter, z)
    if ACT == HARDSWISH:
        gate = tl.where(z < -3, 0.0, z + 3.0)
        return z * tl.where(gate > 6, 6.0, gate) / 6.0
    if ACT == ELU:
        return tl.where(z <= 0, parameter * _expm1(z), z)
    if ACT == SILU or ACT == GELU_TANH:  # noqa: SIM109
        sigma, _, _ = _sigmoid(z, ACT)
        return z * sigma
    if ACT == GELU:
        integral, _ = _normal_integral(z)
        return z * integral
    if ACT == RELU6:
        return tl.where(z <= 0, 0.0, tl.where(z > 6, 6.0, z))
    return z


@triton.jit
def act_gradient(g, z, parameter, ACT: tl.constexpr):
    """g · act'(z); for a kink z may be y as well."""
    if ACT == RELU:
        return tl.where(z <= 0, 0.0, g)
    if ACT == LEAKY_RELU:
        return tl.where(z <= 0, g * parameter, g)
    if ACT == HARDSWISH:
        return tl.where(z <= -3, 0.0, tl.where(z < 3, g * (z / 3.0 + 0.5), g))
    if ACT == ELU:
        return tl.where(z <= 0, g * (parameter * exp(z)), g)
    if ACT == SILU or ACT == GELU_TANH:  # noqa: SIM109
        sigma, rest, slope = _sigmoid(z, ACT)
        # far out the second term is 0, whatever its factors are
        across = tl.where(rest * sigma > 0, z * sigma * (rest * slope), 0.0)
        return g * (sigma + across)
    if ACT == GELU:
        integral, density = _normal_integral(z)
        return g * (integral + z * density)
    if ACT == RELU6:
        return tl.where(z <= 0, 0.0, tl.where(z >= 6, 0.0, g))
    return g
