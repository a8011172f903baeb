// How a value-by-value function walks along runs and rows, into the caches or past them.
#pragma once

#include "kernel_blocks.h"

namespace truenorm {
namespace {

// out = f(in[0], …) on kStep values at a time; f(values, i) takes and returns a pair of vectors, i
// being the place of the first in the run. The last step ends where the run does, and computes some
// values a second time; a run shorter than a step goes through padded copies. `out` may be one of
// the inputs.
template <class P, int In, class T, class Fn>
TN_INLINE void map(const T* const (&in)[In], T* out, int64_t len, bool stream, const Fn& f) {
  const auto step_from = [&](const T* const(&from)[In], int64_t at, int64_t i, T* to,
                             bool past_caches) TN_FLAT {
#pragma GCC unroll 8
    for (int j = 0; j < kStep; j += P::size) {
      P values[In];
      for (int k = 0; k < In; ++k) values[k] = P::load(from[k] + at + j);
      const P result = f(values, i + j);
      if (past_caches)
        P::stream(to + j, result);
      else
        P::store(to + j, result);
    }
  };
  const auto step = [&](const T* const(&from)[In], int64_t i, T* to, bool past_caches)
                        TN_FLAT { step_from(from, i, i, to, past_caches); };
  if (len < kStep) {
    Padded<T, kStep> in_copy[In], out_copy;
    const T* from[In];
    for (int k = 0; k < In; ++k) from[k] = Padded<T, kStep>::fill(in_copy[k], in[k], len, T{});
    step(from, 0, out_copy.values, false);
    std::memcpy(out, out_copy.values, size_t(len) * sizeof(T));
    return;
  }
  bool in_place = false;
  for (int k = 0; k < In; ++k) in_place |= in[k] == out;
  if (in_place) {
    // the last step reads what the one before it overwrites
    Padded<T, kStep> last[In];
    const T* from[In];
    for (int k = 0; k < In; ++k)
      from[k] = Padded<T, kStep>::fill(last[k], in[k] + len - kStep, kStep, T{});
    int64_t i = 0;
    for (; i + kStep <= len; i += kStep) step(in, i, out + i, false);
    if (i < len) step_from(from, 0, len - kStep, out + len - kStep, false);
    return;
  }
  if (!stream) {
    int64_t i = 0;
    if (len >= 4 * kStep) {
      // go on where a cache line begins: a vector that lies in two costs two
      step(in, 0, out, false);
      i = kStep - int64_t((reinterpret_cast<uintptr_t>(out) & (kLine - 1)) / sizeof(T));
    }
    for (; i + kStep <= len; i += kStep) step(in, i, out + i, false);
    if (i < len) step(in, len - kStep, out + len - kStep, false);
    return;
  }
  // whole cache lines past the caches, what is before and after them as usual
  T edge[kStep];
  int64_t i = int64_t((-reinterpret_cast<uintptr_t>(out) & (kLine - 1)) / sizeof(T));
  if (i > 0) {
    step(in, 0, edge, false);
    std::memcpy(out, edge, size_t(i) * sizeof(T));
  }
  for (; i + kStep <= len; i += kStep) step(in, i, out + i, true);
  if (i < len) {
    step(in, len - kStep, edge, false);
    std::memcpy(out + i, edge + (i + kStep - len), size_t(len - i) * sizeof(T));
  }
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
