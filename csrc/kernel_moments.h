// Moments of runs and of columns.
#pragma once

#include "kernel_blocks.h"

namespace truenorm {
namespace {

template <class T>
Moments moments(const T* x, int64_t runs, int64_t len, int64_t stride, bool centred) {
  // About the first value, in float64: even an outlier there is at most sqrt(n) standard
  // deviations from the mean, which costs a relative error of some n · 1e-16.
  const T origin = centred ? x[0] : T{};
  const double shift = centred ? to_double(origin) : 0.0;
  const vd shifts = splat<vd>(shift);
  Sum sum, square;
  const auto add = [&](const T* from, int keep) TN_FLAT {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      vd d = Lane<T>::load_double(from + r * D) - shifts;
      if (keep) d = unread(d, r, keep);
      sum.r[r] += d;
      square.r[r] += d * d;
    }
  };
  Padded<T> padded;
  for (int64_t run = 0; run < runs; ++run) {
    const T* p = x + run * stride;
    if (len < kLanes)
      add(Padded<T>::fill(padded, p, len, origin), 0);
    else
      blocks(len, [&](int64_t i, int keep) TN_FLAT { add(p + i, keep); });
  }
  const double n = double(runs * len);
  const double s = Sum::total(sum), q = Sum::total(square);
  if (!centred) return {n, 0.0, q};
  const double m2 = q - s * s / n;
  return {n, shift + s / n, m2 < 0.0 ? 0.0 : m2};
}

template <class T, int B>
TN_INLINE void column_block(const T* x, int64_t rows, int64_t ld, double* mean, double* m2) {
  constexpr int V = B * R;
  vd shift[V], sum[V] = {}, square[V] = {};
#pragma GCC unroll 64
  for (int v = 0; v < V; ++v) shift[v] = Lane<T>::load_double(x + v * D);
  for (int64_t row = 1; row < rows; ++row) {
#pragma GCC unroll 64
    for (int v = 0; v < V; ++v) {
      const vd d = Lane<T>::load_double(x + row * ld + v * D) - shift[v];
      sum[v] += d;
      square[v] += d * d;
    }
  }
  const double n = double(rows);
  for (int v = 0; v < V; ++v) {
    const vd centre = sum[v] / n;
    const vd spread = square[v] - sum[v] * centre;
    store_raw(mean + v * D, shift[v] + centre);
    store_raw(m2 + v * D, spread < 0.0 ? vd{} : spread);
  }
}

template <class T>
void column_moments(const T* x, int64_t rows, int64_t cols, int64_t ld, double* mean, double* m2) {
  if (cols < kLanes) {
    // too few for a vector: one row at a time through a padded copy of the whole matrix's width
    for (int64_t c = 0; c < cols; ++c) {
      const Moments m = moments(x + c, rows, 1, ld, true);
      mean[c] = m.mean;
      m2[c] = m.m2;
    }
    return;
  }
  column_blocks(
      cols, [&](int64_t c) { column_block<T, kWide>(x + c, rows, ld, mean + c, m2 + c); },
      [&](int64_t c) { column_block<T, 1>(x + c, rows, ld, mean + c, m2 + c); });
}

}  // namespace
}  // namespace truenorm
