// How the inner loops walk along a run and across columns.
#pragma once

#include "kernels.h"
#include "simd_pairs.h"

namespace truenorm {
namespace {

// Values of a row that are summed side by side: a cache line of what they are computed in.
template <class T>
constexpr int kRowStep = 64 / int(sizeof(compute_t<T>));

constexpr int kWide = 4;  // blocks of 16 columns that are kept in registers together

// How a run of `len` values is read, N at a time: body(first, keep) for whole blocks with keep 0,
// then for the last few with the block that ends where the run does, whose first `keep` values have
// been read before. A run of fewer than N is the caller's to pad.
template <int N, class Body>
TN_INLINE void blocks(int64_t len, const Body& body) {
  int64_t i = 0;
  for (; i + N <= len; i += N) body(i, 0);
  if (i < len) body(len - N, int(i + N - len));
}

// The first values of a run, or of columns of a row, that is read a few later: what lies apart is
// no stream that the processor foresees.
template <class T>
TN_INLINE void foresee(const T* run, int64_t len) {
  constexpr int64_t kMost = 256 / int64_t(sizeof(T)), kNext = int64_t(kLine / sizeof(T));
  for (int64_t i = 0; i < (len < kMost ? len : kMost); i += kNext) __builtin_prefetch(run + i);
}
constexpr int64_t kRunsAhead = 4, kRowsAhead = 8;

// to[i] += from[i]
TN_INLINE void add_doubles(double* to, vd from) { store_raw(to, load_raw<vd>(to) + from); }
TN_INLINE void add_doubles(double* to, vf from) {
  vd half[2];
  doubles_of(from, half);
  add_doubles(to, half[0]);
  add_doubles(to + D, half[1]);
}

// Sums of kStep places in double, each pair of vectors in its own order of lanes.
struct Totals {
  double values[kStep] = {};

  // In the order of the places, then place i + i + 16, + 8, + 4, + 2, + 1: the same for every width
  // of a vector.
  template <class P>
  static double sum(const Totals& t) {
    double places[kStep];
    for (int start = 0; start < kStep; start += P::size)
      for (int k = 0; k < 2; ++k)
        for (int i = 0; i < P::lanes; ++i)
          places[start + P::place(k, i)] = t.values[start + k * P::lanes + i];
    for (int width = kStep / 2; width > 0; width /= 2)
      for (int i = 0; i < width; ++i) places[i] += places[i + width];
    return places[0];
  }
};

// Calls body<B>(column) for blocks of 64 and then of 16 columns; the last one ends with the
// columns.
template <class Wide4, class One>
TN_INLINE void column_blocks(int64_t cols, const Wide4& wide, const One& one) {
  int64_t c = 0;
  for (; c + kWide * kLanes <= cols; c += kWide * kLanes) wide(c);
  for (; c + kLanes <= cols; c += kLanes) one(c);
  if (c < cols) one(cols - kLanes);
}

}  // namespace
}  // namespace truenorm
