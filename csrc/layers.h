// What rows.cpp and channels.cpp offer to library.cpp: forward and backward of a whole tensor.
#pragma once

#include <cmath>
#include <cstdint>

#include "geometry.h"
#include "kernels.h"

namespace truenorm {

// Reductions are cut into pieces of about this many values, by shape alone and never by thread, so
// that the bits do not depend on the number of threads. A piece and its result fit in L2.
constexpr int64_t kPiece = int64_t{1} << 15;

inline double inverse_std(double var, double eps) { return 1.0 / std::sqrt(var + eps); }

template <class T>
struct Forward {
  const Geometry& geometry;
  const Kernels<T>& kernels;
  double eps;
  const T* x;
  T* y;
  const output_t<T>* weight;  // per channel, or null
  const output_t<T>* bias;
  double* mean;  // per statistic; written, or read where `fixed`
  double* var;
  bool fixed;
};

template <class T>
struct Backward {
  const Geometry& geometry;
  const Kernels<T>& kernels;
  double eps;
  const T* grad;
  const T* x;
  T* grad_x;  // or null
  const compute_t<T>* weight;
  const double* mean;
  const double* var;
  double* grad_weight;  // per channel, or null
  double* grad_bias;
  bool fixed;
};

template <class T>
void forward_rows(const Forward<T>& f);
template <class T>
void backward_rows(const Backward<T>& b);
template <class T>
void forward_channels(const Forward<T>& f);
template <class T>
void backward_channels(const Backward<T>& b);

// `alpha` is the layer's own: the sum over a window is weighted by alpha / size.
template <class T>
void local_response_norm(const Geometry& g, const Kernels<T>& kernels, const T* x, T* y,
                         int64_t size, double alpha, double beta, double k);
template <class T>
void local_response_norm_backward(const Geometry& g, const Kernels<T>& kernels, const T* grad,
                                  const T* x, T* grad_x, int64_t size, double alpha, double beta,
                                  double k);

// y = (x − hi) · scale + shift, with the mean as two numbers: hi is subtracted first, exactly where
// it matters, and the rest, lo, goes into the shift.
template <class A>
struct Affine {
  A hi, scale, shift;

  Affine() = default;
  Affine(double mean, double rstd, const A* weight, const A* bias, int64_t channel) : hi(A(mean)) {
    const double slope = weight ? rstd * double(weight[channel]) : rstd;
    const double lo = mean - double(hi);
    scale = A(slope);
    shift = A((bias ? double(bias[channel]) : 0.0) - lo * slope);
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

}  // namespace truenorm
