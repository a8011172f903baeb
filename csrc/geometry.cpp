#include "geometry.h"

#include <algorithm>
#include <utility>
#include <vector>

namespace truenorm {
namespace {

int64_t product(const int64_t* begin, const int64_t* end) {
  int64_t result = 1;
  for (; begin != end; ++begin) result *= *begin;
  return result;
}

// Whether dimensions [from, to), in any order unless `ordered`, tile memory from stride `start`.
bool fills(const int64_t* sizes, const int64_t* strides, int64_t from, int64_t to, int64_t start,
           bool ordered) {
  int64_t next = start, d = to;
  while (d > from && (sizes[d - 1] == 1 || strides[d - 1] == next)) next *= sizes[--d];
  // from the last dimension to the first: nearly always so
  if (d == from) return true;
  if (ordered) return false;
  std::vector<std::pair<int64_t, int64_t>> dims;
  for (d = from; d < to; ++d)
    if (sizes[d] != 1) dims.emplace_back(strides[d], sizes[d]);
  std::sort(dims.begin(), dims.end());
  for (const auto& [stride, size] : dims) {
    if (stride != start) return false;
    start *= size;
  }
  return true;
}

}  // namespace

Dims contiguous_strides(const Dims& sizes) {
  Dims strides(sizes.size());
  int64_t step = 1;
  for (int64_t d = sizes.size(); d-- > 0;) {
    strides[d] = step;
    step *= std::max<int64_t>(sizes[d], 1);
  }
  return strides;
}

Dims channels_last_strides(const Dims& sizes) {
  Dims strides(sizes.size());
  strides[1] = 1;
  int64_t step = std::max<int64_t>(sizes[1], 1);
  for (int64_t d = sizes.size(); d-- > 0;) {
    if (d == 1) continue;
    strides[d] = step;
    step *= std::max<int64_t>(sizes[d], 1);
  }
  return strides;
}

int64_t turned_positions(const Dims& sizes, const int64_t* strides, int64_t feature_dims) {
  const int64_t split = sizes.size() - feature_dims;
  const int64_t channels = product(sizes.begin() + split, sizes.end());
  int64_t positions = 0;
  for (int64_t d = sizes.size(); d-- > split;)
    if (sizes[d] != 1) {
      positions = strides[d];
      break;
    }
  if (positions <= 1 || !fills(sizes.begin(), strides, split, sizes.size(), positions, true))
    return 0;
  int64_t next = 1;
  bool inside = true;  // a sample
  for (int64_t d = split; d-- > 0;) {
    if (sizes[d] == 1) continue;
    if (inside && next == positions) next *= channels, inside = false;
    if (sizes[d] == 0 || strides[d] != next) return 0;
    next *= sizes[d];
  }
  return !inside || next == positions ? positions : 0;
}

Geometry geometry(const int64_t* sizes, const int64_t* strides, int64_t dim, const Axes& axes) {
  Geometry g;
  g.sizes = Dims(sizes, sizes + dim);
  g.strides = Dims(strides, strides + dim);
  g.num_groups = axes.num_groups;
  g.centred = axes.centred;
  g.memory = Memory::rows;
  g.dense = true;
  if (axes.feature_dims > 0) {
    const int64_t split = dim - axes.feature_dims;
    g.n = product(sizes, sizes + split);
    g.c = product(sizes + split, sizes + dim);
    g.s = 1;
    g.dense =
        fills(sizes, strides, split, dim, 1, true) && fills(sizes, strides, 0, split, g.c, false);
    if (g.dense) return g;
    if (axes.as_given && turned_positions(g.sizes, strides, axes.feature_dims) > 0)
      g.dense = true;
    else
      g.strides = contiguous_strides(g.sizes);
    return g;
  }
  g.n = sizes[0];
  g.c = sizes[1];
  g.s = product(sizes + 2, sizes + dim);
  const bool samples_outside = g.n == 1 || strides[0] == g.c * g.s;
  const bool rows =
      samples_outside && fills(sizes, strides, 2, dim, 1, false) && (g.c == 1 || strides[1] == g.s);
  const bool channels =
      samples_outside && (g.c == 1 || strides[1] == 1) && fills(sizes, strides, 2, dim, g.c, false);
  if (!rows && !channels) {
    g.dense = false;
    const bool last = dim > 2 && g.c > 1 && strides[1] == 1;
    g.strides = last ? channels_last_strides(g.sizes) : contiguous_strides(g.sizes);
    g.memory = last ? Memory::channels : Memory::rows;
  } else {
    g.memory = rows ? Memory::rows : Memory::channels;
  }
  // (N, C) is both: statistics over the batch run down its columns, all others along its rows
  if (g.s == 1 && g.c > 1) g.memory = g.over_batch() ? Memory::channels : Memory::rows;
  return g;
}

}  // namespace truenorm
