// Sums of gradients along runs, down columns, and for element-wise parameters.
#pragma once

#include <algorithm>

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

// Sums of g and of g · x̂ along runs.
template <class T>
GradSums grad_sums(const T* grad, const T* x, int64_t runs, int64_t len, int64_t stride,
                   double mean, double rstd) {
  using A = compute_t<T>;
  using P = AnyOrder<T>;
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
  const auto add = [&](const T* g_from, const T* x_from, int keep) TN_FLAT {
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      const P g_pair = P::load(g_from + n * P::size), x_pair = P::load(x_from + n * P::size);
      for (int k = 0; k < 2; ++k) {
        V g = g_pair.v[k];
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
  for (int64_t run = 0; run < runs; ++run) {
    const T *g = grad + run * stride, *v = x + run * stride;
    if (run + kRunsAhead < runs) {
      foresee(g + kRunsAhead * stride, len);
      foresee(v + kRunsAhead * stride, len);
    }
    if (len < kStep)
      add(Padded<T, kStep>::fill(grad_copy, g, len, T{}),
          Padded<T, kStep>::fill(x_copy, v, len, v[0]), 0);
    else
      blocks<kStep>(len, [&](int64_t i, int keep) TN_FLAT { add(g + i, v + i, keep); });
  }
  flush();
  const double total = Totals::sum<P>(sum_g);
  return {total, without_rest<A>(Totals::sum<P>(sum_gx), total, mean, rstd)};
}

template <class T, int B>
TN_INLINE void column_grad_block(const T* grad, const T* x, int64_t rows, int64_t ld,
                                 const double* mean, const double* rstd, double* sum_grad,
                                 double* sum_grad_x_hat) {
  using A = compute_t<T>;
  using V = typename Lane<T>::V;
  constexpr int L = Lane<T>::lanes, N = B * kLanes / L;
  V his[N], rstds[N];
  for (int n = 0; n < N; ++n) {
    A hi[L], r[L];
    for (int i = 0; i < L; ++i) {
      hi[i] = A(mean[n * L + i]);
      r[i] = A(rstd[n * L + i]);
    }
    his[n] = load_raw<V>(hi);
    rstds[n] = load_raw<V>(r);
  }
  std::memset(sum_grad, 0, B * kLanes * sizeof(double));
  std::memset(sum_grad_x_hat, 0, B * kLanes * sizeof(double));
  for (int64_t first = 0; first < rows; first += kSteps) {
    const int64_t last = first + kSteps < rows ? first + kSteps : rows;
    V part_g[N] = {}, part_gx[N] = {};
    for (int64_t row = first; row < last; ++row) {
      if constexpr (is_half<T>) {  // of wider types two streams are enough to fill the bus
        foresee(grad + (row + kRowsAhead) * ld, B * kLanes);
        foresee(x + (row + kRowsAhead) * ld, B * kLanes);
      }
#pragma GCC unroll 64
      for (int n = 0; n < N; ++n) {
        const V g = Lane<T>::load(grad + row * ld + n * L);
        part_g[n] += g;
        part_gx[n] += g * ((Lane<T>::load(x + row * ld + n * L) - his[n]) * rstds[n]);
      }
    }
    for (int n = 0; n < N; ++n) {
      add_doubles(sum_grad + n * L, part_g[n]);
      add_doubles(sum_grad_x_hat + n * L, part_gx[n]);
    }
  }
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

constexpr int64_t kLeastAhead = 32, kMostAhead = 512;  // values of a row

// Sums of R rows and of their columns in one pass: see row_grad_sums in kernels.h.
template <class T, int R, bool Centred>
TN_INLINE void sum_rows(const T* grad, const T* x, int64_t len, int64_t ld, const double* mean,
                        const double* rstd, const compute_t<T>* weight, const RowSums& of_rows,
                        double* sum_grad, double* sum_grad_x_hat) {
  using A = compute_t<T>;
  using V = typename Lane<T>::V;
  constexpr int P = kRowStep<T>, L = Lane<T>::lanes, N = P / L;
  constexpr int room = std::max(R, L);
  A hi[R], lo[R], scale[R];
  for (int r = 0; r < R; ++r) {
    if constexpr (Centred) {
      hi[r] = A(mean[r]);
      lo[r] = A(mean[r] - double(hi[r]));
    }
    scale[r] = A(rstd[r]);
    of_rows.grad[r] = of_rows.grad_x_hat[r] = 0.0;
  }
  V part_g[R][N] = {}, part_gx[R][N] = {};
  int steps = 0;
  const auto flush = [&]() TN_FLAT {
    V g[R], gx[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      for (int width = N / 2; width > 0; width /= 2)
        for (int n = 0; n < width; ++n) {
          if constexpr (Centred) part_g[r][n] += part_g[r][n + width];
          part_gx[r][n] += part_gx[r][n + width];
        }
      g[r] = part_g[r][0];
      gx[r] = part_gx[r][0];
      for (int n = 0; n < N; ++n) part_g[r][n] = part_gx[r][n] = V{};
    }
    A sum_g[room], sum_gx[room];
    if constexpr (Centred) sum_lanes(g, sum_g);
    sum_lanes(gx, sum_gx);
    const auto add = [](double* to, const A* sums) TN_FLAT {
#pragma GCC unroll 8
      for (int r = 0; r < R; r += D)
        store_raw(to + r, load_raw<vd>(to + r) + Lane<A>::load_double(sums + r));
    };
    if constexpr (R == 1) {
      if constexpr (Centred) of_rows.grad[0] += double(sum_g[0]);
      of_rows.grad_x_hat[0] += double(sum_gx[0]);
    } else {
      if constexpr (Centred) add(of_rows.grad, sum_g);
      add(of_rows.grad_x_hat, sum_gx);
    }
    steps = 0;
  };
  // counts(v, place): v, with zero for what does not count; place is that of its first lane
  const auto step = [&](int64_t i, const auto& counts, auto ahead, bool few) TN_FLAT {
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      const int64_t at = i + n * L;
      const V w = weight ? load_raw<V>(weight + at) : splat<V>(A(1));
      V column_g = {}, column_gx = {};
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        if constexpr (ahead) {
          __builtin_prefetch(grad + R * len + at * R + r * L);
          __builtin_prefetch(x + R * len + at * R + r * L);
        }
        const V grads = Lane<T>::load(grad + r * ld + at);
        V x_hat = Lane<T>::load(x + r * ld + at);
        if constexpr (Centred) x_hat = (x_hat - hi[r]) - lo[r];
        x_hat *= scale[r];
        const V g = counts(grads, n * L), gx = counts(grads * x_hat, n * L);
        if (few && sum_grad) {
          // columns so few that their sums are float64 throughout
          if constexpr (Centred) add_doubles(sum_grad + at, g);
          add_doubles(sum_grad_x_hat + at, gx);
        } else {
          if constexpr (Centred) column_g += g;
          column_gx += gx;
        }
        if constexpr (Centred) part_g[r][n] += g * w;
        part_gx[r][n] += gx * w;
      }
      if (sum_grad && !few) {
        if constexpr (Centred) add_doubles(sum_grad + at, column_g);
        add_doubles(sum_grad_x_hat + at, column_gx);
      }
    }
    if (++steps == kSteps) flush();
  };
  int64_t i = 0;
  const auto all = [](V v, int) TN_FLAT { return v; };
  // the rows that come next, as they lie in memory: a few values of each of many are no stream
  if (R > 1 && ld == len && len >= kLeastAhead && len <= kMostAhead)
    for (; i + P <= len; i += P) step(i, all, std::true_type{}, false);
  for (; i + P <= len; i += P) step(i, all, std::false_type{}, false);
  const auto some = [&](V v, int place) TN_FLAT {
    return len < P ? first_of<InOrder<T>>(v, place, 0, int(len))
                   : unread<InOrder<T>>(v, place, 0, int(i + P - len));
  };
  if (i < len) step(std::max<int64_t>(len - P, 0), some, std::false_type{}, len < P);
  flush();
}

// A row shorter than kRowStep is read with what follows it; where nothing may be, rows are copied.
template <class T, bool Centred>
void row_grad_sums(const T* grad, const T* x, int64_t rows, int64_t len, int64_t ld,
                   int64_t readable, const double* mean, const double* rstd,
                   const compute_t<T>* weight, const RowSums& of_rows, double* sum_grad,
                   double* sum_grad_x_hat) {
  using A = compute_t<T>;
  constexpr int64_t P = kRowStep<T>;
  const bool few = len < P;
  Padded<A, P> weights;
  T grads[kRowsTogether * P], values[kRowsTogether * P];
  double sums[2][P];
  double *const to_grad = sum_grad, *const to_grad_x_hat = sum_grad_x_hat;
  if (few) {
    if (weight) weight = Padded<A, P>::fill(weights, weight, len, A{});
    if (sum_grad) {
      std::memset(sums, 0, sizeof(sums));
      sum_grad = sums[0], sum_grad_x_hat = sums[1];
    }
    if (readable < (rows - 1) * ld + P) {
      std::memset(grads, 0, sizeof(grads));
      std::memset(values, 0, sizeof(values));
      for (int64_t r = 0; r < rows; ++r) {
        std::memcpy(grads + r * P, grad + r * ld, size_t(len) * sizeof(T));
        std::memcpy(values + r * P, x + r * ld, size_t(len) * sizeof(T));
      }
      grad = grads, x = values, ld = P;
    }
  }
  if (rows == kRowsTogether)
    sum_rows<T, kRowsTogether, Centred>(grad, x, len, ld, mean, rstd, weight, of_rows, sum_grad,
                                        sum_grad_x_hat);
  else
    for (int64_t r = 0; r < rows; ++r)
      sum_rows<T, 1, Centred>(grad + r * ld, x + r * ld, len, ld, mean + r, rstd + r, weight,
                              of_rows.from(r), sum_grad, sum_grad_x_hat);
  if (!few || !to_grad) return;
  for (int64_t i = 0; i < len; ++i) {
    to_grad[i] += sum_grad[i];
    to_grad_x_hat[i] += sum_grad_x_hat[i];
  }
}

}  // namespace
}  // namespace truenorm
