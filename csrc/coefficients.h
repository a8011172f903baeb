// Element types, and the coefficients that the inner loops apply to them.
#pragma once

#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace truenorm {

// storage types; computed in float
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

template <class T>
using compute_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class T>
constexpr bool is_half = std::is_same_v<T, bf16> || std::is_same_v<T, f16>;

// `value` with its low bits cut off, so that the difference to a T of about its size is exact.
template <class T>
float coarse(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  bits &= std::is_same_v<T, bf16> ? 0xffff0000u : 0xffffe000u;
  std::memcpy(&value, &bits, 4);
  return value;
}

// What half precision subtracts from x, so that the difference is exact: nothing where the mean is
// small enough to go into a coefficient, and else the mean, so coarse that it loses no bit of an x
// of its size. A mean that is itself a T, as where all values are equal, is subtracted whole, so
// that exactly the bias is left.
template <class T>
float exact_base(double mean, double rstd) {
  const float base = coarse<T>(float(mean));
  return double(base) == mean || !(std::fabs(mean) * rstd <= 32.0) ? base : 0.0f;
}

// y = (x − hi) · scale + shift, with the mean as two numbers: hi is subtracted first, exactly where
// it matters, and the rest, lo, goes into the shift.
//
// Half precision takes scale and shift as two floats each, and an exact x − hi: where weight · x̂
// and bias cancel, float32's error is more than the last place of the small number that is left.
template <class T>
struct Affine {
  using A = compute_t<T>;
  A hi, scale, shift;
  A scale_rest = 0, shift_rest = 0;

  Affine() = default;
  Affine(double mean, double rstd, const A* weight, const A* biases, int64_t channel)
      : hi(A(mean)) {
    const double slope = weight ? rstd * double(weight[channel]) : rstd;
    const double bias = biases ? double(biases[channel]) : 0.0;
    if constexpr (is_half<T>) hi = exact_base<T>(mean, rstd);
    const double offset = bias - (mean - double(hi)) * slope;
    scale = A(slope);
    shift = A(offset);
    if constexpr (is_half<T>) {
      scale_rest = A(slope - double(scale));
      shift_rest = A(offset - double(shift));
    }
  }
};

// One Affine per element, array by array; the rests are there for half precision alone. 32 values
// past the end are readable.
template <class T>
struct Affines {
  static constexpr int64_t kArrays = is_half<T> ? 5 : 3;
  using Fields = std::array<compute_t<T>, size_t(kArrays)>;
  compute_t<T>* of[kArrays];

  static Fields fields(const Affine<T>& a) {
    if constexpr (is_half<T>)
      return {a.hi, a.scale, a.shift, a.scale_rest, a.shift_rest};
    else
      return {a.hi, a.scale, a.shift};
  }
  void set(int64_t i, const Affine<T>& a) const {
    const Fields each = fields(a);
    for (size_t j = 0; j < each.size(); ++j) of[j][i] = each[j];
  }
  Affines from(int64_t i) const {
    Affines moved = *this;
    for (auto& array : moved.of) array += i;
    return moved;
  }
};

// y = ((x − hi) − lo) · rstd · weight + bias, weight and bias by element, null where there is none.
//
// With a bias half precision needs more of x̂ than a float holds, see x_hat_twice(): there
// x̂ = (x − base) · (rstd + rstd_rest) + offset + offset_rest.
template <class T>
struct RowAffine {
  using A = compute_t<T>;
  static constexpr double kGrid = 0x1p-14;  // of offset
  A hi, lo, rstd;
  A base, rstd_rest, offset, offset_rest;
  const A *weight, *bias;
  bool rounds;  // each step to the dtype of x, as operators of that dtype one after the other

  RowAffine() = default;
  RowAffine(double mean, double rstd_, const A* w, const A* b, bool rounds_)
      : hi(A(mean)),
        lo(A(mean - double(hi))),
        rstd(A(rstd_)),
        weight(w),
        bias(b),
        rounds(is_half<T> && rounds_) {
    if constexpr (is_half<T>) {
      base = exact_base<T>(mean, rstd_);
      rstd_rest = A(rstd_ - double(rstd));
      const double shift = (double(base) - mean) * rstd_;
      offset = A(std::nearbyint(shift / kGrid) * kGrid);
      offset_rest = A(shift - double(offset));
    }
  }
};

// grad_x = grad · scale + (x − hi) · rstd · slope + shift. rstd is kept apart from slope: their
// product leaves float32's range at scales that each of them does not.
template <class A>
struct GradAffine {
  A scale, hi, rstd, slope, shift;

  GradAffine() = default;
  GradAffine(double mean, double rstd, double weight, double mean_grad, double mean_grad_x_hat)
      : scale(A(rstd * weight)), hi(A(mean)), rstd(A(rstd)), slope(A(-rstd * mean_grad_x_hat)) {
    const double lo = mean - double(hi);
    shift = A(-rstd * mean_grad - (lo * rstd) * (-rstd * mean_grad_x_hat));
  }
};

// One GradAffine per element, array by array. 32 values past the end are readable.
template <class A>
struct GradAffines {
  A *scale, *hi, *rstd, *slope, *shift;

  void set(int64_t i, const GradAffine<A>& a) const {
    scale[i] = a.scale;
    hi[i] = a.hi;
    rstd[i] = a.rstd;
    slope[i] = a.slope;
    shift[i] = a.shift;
  }
  GradAffines from(int64_t i) const { return {scale + i, hi + i, rstd + i, slope + i, shift + i}; }
};

}  // namespace truenorm
