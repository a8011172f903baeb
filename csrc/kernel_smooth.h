// The activations with an exponential, in double whatever the type: to little more than the
// rounding of the result, with the same bits for every instruction set.
#pragma once

#include <initializer_list>

#include "activation.h"
#include "simd_pairs.h"

namespace truenorm {
namespace {

// e^v = scale · (1 + rest), v taken into the range of a double's exponent.
struct Exponential {
  vd scale, rest;

  TN_INLINE Exponential of(vd v) {
    v = v < -708.0 ? splat<vd>(-708.0) : v;
    v = v > 709.0 ? splat<vd>(709.0) : v;
    const vd magic = splat<vd>(0x1.8p52);  // its last bit is 1: a sum is rounded to an integer
    const vd shifted = v * 1.4426950408889634 + magic;
    const vd n = shifted - magic;
    // ln 2 in two parts, of which the first has so few bits that its product is exact
    const vd r = (v - n * 6.93147180369123816490e-01) - n * 1.90821492927058770002e-10;
    vd sum = splat<vd>(1.0 / 6227020800.0);
    for (double c : {479001600.0, 39916800.0, 3628800.0, 362880.0, 40320.0, 5040.0, 720.0, 120.0,
                     24.0, 6.0, 2.0})
      sum = sum * r + 1.0 / c;
    return {(vd)(((vl)shifted - (vl)magic + 1023) << 52), r + r * r * sum};
  }
  TN_FLAT vd value() const { return scale + scale * rest; }
  TN_FLAT vd minus_one() const { return scale * rest + (scale - 1.0); }
};

// Φ(z), the normal distribution's integral, by erfc(t) = e^(−t²) p(w) / (1 + 2 t),
// w = (t − 4) / (t + 4) (Shepherd and Laframboise 1981; p is our own expansion in Chebyshev
// polynomials, off by 3e-16), and `density` φ(z).
TN_INLINE vd normal_integral(vd z, vd& density) {
  const vd t = (vd)((vl)(z * 0.7071067811865476) & 0x7fffffffffffffff);
  const vd w = (t - 4.0) / (t + 4.0);
  vd sum = splat<vd>(-2.659599690242689e-10);
  for (double c : {9.311744978232572e-10,   3.1695881915648173e-09,  -1.234686604382353e-08,
                   -2.05606492756992e-08,   1.0633855618594884e-07,  7.746992727017941e-08,
                   -8.210939042560568e-07,  2.919733377963012e-07,   5.706604414895734e-06,
                   -1.1221287012353486e-05, -2.4397746422436416e-05, 0.0001506214900124047,
                   -0.00019925714661091188, -0.0007577732613730956,  0.005031970067657489,
                   -0.016197734059799265,   0.03716751552655567,     -0.06633036581218697,
                   0.0937328349990944,      -0.10103906603630056,    0.06809705425466908,
                   0.015379652102619604,    -0.1396211168405623,     1.2329951186255526})
    sum = sum * w + c;
  const vd bell = Exponential::of(z * z * -0.5).value();
  density = bell * 0.3989422804014327;
  const vd tail = 0.5 * bell * (sum / (1.0 + 2.0 * t));
  return z < 0.0 ? tail : 1.0 - tail;
}

// act(z), or act'(z).
template <bool Gradient>
__attribute__((noinline)) vd smooth(vd z, Activation act) {
  if (act.kind == Act::elu) {
    const Exponential e = Exponential::of(z);
    if constexpr (Gradient) return z <= 0.0 ? act.parameter * e.value() : splat<vd>(1.0);
    return z <= 0.0 ? act.parameter * e.minus_one() : z;
  }
  if (act.kind == Act::gelu) {
    vd density;
    const vd integral = normal_integral(z, density);
    if constexpr (Gradient) return integral + z * density;
    return z * integral;
  }
  // z · σ(u): u is z for silu; for gelu by tanh it is 2 √(2 / π) (z + 0.044715 z³)
  vd u = z, slope = splat<vd>(1.0);
  if (act.kind == Act::gelu_tanh) {
    constexpr double a = 1.5957691216057308, b = a * 0.044715;
    u = z * (a + b * z * z);
    slope = a + 3.0 * b * z * z;
  }
  const vd e = Exponential::of(-u).value(), sigma = 1.0 / (1.0 + e);
  if constexpr (Gradient) return sigma + z * sigma * (e * sigma) * slope;
  return z * sigma;
}

template <bool Gradient>
TN_INLINE vf smooth(vf z, Activation act) {
  vd wide[2];
  doubles_of(z, wide);
  return join(__builtin_convertvector(smooth<Gradient>(wide[0], act), vf_half),
              __builtin_convertvector(smooth<Gradient>(wide[1], act), vf_half));
}

}  // namespace
}  // namespace truenorm
