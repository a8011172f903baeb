// Moments of runs and of columns.
#pragma once

#include "kernel_blocks.h"

namespace truenorm {
namespace {

// Of kStep places in double: place i plus i + 16, + 8, and so on, to one vector.
template <class P, int N, int H>
TN_INLINE vd fold(vd (&v)[N][2][H]) {
  if constexpr (P::place(1, 0) == 1) {
    // even and odd places: to one pair of vectors, in place order then
    for (int width = N * H / 2; width > 0; width /= 2)
      for (int i = 0; i < width; ++i)
        for (int k = 0; k < 2; ++k) v[i / H][k][i % H] += v[(i + width) / H][k][(i + width) % H];
    return add_pairs(v[0][0][0], v[0][1][0], std::make_integer_sequence<int, D>());
  } else {
    vd all[2 * N * H];
    std::memcpy(all, v, sizeof(all));
    for (int width = N * H; width > 0; width /= 2)
      for (int i = 0; i < width; ++i) all[i] += all[i + width];
    return all[0];
  }
}

// Σ(x − shift) and Σ(x − shift)² in float64, not yet over all lanes of a vector.
struct Folded {
  vd sum, square;
};

// The shift is the value of `origin`; without one the squares are exact, and may be fused. A run
// shorter than a step may be `readable` beyond its end, else it is copied. Without `summed` the sum
// is zero.
template <class T, bool shifted, bool summed = true>
TN_INLINE Folded sums_about(const T* x, int64_t runs, int64_t len, int64_t stride, T origin,
                            bool readable) {
  using P = AnyOrder<T>;
  using V = typename P::V;
  constexpr int N = kStep / P::size, H = P::lanes / D;
  const V unread_value = splat<V>(compute_t<T>(to_double(origin)));
  const vd shift = splat<vd>(to_double(origin));
  vd sums[N][2][H] = {}, squares[N][2][H] = {};
  // counts(v, start, k): v, with what changes nothing for what does not count, from place `end` on
  const auto add = [&](const T* from, int64_t end, const auto& counts) TN_FLAT {
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      const P pair = P::load(from + n * P::size);
      for (int k = 0; k < 2; ++k) {
        if (n * P::size + P::place(k, 0) >= end) continue;
        const V v = counts(pair.v[k], n * P::size, k);
        vd part[H];
        doubles_of(v, part);
        for (int h = 0; h < H; ++h) {
          if constexpr (shifted) {
            const vd d = part[h] - shift;
            sums[n][k][h] += d;
            squares[n][k][h] += d * d;
          } else {
            if constexpr (summed) sums[n][k][h] += part[h];
            squares[n][k][h] = add_square(squares[n][k][h], part[h]);
          }
        }
      }
    }
  };
  Padded<T, kStep> padded;
  for (int64_t run = 0; run < runs; ++run) {
    const T* p = x + run * stride;
    if (run + kRunsAhead < runs) foresee(p + kRunsAhead * stride, len);
    if (len < kStep) {
      add(readable ? p : Padded<T, kStep>::fill(padded, p, len, origin), len,
          [&](V v, int start, int k)
              TN_FLAT { return first_of<P>(v, start, k, int(len), unread_value); });
      continue;
    }
    int64_t i = 0;
    for (; i + kStep <= len; i += kStep) add(p + i, kStep, [](V v, int, int) TN_FLAT { return v; });
    if (i < len)
      add(p + len - kStep, kStep, [&](V v, int start, int k) TN_FLAT {
        return unread<P>(v, start, k, int(i + kStep - len), unread_value);
      });
  }
  return {fold<P>(sums), fold<P>(squares)};
}

template <class T, bool shifted, bool summed = true>
TN_INLINE Moments sums_about(const T* x, int64_t runs, int64_t len, int64_t stride, T origin) {
  const auto [sum, square] = sums_about<T, shifted, summed>(x, runs, len, stride, origin, false);
  double s[D], q[D];
  sum_lanes({sum}, s);
  sum_lanes({square}, q);
  return {double(runs * len), s[0], q[0]};
}

// The squares of float and narrower are exact in float64, so sums about zero lose nothing but what
// cancels in Σx² − (Σx)² / n. Up to this square of the mean in variances that is 10 of its 53 bits;
// beyond it the values are read again, about one of themselves.
constexpr double kFarOff = 0x1p10;

TN_INLINE bool near_zero(double s, double q, double n) {
  // false for a NaN and for equal values, too
  return s * s / n < kFarOff * (q - s * s / n);
}

template <class T>
__attribute__((noinline)) Moments moments_about_zero(const T* x, int64_t runs, int64_t len,
                                                     int64_t stride) {
  return sums_about<T, false, false>(x, runs, len, stride, T{});
}

template <class T>
Moments moments(const T* x, int64_t runs, int64_t len, int64_t stride, bool centred) {
  if constexpr (!std::is_same_v<T, double>) {
    if (!centred) return moments_about_zero(x, runs, len, stride);
    const auto [n, s, q] = sums_about<T, false>(x, runs, len, stride, T{});
    if (near_zero(s, q, n)) return {n, s / n, q - s * s / n};
  }
  // Even where the first value is an outlier it is at most sqrt(n) standard deviations from the
  // mean, which costs a relative error of some n · 1e-16.
  const T origin = centred ? x[0] : T{};
  const auto [n, s, q] = sums_about<T, true>(x, runs, len, stride, origin);
  if (!centred) return {n, 0.0, q};
  const double m2 = q - s * s / n;
  return {n, to_double(origin) + s / n, m2 < 0.0 ? 0.0 : m2};
}

template <class T, bool centred>
__attribute__((noinline)) void row_moments_of(const T* x, int64_t rows, int64_t len,
                                              int64_t readable, Moments* of_rows) {
  constexpr int R = kRowsTogether;
  const auto one = [&](int64_t r) { of_rows[r] = moments(x + r * len, 1, len, 0, centred); };
  if (std::is_same_v<T, double> || rows < R) {
    for (int64_t r = 0; r < rows; ++r) one(r);
    return;
  }
  vd sums[R], squares[R];
  for (int r = 0; r < R; ++r) {
    const bool read = r * len + kStep <= readable;
    const Folded of = sums_about<T, false, centred>(x + r * len, 1, len, 0, T{}, read);
    sums[r] = of.sum, squares[r] = of.square;
  }
  double s[R], q[R];
  sum_lanes(sums, s);
  sum_lanes(squares, q);
  const double n = double(len);
  for (int r = 0; r < R; ++r) {
    if (!centred)
      of_rows[r] = {n, 0.0, q[r]};
    else if (near_zero(s[r], q[r], n))
      of_rows[r] = {n, s[r] / n, q[r] - s[r] * s[r] / n};
    else
      one(r);
  }
}

// Of rows that follow one another: see kernels.h.
template <class T>
void row_moments(const T* x, int64_t rows, int64_t len, int64_t readable, bool centred,
                 Moments* of_rows) {
  centred ? row_moments_of<T, true>(x, rows, len, readable, of_rows)
          : row_moments_of<T, false>(x, rows, len, readable, of_rows);
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

// The same about zero, and the columns that this does not serve again.
template <class T, int B>
TN_INLINE void column_block_about_zero(const T* x, int64_t rows, int64_t ld, double* mean,
                                       double* m2) {
  constexpr int V = B * R;
  vd sum[V] = {}, square[V] = {};
  for (int64_t row = 0; row < rows; ++row) {
    foresee(x + (row + kRowsAhead) * ld, B * kLanes);
#pragma GCC unroll 64
    for (int v = 0; v < V; ++v) {
      const vd d = Lane<T>::load_double(x + row * ld + v * D);
      sum[v] += d;
      square[v] = add_square(square[v], d);
    }
  }
  const double n = double(rows);
  double s[B * kLanes], q[B * kLanes];
  std::memcpy(s, sum, sizeof(s));
  std::memcpy(q, square, sizeof(q));
  bool all = true;
  for (int c = 0; c < B * kLanes; ++c) {
    all = all && near_zero(s[c], q[c], n);
    mean[c] = s[c] / n;
    m2[c] = q[c] - s[c] * s[c] / n;
  }
  if (all) return;
  double again_mean[kLanes], again_m2[kLanes];
  for (int c = 0; c < B * kLanes; c += kLanes) {
    column_block<T, 1>(x + c, rows, ld, again_mean, again_m2);
    for (int i = c; i < c + kLanes; ++i)
      if (!near_zero(s[i], q[i], n)) mean[i] = again_mean[i - c], m2[i] = again_m2[i - c];
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
  const auto block = [&]<int B>(int64_t c, std::integral_constant<int, B>) TN_FLAT {
    if constexpr (std::is_same_v<T, double>)
      column_block<T, B>(x + c, rows, ld, mean + c, m2 + c);
    else
      column_block_about_zero<T, B>(x + c, rows, ld, mean + c, m2 + c);
  };
  column_blocks(
      cols, [&](int64_t c) { block(c, std::integral_constant<int, kWide>{}); },
      [&](int64_t c) { block(c, std::integral_constant<int, 1>{}); });
}

}  // namespace
}  // namespace truenorm
