// How the inner loops walk along a run and across columns.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace truenorm {
namespace {

constexpr int kWide = 4;  // blocks of 16 columns that are kept in registers together

// How a run of `len` values is read, N at a time: body(first, keep) for whole blocks with keep 0,
// then for the last few with the block that ends where the run does, whose first `keep` values have
// been read before. A run of fewer than N is the caller's to pad.
template <int N = kLanes, class Body>
TN_INLINE void blocks(int64_t len, const Body& body) {
  int64_t i = 0;
  for (; i + N <= len; i += N) body(i, 0);
  if (i < len) body(len - N, int(i + N - len));
}

// v, with the lanes that were read before as zero.
TN_INLINE vd unread(vd v, int r, int keep) {
  vl lane;
  for (int i = 0; i < D; ++i) lane[i] = r * D + i;
  return (vd)((vl)v & (lane >= keep));
}
TN_INLINE vf unread(vf v, int r, int keep) {
  vi lane;
  for (int i = 0; i < F; ++i) lane[i] = r * F + i;
  return (vf)((vi)v & (lane >= keep));
}

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
