// How a tensor lies in memory, seen as (N, C, S): samples, channels, positions.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>

namespace truenorm {

// Sizes or strides. Up to eight stand in place: an allocation is noticed in a small input's call.
class Dims {
 public:
  Dims() = default;
  explicit Dims(int64_t count) : count_(count) {
    if (count > kInline) far_ = std::make_unique<int64_t[]>(size_t(count));
  }
  Dims(const int64_t* first, const int64_t* last) : Dims(last - first) {
    std::copy(first, last, begin());
  }

  int64_t* begin() { return far_ ? far_.get() : near_; }
  int64_t* end() { return begin() + count_; }
  const int64_t* begin() const { return far_ ? far_.get() : near_; }
  const int64_t* end() const { return begin() + count_; }
  int64_t size() const { return count_; }
  int64_t& operator[](int64_t i) { return begin()[i]; }
  int64_t operator[](int64_t i) const { return begin()[i]; }

 private:
  static constexpr int64_t kInline = 8;

  int64_t count_ = 0;
  int64_t near_[kInline];
  std::unique_ptr<int64_t[]> far_;
};

Dims contiguous_strides(const Dims& sizes);
Dims channels_last_strides(const Dims& sizes);  // (N, C, positions…) stored as [N, positions…, C]

// Which values share one statistic; src/truenorm/_core/geometry.py says what the fields mean.
struct Axes {
  int64_t num_groups;
  int64_t feature_dims;
  bool centred;
  bool as_given = false;
};

enum class Memory {
  rows,      // [N, C, S]: each channel of a sample is one run
  channels,  // [N, S, C]: neighbours in memory are neighbouring channels
};

struct Geometry {
  int64_t n, c, s;
  Memory memory;
  Dims sizes, strides;  // of the result
  bool dense;           // whether the input has these strides already
  int64_t num_groups;   // per sample; 0: one statistic per channel over the batch
  bool centred;

  int64_t numel() const { return n * c * s; }
  bool over_batch() const { return num_groups == 0; }
  int64_t groups() const { return over_batch() ? c : num_groups; }
  int64_t channels_per_group() const { return c / groups(); }
  int64_t num_statistics() const { return over_batch() ? c : n * num_groups; }
  int64_t values_per_statistic() const { return over_batch() ? n * s : channels_per_group() * s; }
};

// The same of some of the samples, which lie side by side.
inline Geometry samples_of(const Geometry& g, int64_t samples) {
  return {samples, g.c, g.s, g.memory, {}, {}, true, g.num_groups, g.centred};
}

// Where features lie outside the positions in memory, [N, C, P], how many positions a sample has;
// else 0.
int64_t turned_positions(const Dims& sizes, const int64_t* strides, int64_t feature_dims);

// Dense as it is, or the layout that one copy must bring it to; geometry.kept_strides states the
// rule.
Geometry geometry(const int64_t* sizes, const int64_t* strides, int64_t dim, const Axes& axes);

}  // namespace truenorm
