// Sums of gradients along runs, down columns, and for element-wise parameters.
#pragma once

#include "kernel_blocks.h"

namespace truenorm {
namespace {

constexpr int kSteps = 8;  // steps after which the sums go on in float64

// x̂ is taken as (x − hi) · rstd; what the rest of the mean, lo = mean − hi, takes from Σ g · x̂ is
// lo · rstd · Σ g, subtracted once at the end.
template <class A>
TN_INLINE double without_rest(double sum_gx, double sum_g, double mean, double rstd) {
  return sum_gx - (mean - double(A(mean))) * rstd * sum_g;
}

// Sums of g and of g · x̂ along runs, g being the gradient times `weight` where there is one.
template <class T, class P, bool Weight>
TN_INLINE GradSums sum_gradients(const T* grad, const T* x, int64_t runs, int64_t len,
                                 int64_t stride, double mean, double rstd,
                                 const compute_t<T>* weight) {
  using A = compute_t<T>;
  using V = typename P::V;
  constexpr int N = kStep / P::size;
  const V hi = splat<V>(A(mean)), scale = splat<V>(A(rstd));
  Totals sum_g, sum_gx;
  V part_g[N][2] = {}, part_gx[N][2] = {};
  int steps = 0;
  const auto flush = [&]() TN_FLAT {
    for (int n = 0; n < N; ++n)
      for (int k = 0; k < 2; ++k) {
        add_doubles(sum_g.values + n * P::size + k * P::lanes, part_g[n][k]);
        add_doubles(sum_gx.values + n * P::size + k * P::lanes, part_gx[n][k]);
        part_g[n][k] = part_gx[n][k] = V{};
      }
    steps = 0;
  };
  const auto add = [&](const T* g_from, const T* x_from, const A* w_from, int keep) TN_FLAT {
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      const P g_pair = P::load(g_from + n * P::size), x_pair = P::load(x_from + n * P::size);
      for (int k = 0; k < 2; ++k) {
        V g = g_pair.v[k];
        if constexpr (Weight) g *= load_raw<V>(w_from + n * P::size + k * P::lanes);
        V gx = g * ((x_pair.v[k] - hi) * scale);
        if (keep) {
          g = unread<P>(g, n * P::size, k, keep);
          gx = unread<P>(gx, n * P::size, k, keep);
        }
        part_g[n][k] += g;
        part_gx[n][k] += gx;
      }
    }
    if (++steps == kSteps) flush();
  };
  Padded<T, kStep> grad_copy, x_copy;
  Padded<A, kStep> weight_copy;
  for (int64_t run = 0; run < runs; ++run) {
    const T *g = grad + run * stride, *v = x + run * stride;
    if (run + kRunsAhead < runs) {
      foresee(g + kRunsAhead * stride, len);
      foresee(v + kRunsAhead * stride, len);
    }
    if (len < kStep)
      add(Padded<T, kStep>::fill(grad_copy, g, len, T{}),
          Padded<T, kStep>::fill(x_copy, v, len, v[0]),
          Weight ? Padded<A, kStep>::fill(weight_copy, weight, len, A{}) : nullptr, 0);
    else
      blocks<kStep>(len, [&](int64_t i, int keep)
                             TN_FLAT { add(g + i, v + i, Weight ? weight + i : nullptr, keep); });
  }
  flush();
  const double total = Totals::sum<P>(sum_g);
  return {total, without_rest<A>(Totals::sum<P>(sum_gx), total, mean, rstd)};
}

template <class T>
GradSums grad_sums(const T* grad, const T* x, int64_t runs, int64_t len, int64_t stride,
                   double mean, double rstd) {
  return sum_gradients<T, AnyOrder<T>, false>(grad, x, runs, len, stride, mean, rstd, nullptr);
}

template <class T>
GradSums row_grad_sums(const T* grad, const T* x, int64_t len, double mean, double rstd,
                       const compute_t<T>* weight) {
  return weight ? sum_gradients<T, InOrder<T>, true>(grad, x, 1, len, 0, mean, rstd, weight)
                : sum_gradients<T, AnyOrder<T>, false>(grad, x, 1, len, 0, mean, rstd, nullptr);
}

// Sums down B · 16 neighbouring columns, added to what is there: of g, and of g · (x − hi) · rstd,
// at(row, n) being hi and rstd of vector n in that row.
template <class T, int B, class At>
TN_INLINE void sum_columns(const T* grad, const T* x, int64_t rows, int64_t ld, const At& at,
                           double* sum_grad, double* sum_grad_x_hat) {
  using V = typename Lane<T>::V;
  constexpr int L = Lane<T>::lanes, N = B * kLanes / L;
  for (int64_t first = 0; first < rows; first += kSteps) {
    const int64_t last = first + kSteps < rows ? first + kSteps : rows;
    V part_g[N] = {}, part_gx[N] = {};
    for (int64_t row = first; row < last; ++row) {
      const auto& by = at(row);
      if constexpr (is_half<T>) {  // of wider types two streams are enough to fill the bus
        foresee(grad + (row + kRowsAhead) * ld, B * kLanes);
        foresee(x + (row + kRowsAhead) * ld, B * kLanes);
      }
#pragma GCC unroll 64
      for (int n = 0; n < N; ++n) {
        const V g = Lane<T>::load(grad + row * ld + n * L);
        part_g[n] += g;
        part_gx[n] += g * by.x_hat(n, Lane<T>::load(x + row * ld + n * L));
      }
    }
    for (int n = 0; n < N; ++n) {
      add_doubles(sum_grad + n * L, part_g[n]);
      add_doubles(sum_grad_x_hat + n * L, part_gx[n]);
    }
  }
}

template <class T, int B>
TN_INLINE void column_grad_block(const T* grad, const T* x, int64_t rows, int64_t ld,
                                 const double* mean, const double* rstd, double* sum_grad,
                                 double* sum_grad_x_hat) {
  using A = compute_t<T>;
  using V = typename Lane<T>::V;
  constexpr int L = Lane<T>::lanes, N = B * kLanes / L;
  struct Columns {
    V hi[N], rstd[N];
    TN_FLAT V x_hat(int n, V v) const { return (v - hi[n]) * rstd[n]; }
  } columns;
  for (int n = 0; n < N; ++n) {
    A hi[L], r[L];
    for (int i = 0; i < L; ++i) {
      hi[i] = A(mean[n * L + i]);
      r[i] = A(rstd[n * L + i]);
    }
    columns.hi[n] = load_raw<V>(hi);
    columns.rstd[n] = load_raw<V>(r);
  }
  std::memset(sum_grad, 0, B * kLanes * sizeof(double));
  std::memset(sum_grad_x_hat, 0, B * kLanes * sizeof(double));
  sum_columns<T, B>(
      grad, x, rows, ld, [&](int64_t) TN_FLAT -> const Columns& { return columns; }, sum_grad,
      sum_grad_x_hat);
  for (int c = 0; c < B * kLanes; ++c)
    sum_grad_x_hat[c] = without_rest<A>(sum_grad_x_hat[c], sum_grad[c], mean[c], rstd[c]);
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

// Every row has a mean of its own, as two numbers.
template <class T>
struct RowXHat {
  using V = typename Lane<T>::V;
  V hi, lo, rstd;

  TN_INLINE RowXHat of(double mean, double rstd) {
    using A = compute_t<T>;
    const A hi = A(mean);
    return {splat<V>(hi), splat<V>(A(mean - double(hi))), splat<V>(A(rstd))};
  }
  TN_FLAT V x_hat(int, V x) const { return ((x - hi) - lo) * rstd; }
};

// As column_blocks, but no column twice: the last ones that fill no vector go to rest(column).
template <class T>
void row_param_sums(const T* grad, const T* x, int64_t rows, int64_t cols, int64_t ld,
                    const double* mean, const double* rstd, double* sum_grad,
                    double* sum_grad_x_hat) {
  const auto block = [&]<int B>(int64_t c, std::integral_constant<int, B>) TN_FLAT {
    sum_columns<T, B>(
        grad + c, x + c, rows, ld,
        [&](int64_t row) TN_FLAT { return RowXHat<T>::of(mean[row], rstd[row]); }, sum_grad + c,
        sum_grad_x_hat + c);
  };
  int64_t c = 0;
  for (; c + kWide * kLanes <= cols; c += kWide * kLanes)
    block(c, std::integral_constant<int, kWide>{});
  for (; c + kLanes <= cols; c += kLanes) block(c, std::integral_constant<int, 1>{});
  for (; c < cols; ++c)
    for (int64_t row = 0; row < rows; ++row) {
      const double g = to_double(grad[row * ld + c]);
      sum_grad[c] += g;
      sum_grad_x_hat[c] += g * ((to_double(x[row * ld + c]) - mean[row]) * rstd[row]);
    }
}

}  // namespace
}  // namespace truenorm
