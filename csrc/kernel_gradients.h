// Sums of gradients along runs, down columns, and for element-wise parameters.
#pragma once

#include "kernel_blocks.h"

namespace truenorm {
namespace {

// x̂ of a channel: the mean as two numbers, the larger subtracted first.
template <class T>
struct XHat {
  using V = typename Lane<T>::V;
  V hi, lo, rstd;

  TN_INLINE XHat of(double mean, double rstd) {
    using A = compute_t<T>;
    const A hi = A(mean);
    return {splat<V>(hi), splat<V>(A(mean - double(hi))), splat<V>(A(rstd))};
  }
  TN_INLINE V at(const XHat& s, V x) { return ((x - s.hi) - s.lo) * s.rstd; }
};

constexpr int kStep = 32;  // values that a step adds, side by side
constexpr int kSteps = 8;  // steps after which the sums go on in float64

// to[i] += from[i], vector by vector
TN_INLINE void add_doubles(double* to, vd from) { store_raw(to, load_raw<vd>(to) + from); }
TN_INLINE void flush(double* to, vd from) { add_doubles(to, from); }
TN_INLINE void flush(double* to, vf from) {
  vf_half half[2];
  std::memcpy(half, &from, sizeof(from));
  add_doubles(to, widen_half(half[0]));
  add_doubles(to + D, widen_half(half[1]));
}

// lane i + lane i + 16, then + 8, + 4, + 2, + 1: the same order for every width of a vector
TN_INLINE double total(double (&lanes)[kStep]) {
  for (int width = kStep / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}

// Sums of g and of g · x̂ along runs, g being the gradient times `weight` where there is one.
template <class T>
TN_INLINE GradSums sum_gradients(const T* grad, const T* x, int64_t runs, int64_t len,
                                 int64_t stride, double mean, double rstd,
                                 const compute_t<T>* weight) {
  using A = compute_t<T>;
  using V = typename Lane<T>::V;
  constexpr int L = Lane<T>::lanes, N = kStep / L;
  const XHat<T> x_hat = XHat<T>::of(mean, rstd);
  double sum_g[kStep] = {}, sum_gx[kStep] = {};
  V part_g[N] = {}, part_gx[N] = {};
  int steps = 0;
  const auto flush_all = [&]() TN_FLAT {
    for (int n = 0; n < N; ++n) {
      flush(sum_g + n * L, part_g[n]);
      flush(sum_gx + n * L, part_gx[n]);
      part_g[n] = part_gx[n] = V{};
    }
    steps = 0;
  };
  const auto add = [&](const T* g_from, const T* x_from, const A* w_from, int keep) TN_FLAT {
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) {
      V g = Lane<T>::load(g_from + n * L);
      if (weight) g *= load_raw<V>(w_from + n * L);
      V gx = g * XHat<T>::at(x_hat, Lane<T>::load(x_from + n * L));
      if (keep) g = unread(g, n, keep), gx = unread(gx, n, keep);
      part_g[n] += g;
      part_gx[n] += gx;
    }
    if (++steps == kSteps) flush_all();
  };
  Padded<T, kStep> grad_copy, x_copy;
  Padded<A, kStep> weight_copy;
  for (int64_t run = 0; run < runs; ++run) {
    const T *g = grad + run * stride, *v = x + run * stride;
    if (len < kStep)
      add(Padded<T, kStep>::fill(grad_copy, g, len, T{}),
          Padded<T, kStep>::fill(x_copy, v, len, v[0]),
          weight ? Padded<A, kStep>::fill(weight_copy, weight, len, A{}) : nullptr, 0);
    else
      blocks<kStep>(len, [&](int64_t i, int keep)
                             TN_FLAT { add(g + i, v + i, weight ? weight + i : nullptr, keep); });
  }
  flush_all();
  return {total(sum_g), total(sum_gx)};
}

template <class T>
GradSums grad_sums(const T* grad, const T* x, int64_t runs, int64_t len, int64_t stride,
                   double mean, double rstd) {
  return sum_gradients<T>(grad, x, runs, len, stride, mean, rstd, nullptr);
}

template <class T>
GradSums row_grad_sums(const T* grad, const T* x, int64_t len, double mean, double rstd,
                       const compute_t<T>* weight) {
  return weight ? sum_gradients<T>(grad, x, 1, len, 0, mean, rstd, weight)
                : sum_gradients<T>(grad, x, 1, len, 0, mean, rstd, nullptr);
}

// Sums down B · 16 neighbouring columns; at(row, n) is what makes x̂ of vector n in that row.
template <class T, int B, class At>
TN_INLINE void sum_columns(const T* grad, const T* x, int64_t rows, int64_t ld, const At& at,
                           double* sum_grad, double* sum_grad_x_hat) {
  using V = typename Lane<T>::V;
  constexpr int L = Lane<T>::lanes, N = B * kLanes / L;
  std::memset(sum_grad, 0, B * kLanes * sizeof(double));
  std::memset(sum_grad_x_hat, 0, B * kLanes * sizeof(double));
  for (int64_t first = 0; first < rows; first += kSteps) {
    const int64_t last = first + kSteps < rows ? first + kSteps : rows;
    V part_g[N] = {}, part_gx[N] = {};
    for (int64_t row = first; row < last; ++row) {
      const auto& x_hat = at(row);
#pragma GCC unroll 64
      for (int n = 0; n < N; ++n) {
        const V g = Lane<T>::load(grad + row * ld + n * L);
        part_g[n] += g;
        part_gx[n] += g * XHat<T>::at(x_hat[n], Lane<T>::load(x + row * ld + n * L));
      }
    }
    for (int n = 0; n < N; ++n) {
      flush(sum_grad + n * L, part_g[n]);
      flush(sum_grad_x_hat + n * L, part_gx[n]);
    }
  }
}

// One x̂ for every vector of a row.
template <class T>
struct SameXHat {
  XHat<T> x_hat;
  const XHat<T>& operator[](int) const { return x_hat; }
};

template <class T, int B>
TN_INLINE void column_grad_block(const T* grad, const T* x, int64_t rows, int64_t ld,
                                 const double* mean, const double* rstd, double* sum_grad,
                                 double* sum_grad_x_hat) {
  using A = compute_t<T>;
  using V = typename Lane<T>::V;
  constexpr int L = Lane<T>::lanes, N = B * kLanes / L;
  XHat<T> x_hat[N];
  for (int n = 0; n < N; ++n) {
    A hi[L], lo[L], r[L];
    for (int i = 0; i < L; ++i) {
      hi[i] = A(mean[n * L + i]);
      lo[i] = A(mean[n * L + i] - double(hi[i]));
      r[i] = A(rstd[n * L + i]);
    }
    x_hat[n] = {load_raw<V>(hi), load_raw<V>(lo), load_raw<V>(r)};
  }
  sum_columns<T, B>(
      grad, x, rows, ld, [&](int64_t) TN_FLAT -> const XHat<T>(&)[N] { return x_hat; }, sum_grad,
      sum_grad_x_hat);
}

template <class T>
void column_grad_sums(const T* grad, const T* x, int64_t rows, int64_t cols, int64_t ld,
                      const double* mean, const double* rstd, double* sum_grad,
                      double* sum_grad_x_hat) {
  if (cols < kLanes) {
    for (int64_t c = 0; c < cols; ++c) {
      const GradSums s = grad_sums(grad + c, x + c, rows, 1, ld, mean[c], rstd[c]);
      sum_grad[c] = s.grad;
      sum_grad_x_hat[c] = s.grad_x_hat;
    }
    return;
  }
  const auto block = [&]<int B>(int64_t c, std::integral_constant<int, B>) TN_FLAT {
    column_grad_block<T, B>(grad + c, x + c, rows, ld, mean + c, rstd + c, sum_grad + c,
                            sum_grad_x_hat + c);
  };
  column_blocks(
      cols, [&](int64_t c) { block(c, std::integral_constant<int, kWide>{}); },
      [&](int64_t c) { block(c, std::integral_constant<int, 1>{}); });
}

template <class T>
void row_param_sums(const T* grad, const T* x, int64_t rows, int64_t cols, int64_t ld,
                    const double* mean, const double* rstd, double* sum_grad,
                    double* sum_grad_x_hat) {
  if (cols < kLanes) {
    for (int64_t c = 0; c < cols; ++c) {
      double g_sum = 0.0, gx_sum = 0.0;
      for (int64_t row = 0; row < rows; ++row) {
        const double g = to_double(grad[row * ld + c]);
        g_sum += g;
        gx_sum += g * ((to_double(x[row * ld + c]) - mean[row]) * rstd[row]);
      }
      sum_grad[c] = g_sum;
      sum_grad_x_hat[c] = gx_sum;
    }
    return;
  }
  const auto block = [&]<int B>(int64_t c, std::integral_constant<int, B>) TN_FLAT {
    sum_columns<T, B>(
        grad + c, x + c, rows, ld,
        [&](int64_t row) TN_FLAT { return SameXHat<T>{XHat<T>::of(mean[row], rstd[row])}; },
        sum_grad + c, sum_grad_x_hat + c);
  };
  column_blocks(
      cols, [&](int64_t c) { block(c, std::integral_constant<int, kWide>{}); },
      [&](int64_t c) { block(c, std::integral_constant<int, 1>{}); });
}

}  // namespace
}  // namespace truenorm
