// Runs so short that several of them are one, with coefficients laid out value by value.
#pragma once

#include <array>

#include "kernel_blocks.h"

namespace truenorm {
namespace {

constexpr int64_t kShortRun = 64;  // values from which a run's coefficients stay in registers
constexpr int64_t kSpread = 512;   // values that have coefficients at a time
// whole vectors are written, and a step past the end is read
constexpr int64_t kShortRoom = kSpread + kStep;

TN_INLINE bool are_short(int64_t runs, int64_t len) { return runs > 1 && len < kShortRun; }

// body(first value, values, arrays of coefficients) for some runs at a time; of(run) has a run's.
template <class A, int Count, class Of, class Body>
TN_INLINE void over_short_runs(int64_t runs, int64_t len, const Of& of, const Body& body) {
  using V = std::conditional_t<std::is_same_v<A, double>, vd, vf>;
  constexpr int64_t lanes = sizeof(V) / sizeof(A);
  A arrays[Count][kShortRoom];
  const int64_t most = kSpread / len;
  for (int64_t first = 0; first < runs; first += most) {
    const int64_t some = runs - first < most ? runs - first : most;
    for (int64_t r = 0; r < some; ++r) {
      const std::array<A, Count> by = of(first + r);
#pragma GCC unroll 5
      for (int j = 0; j < Count; ++j) {
        const V all = splat<V>(by[size_t(j)]);
        for (int64_t i = 0; i < len; i += lanes) store_raw(arrays[j] + r * len + i, all);
      }
    }
    body(first * len, some * len, arrays);
  }
}

template <class T, class Body>
TN_INLINE void over_short_runs(int64_t runs, int64_t len, const Affine<T>* by, const Body& body) {
  using A = compute_t<T>;
  constexpr int count = int(Affines<T>::kArrays);
  over_short_runs<A, count>(
      runs, len, [&](int64_t r) TN_FLAT { return Affines<T>::fields(by[r]); },
      [&](int64_t at, int64_t values, A(&arrays)[count][kShortRoom]) {
        Affines<T> each;
        for (int j = 0; j < count; ++j) each.of[j] = arrays[j];
        body(at, values, each);
      });
}

// out = of(in[0], …, run) vector by vector, run by run: what is written past a run's end the next
// one writes again, so it must not be read before. Returns how many of the runs that served.
template <int In, class T, class Of>
TN_INLINE int64_t over_ends(const T* const (&in)[In], T* out, int64_t runs, int64_t len,
                            const Of& of) {
  using V = typename Lane<T>::V;
  constexpr int64_t L = Lane<T>::lanes;
  for (int k = 0; k < In; ++k)
    if (in[k] == out) return 0;
  const int64_t past = (len + L - 1) / L * L - len;
  const int64_t served = runs - (past + len - 1) / len;
  const T* from[In];
  for (int k = 0; k < In; ++k) from[k] = in[k];
  for (int64_t r = 0; r < served; ++r) {
    const auto of_run = of(r);
    for (int64_t i = 0; i < len; i += L) {
      V values[In];
      for (int k = 0; k < In; ++k) values[k] = Lane<T>::load(from[k] + i);
      Lane<T>::store(out + i, of_run(values));
    }
    for (int k = 0; k < In; ++k) from[k] += len;
    out += len;
  }
  return served > 0 ? served : 0;
}

}  // namespace
}  // namespace truenorm
