// How a tensor lies in memory, seen as (N, C, S): samples, channels, positions.
#pragma once

#include <cstdint>
#include <vector>

namespace truenorm {

// Which values share one statistic; src/truenorm/_axes.py says what the fields mean.
struct Axes {
  int64_t num_groups;
  int64_t feature_dims;
  bool centred;
};

enum class Memory {
  rows,      // [N, C, S]: each channel of a sample is one run
  channels,  // [N, S, C]: neighbours in memory are neighbouring channels
};

struct Geometry {
  int64_t n, c, s;
  Memory memory;
  std::vector<int64_t> sizes, strides;  // of the result
  bool dense;                           // whether the input has these strides already
  int64_t num_groups;                   // per sample; 0: one statistic per channel over the batch
  bool centred;

  int64_t numel() const { return n * c * s; }
  bool over_batch() const { return num_groups == 0; }
  int64_t groups() const { return over_batch() ? c : num_groups; }
  int64_t channels_per_group() const { return c / groups(); }
  int64_t num_statistics() const { return over_batch() ? c : n * num_groups; }
  int64_t values_per_statistic() const { return over_batch() ? n * s : channels_per_group() * s; }
};

// Dense as it is, or the layout that one copy must bring it to; _axes.kept_strides states the rule.
Geometry geometry(const int64_t* sizes, const int64_t* strides, int64_t dim, const Axes& axes);

}  // namespace truenorm
