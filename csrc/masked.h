// Which positions of a tensor count, and how their values are taken out and put back.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "parallel.h"

namespace truenorm {

// The valid positions of each sample, from a mask [N, S]: as runs where these are long (lengths),
// else one by one.
class Valid {
 public:
  struct Run {
    int64_t begin, count;
  };

  Valid(const bool* mask, int64_t samples, int64_t positions)
      : positions_(positions), samples_(size_t(samples)), before_(size_t(samples) + 1, 0) {
    parallel(samples, positions, [&](int64_t n) { read(mask + n * positions, samples_[n]); });
    for (int64_t n = 0; n < samples; ++n) {
      before_[n + 1] = before_[n] + samples_[n].count;
      most_ = std::max(most_, samples_[n].count);
    }
  }

  int64_t samples() const { return int64_t(samples_.size()); }
  int64_t count(int64_t n) const { return samples_[n].count; }
  // valid positions of the samples before this one
  int64_t before(int64_t n) const { return before_[n]; }
  int64_t most() const { return most_; }
  // all that is valid of a sample, if it lies side by side
  const Run* only_run(int64_t n) const {
    const Sample& s = samples_[n];
    return s.places.empty() && s.runs.size() == 1 ? s.runs.data() : nullptr;
  }

  // The valid positions' values side by side, `width` neighbouring values to a position.
  template <class T>
  void pack(int64_t n, const T* from, T* to, int64_t width) const {
    const Sample& s = samples_[n];
    if (width == 1) {
      for (size_t k = 0; k < s.places.size(); ++k) to[k] = from[s.places[k]];
    } else {
      for (const int32_t place : s.places) to = copy(from + place * width, width, to);
    }
    if (!s.places.empty()) return;
    for (const Run& run : s.runs) to = copy(from + run.begin * width, run.count * width, to);
  }

  // Their inverse; all other positions become `fill`.
  template <class T>
  void unpack(int64_t n, const T* from, T* to, int64_t width, T fill) const {
    const Sample& s = samples_[n];
    if (!s.places.empty()) {
      std::fill(to, to + positions_ * width, fill);
      if (width == 1)
        for (size_t k = 0; k < s.places.size(); ++k) to[s.places[k]] = from[k];
      else
        for (size_t k = 0; k < s.places.size(); ++k)
          copy(from + int64_t(k) * width, width, to + s.places[k] * width);
      return;
    }
    fill_gaps(n, to, width, fill);
    for (const Run& run : s.runs) {
      copy(from, run.count * width, to + run.begin * width);
      from += run.count * width;
    }
  }

  // `fill` for what is not valid of a sample that has runs.
  template <class T>
  void fill_gaps(int64_t n, T* to, int64_t width, T fill) const {
    int64_t at = 0;
    for (const Run& run : samples_[n].runs) {
      std::fill(to + at * width, to + run.begin * width, fill);
      at = run.begin + run.count;
    }
    std::fill(to + at * width, to + positions_ * width, fill);
  }

 private:
  static constexpr int64_t kShort = 16;  // a mean run below it is read place by place

  struct Sample {
    std::vector<Run> runs;
    std::vector<int32_t> places;
    int64_t count = 0;
  };

  void read(const bool* mask, Sample& s) const {
    const bool *at = mask, *const end = mask + positions_;
    while (at < end) {
      at = static_cast<const bool*>(std::memchr(at, 1, size_t(end - at)));
      if (at == nullptr) break;
      const void* stop = std::memchr(at, 0, size_t(end - at));
      const bool* const last = stop ? static_cast<const bool*>(stop) : end;
      s.runs.push_back({at - mask, last - at});
      s.count += last - at;
      at = last;
    }
    if (int64_t(s.runs.size()) * kShort <= s.count || positions_ > INT32_MAX) return;
    s.places.reserve(size_t(s.count));
    for (const Run& run : s.runs)
      for (int64_t i = 0; i < run.count; ++i) s.places.push_back(int32_t(run.begin + i));
    s.runs.clear();
  }

  template <class T>
  static T* copy(const T* from, int64_t count, T* to) {
    std::memcpy(to, from, size_t(count) * sizeof(T));
    return to + count;
  }

  int64_t positions_;
  std::vector<Sample> samples_;
  std::vector<int64_t> before_;
  int64_t most_ = 0;
};

}  // namespace truenorm
