// How a value-by-value function walks along runs and rows, into the caches or past them.
#pragma once

#include "kernel_blocks.h"

namespace truenorm {
namespace {

// out = f(in[0], …) on kStep values at a time; f(values, i) takes and returns a pair of vectors, i
// being the place of the first in the run. The last step ends where the run does, and computes some
// values a second time, as the first may; a run shorter than a step goes through padded copies.
// `out` may be one of the inputs. What f is compiled to stands here three times: written once more
// for every case it takes minutes.
template <class P, int In, class T, class Fn>
TN_INLINE void map(const T* const (&in)[In], T* out, int64_t len, bool stream, const Fn& f) {
  const auto pair = [&](const T* const(&from)[In], int64_t i, int j) TN_FLAT {
    P values[In];
    for (int k = 0; k < In; ++k) values[k] = P::load(from[k] + j);
    return f(values, i + j);
  };
  const auto step = [&](int64_t i, auto past_caches) TN_FLAT {
    const T* from[In];
    for (int k = 0; k < In; ++k) from[k] = in[k] + i;
    TN_UNROLL for (int j = 0; j < kStep; j += P::size) {
      const P result = pair(from, i, j);
      if constexpr (past_caches)
        P::stream(out + i + j, result);
      else
        P::store(out + i + j, result);
    }
  };
  const bool few = len < kStep;
  bool in_place = false;
  for (int k = 0; k < In; ++k) in_place |= in[k] == out;
  // whole steps go from `begin`, where a cache line begins if that is worth a step of its own,
  // since a vector that lies in two lines costs two
  int64_t begin = few ? len : 0;
  if (!few && (stream || len >= 4 * kStep))
    begin = int64_t((-reinterpret_cast<uintptr_t>(out) & (kLine - 1)) / sizeof(T));
  const int64_t end = begin + (len - begin) / kStep * kStep;
  // the first and the last step, made before what they read may be overwritten
  const bool kept = few || in_place || stream;
  Padded<T, kStep> made[2];
#pragma GCC unroll 1
  for (int last = 0; last < 2; ++last) {
    if (last ? end == len : begin == 0) continue;
    const int64_t i = last ? len - kStep : 0;
    Padded<T, kStep> copies[In];
    const T* from[In];
    for (int k = 0; k < In; ++k)
      from[k] = few ? Padded<T, kStep>::fill(copies[k], in[k], len, T{}) : in[k] + i;
    T* const to = kept ? made[last].values : out + i;
#pragma GCC unroll 1
    for (int j = 0; j < kStep; j += P::size) P::store(to + j, pair(from, i, j));
  }
  if (stream)
    for (int64_t i = begin; i < end; i += kStep) step(i, std::true_type{});
  else
    for (int64_t i = begin; i < end; i += kStep) step(i, std::false_type{});
  if (!kept) return;
  std::memcpy(out, made[0].values, size_t(begin) * sizeof(T));
  std::memcpy(out + end, made[1].values + (kStep - (len - end)), size_t(len - end) * sizeof(T));
}

// The same for each of several rows that follow one another.
template <class P, int In, class T, class Fn>
TN_INLINE void map_rows(const T* const (&in)[In], T* out, int64_t rows, int64_t len, bool stream,
                        const Fn& f) {
  const T* from[In];
  for (int64_t row = 0; row < rows; ++row) {
    for (int k = 0; k < In; ++k) from[k] = in[k] + row * len;
    map<P, In>(from, out + row * len, len, stream, f);
  }
}

}  // namespace
}  // namespace truenorm
