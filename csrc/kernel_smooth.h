// The activations that are more than a few instructions. Those with an exponential have the same
// bits for every instruction set: for float and half precision in float, off by a few of its
// roundings; for double to little more than one.
#pragma once

#include <iterator>

#include "activation.h"
#include "simd_pairs.h"

namespace truenorm {
namespace {

template <class V>
struct Constants;

template <>
struct Constants<vf> {
  using Value = float;
  using Bits = vi;
  // a sum with `magic` is rounded to an integer; ln 2 in two parts, of which the first has so few
  // bits that its product with one is exact
  static constexpr float magic = 0x1.8p23f, ln2 = 0.693359375f, ln2_rest = -2.12194440e-4f;
  static constexpr float least = -87.0f, most = 88.0f;
  static constexpr int bias = 127, mantissa = 23, sign = 0x7fffffff;
  // (e^r − 1 − r) / r² for |r| <= ln 2 / 2, from the highest power down: our own least worst
  // error, 4e-9 of e^r
  static constexpr float series[] = {0.0013814540579915047f, 0.00836874544620514f,
                                     0.04166838899254799f, 0.1666652113199234f,
                                     0.4999999403953552f};
  static constexpr float erfc[] = {
      0.0009693977772258222f, 0.00731700612232089f,  -0.015539879910647869f, 0.036551132798194885f,
      -0.06669545918703079f,  0.0937696099281311f,   -0.10099269449710846f,  0.06809767335653305f,
      0.015377769246697426f,  -0.13962115347385406f, 1.2329951524734497f};
  static constexpr float erfc_end = 0.4f;  // of the expansion: beyond, e^(−t²) is no float
};

template <>
struct Constants<vd> {
  using Value = double;
  using Bits = vl;
  static constexpr double magic = 0x1.8p52, ln2 = 6.93147180369123816490e-01,
                          ln2_rest = 1.90821492927058770002e-10;
  static constexpr double least = -708.0, most = 709.0;
  static constexpr int64_t bias = 1023, mantissa = 52, sign = 0x7fffffffffffffff;
  // 1 / n!, from 13 down to 2
  static constexpr double series[] = {
      1 / 6227020800.0, 1 / 479001600.0, 1 / 39916800.0, 1 / 3628800.0, 1 / 362880.0, 1 / 40320.0,
      1 / 5040.0,       1 / 720.0,       1 / 120.0,      1 / 24.0,      1 / 6.0,      0.5};
  static constexpr double erfc[] = {
      -2.659599690242689e-10, 9.311744978232572e-10,   3.1695881915648173e-09,
      -1.234686604382353e-08, -2.05606492756992e-08,   1.0633855618594884e-07,
      7.746992727017941e-08,  -8.210939042560568e-07,  2.919733377963012e-07,
      5.706604414895734e-06,  -1.1221287012353486e-05, -2.4397746422436416e-05,
      0.0001506214900124047,  -0.00019925714661091188, -0.0007577732613730956,
      0.005031970067657489,   -0.016197734059799265,   0.03716751552655567,
      -0.06633036581218697,   0.0937328349990944,      -0.10103906603630056,
      0.06809705425466908,    0.015379652102619604,    -0.1396211168405623,
      1.2329951186255526};
  static constexpr double erfc_end = 1.0;
};

template <class V, class Coefficients>
TN_INLINE V polynomial(V at, const Coefficients& highest_first) {
  const auto* c = std::begin(highest_first);
  V sum = at * *c + c[1];
  for (c += 2; c != std::end(highest_first); ++c) sum = sum * at + *c;
  return sum;
}

// e^v = scale · (1 + rest), v taken into the range of a normal number.
template <class V>
struct Exponential {
  using K = Constants<V>;
  V scale, rest;

  TN_INLINE Exponential of(V v) {
    v = between(v, splat<V>(K::least), splat<V>(K::most));
    const V magic = splat<V>(K::magic);
    const V shifted = v * typename K::Value(1.4426950408889634) + magic;
    const V n = shifted - magic;
    const V r = (v - n * K::ln2) - n * K::ln2_rest;
    const auto power = (typename K::Bits)shifted - (typename K::Bits)magic + K::bias;
    return {(V)(power << K::mantissa), r + r * r * polynomial(r, K::series)};
  }
  TN_FLAT V value() const { return scale + scale * rest; }
  TN_FLAT V minus_one() const { return scale * rest + (scale - typename K::Value(1)); }
};

// Φ(z), the normal distribution's integral, by erfc(t) = e^(−t²) p(w) / (1 + 2 t),
// w = (t − 4) / (t + 4) (Shepherd and Laframboise 1981; p is our own expansion in Chebyshev
// polynomials, off by 3e-16, for float by 1e-8), and `density` φ(z).
template <class V>
TN_INLINE V normal_integral(V z, V& density) {
  using K = Constants<V>;
  using A = typename K::Value;
  const V t = (V)((typename K::Bits)(z * A(0.7071067811865476)) & K::sign);
  V w = (t - A(4)) / (t + A(4));
  w = w > K::erfc_end ? splat<V>(K::erfc_end) : w;
  const V bell = Exponential<V>::of(z * z * A(-0.5)).value();
  density = bell * A(0.3989422804014327);
  const V tail = A(0.5) * bell * (polynomial(w, K::erfc) / (A(1) + A(2) * t));
  return z < 0 ? tail : A(1) - tail;
}

// act'(z) or act(z) of the activations with an exponential.
template <bool Gradient, class V>
TN_INLINE V smooth(V z, Activation act) {
  using A = typename Constants<V>::Value;
  const V one = splat<V>(A(1));
  if (act.kind == Act::elu) {
    const auto e = Exponential<V>::of(z);
    if constexpr (Gradient) return z > 0 ? one : A(act.parameter) * e.value();
    return z <= 0 ? A(act.parameter) * e.minus_one() : z;
  }
  if (act.kind == Act::gelu) {
    V density;
    const V integral = normal_integral(z, density);
    if constexpr (Gradient) return integral + z * density;
    return z * integral;
  }
  // z · σ(u): u is z for silu; for gelu by tanh it is 2 √(2 / π) (z + 0.044715 z³)
  V u = z, slope = one;
  if (act.kind == Act::gelu_tanh) {
    constexpr A a = A(1.5957691216057308), b = A(1.5957691216057308 * 0.044715);
    u = z * (a + b * z * z);
    slope = a + A(3) * b * z * z;
  }
  const V e = Exponential<V>::of(-u).value(), sigma = one / (one + e);
  if constexpr (Gradient) return sigma + z * sigma * (e * sigma) * slope;
  return z * sigma;
}

// z · min(max(z + 3, 0), 6) / 6, or grad times its derivative.
template <bool Gradient, class V>
TN_INLINE V hardswish(V z, V grad) {
  if constexpr (Gradient) {
    const V slope = z / 3 + (V{} + 1) / 2;
    const V inside = z >= 3 ? grad : grad * slope;
    return z <= -3 ? V{} : inside;
  } else {
    V gate = z + 3;
    gate = gate < 0 ? V{} : gate;
    gate = gate > 6 ? V{} + 6 : gate;
    return z * gate / 6;
  }
}

// act(z), or grad · act'(z), out of line: there are many loops that call it.
template <bool Gradient, class V>
__attribute__((noinline)) V called(V z, V grad, Activation act) {
  if (act.kind == Act::hardswish) return hardswish<Gradient>(z, grad);
  const V value = smooth<Gradient>(z, act);
  if constexpr (Gradient) return grad * value;
  return value;
}

}  // namespace
}  // namespace truenorm
