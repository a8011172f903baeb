// Element types, and the coefficients that the inner loops apply to them.
#pragma once

#include <cstdint>
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

// y = (x − hi) · scale + shift, with the mean as two numbers: hi is subtracted first, exactly where
// it matters, and the rest, lo, goes into the shift. Half precision needs the same once more in
// double: where weight · x̂ and bias cancel, float32's error is more than the last place of the
// small number that is left.
template <class T>
struct Affine {
  using A = compute_t<T>;
  A hi, scale, shift;
  double mean, slope, bias;

  Affine() = default;
  Affine(double mean_, double rstd, const A* weight, const A* biases, int64_t channel)
      : hi(A(mean_)),
        mean(mean_),
        slope(weight ? rstd * double(weight[channel]) : rstd),
        bias(biases ? double(biases[channel]) : 0.0) {
    const double lo = mean - double(hi);
    scale = A(slope);
    shift = A(bias - lo * slope);
  }
};

// One Affine per element, array by array; the doubles are there for half precision alone. 32 values
// past the end are readable.
template <class T>
struct Affines {
  compute_t<T>*hi, *scale, *shift;
  double *mean, *slope, *bias;

  void set(int64_t i, const Affine<T>& a) const {
    hi[i] = a.hi;
    scale[i] = a.scale;
    shift[i] = a.shift;
    if constexpr (is_half<T>) {
      mean[i] = a.mean;
      slope[i] = a.slope;
      bias[i] = a.bias;
    }
  }
  Affines from(int64_t i) const {
    if constexpr (is_half<T>)
      return {hi + i, scale + i, shift + i, mean + i, slope + i, bias + i};
    else
      return {hi + i, scale + i, shift + i, nullptr, nullptr, nullptr};
  }
};

// y = ((x − hi) − lo) · rstd · weight + bias, weight and bias by element, null where there is none.
template <class T>
struct RowAffine {
  using A = compute_t<T>;
  A hi, lo, rstd;
  double mean, rstd_double;
  const A *weight, *bias;

  RowAffine(double mean_, double rstd_, const A* w, const A* b)
      : hi(A(mean_)),
        lo(A(mean_ - double(hi))),
        rstd(A(rstd_)),
        mean(mean_),
        rstd_double(rstd_),
        weight(w),
        bias(b) {}
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

  GradAffines from(int64_t i) const { return {scale + i, hi + i, rstd + i, slope + i, shift + i}; }
};

}  // namespace truenorm
