// Powers of a denominator in float32: multiplications and additions alone.
#pragma once

#include "simd.h"

namespace truenorm {
namespace {

// d^(−quarters / 4), and what is needed for 1 / d. Square roots and divisions take longer (a tenth
// of the forward, a quarter of the backward), and the processor's own estimates differ from one
// instruction set to the next.
template <int quarters>
struct Power {
  vf fourth, error, value;

  TN_INLINE Power of(vf d) {
    // a straight line through the exponent, within 3 % of d^(−1/4), then one step of third order
    // whose coefficients are fitted to that interval: within 6e-5
    vf r = (vf)(0x4f5837d0 - ((vi)d >> 2));
    vf square = r * r;
    vf e = 1.0f - d * (square * square);
    r = r + r * (e * (0.25136056f + 0.15693287f * e));
    square = r * r;
    Power p;
    p.fourth = square * square;
    p.error = e = 1.0f - d * p.fourth;
    // the last step, of third order too, is taken on the power itself: one rounding more, not three
    constexpr float b = float(quarters) / 4.0f;
    const vf rough = quarters == 2 ? square : quarters == 3 ? square * r : p.fourth;
    p.value = rough + rough * (e * (b + b * (b + 1.0f) / 2.0f * e));
    return p;
  }
  TN_INLINE vf inverse(const Power& p) {
    return p.fourth + p.fourth * (p.error + p.error * p.error);
  }
};

}  // namespace
}  // namespace truenorm
