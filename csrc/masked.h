// Which positions of a tensor count, where the statistics span valid values alone.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "layers.h"
#include "parallel.h"

namespace truenorm {

// The valid positions of each sample, from a mask [N, S].
class Valid {
 public:
  struct Run {
    int64_t begin, count;
  };

  // all_runs: also those of samples whose runs are short
  Valid(const bool* mask, int64_t samples, int64_t positions, bool all_runs)
      : mask_(mask), positions_(positions), samples_(size_t(samples)) {
    parallel(samples, positions,
             [&](int64_t n) { read(mask + n * positions, samples_[n], all_runs); });
  }

  int64_t samples() const { return int64_t(samples_.size()); }
  int64_t positions() const { return positions_; }
  int64_t count(int64_t n) const { return samples_[n].count; }
  const bool* mask(int64_t n) const { return mask_ + n * positions_; }
  // whether runs are so short that what goes by runs is better done place by place
  bool scattered(int64_t n) const { return samples_[n].scattered; }
  const std::vector<Run>& runs(int64_t n) const { return samples_[n].runs; }
  // all that is valid of a sample, if it lies side by side
  const Run* only_run(int64_t n) const {
    return samples_[n].runs.size() == 1 ? samples_[n].runs.data() : nullptr;
  }

 private:
  static constexpr int64_t kShort = 16;  // of a mean run

  struct Sample {
    std::vector<Run> runs;
    int64_t count = 0;
    bool scattered = false;
  };

  void read(const bool* mask, Sample& s, bool all_runs) const {
    // every run has two ends
    int64_t ends = int64_t(mask[0]) + mask[positions_ - 1];
    s.count = mask[positions_ - 1];
    for (int64_t i = 0; i + 1 < positions_; ++i) {
      s.count += mask[i];
      ends += mask[i] != mask[i + 1];
    }
    s.scattered = ends > 2 && ends / 2 * kShort > s.count;
    if (s.scattered && !all_runs) return;
    s.runs.resize(size_t(ends / 2));
    if (s.scattered) return read_short(mask, s.runs);
    const bool *at = mask, *const end = mask + positions_;
    for (Run& run : s.runs) {
      at = static_cast<const bool*>(std::memchr(at, 1, size_t(end - at)));
      const void* const stop = std::memchr(at, 0, size_t(end - at));
      const bool* const last = stop ? static_cast<const bool*>(stop) : end;
      run = {at - mask, last - at};
      at = last;
    }
  }

  // without a branch: where a run ends is not foreseen
  void read_short(const bool* mask, std::vector<Run>& runs) const {
    const size_t found = runs.size();
    runs.resize(found + 1);  // what is written past the last run
    size_t begun = 0, ended = 0;
    bool before = false;
    for (int64_t i = 0; i < positions_; ++i) {
      runs[begun].begin = runs[ended].count = i;
      begun += mask[i] && !before;
      ended += before && !mask[i];
      before = mask[i];
    }
    runs[ended].count = positions_;
    runs.resize(found);
    for (Run& run : runs) run.count -= run.begin;
  }

  const bool* mask_;
  int64_t positions_;
  std::vector<Sample> samples_;
};

// body(first, count) for the gaps between runs
template <class Body>
void over_gaps(const std::vector<Valid::Run>& runs, int64_t positions, const Body& body) {
  int64_t at = 0;
  for (const Valid::Run& run : runs) {
    if (run.begin > at) body(at, run.begin - at);
    at = run.begin + run.count;
  }
  if (positions > at) body(at, positions - at);
}

// A thread's memory for packed values, kept while it is small.
template <class T>
class PackedMemory {
 public:
  explicit PackedMemory(int64_t values) {
    const size_t bytes = size_t(values + kPastPacked) * sizeof(T);
    if (bytes <= kKept) {
      static thread_local std::unique_ptr<std::byte[]> kept(new std::byte[kKept]);
      data_ = kept.get();
    } else {
      own_.reset(new std::byte[bytes]);  // not made zero
      data_ = own_.get();
    }
  }
  T* get() const { return reinterpret_cast<T*>(data_); }

 private:
  static constexpr size_t kKept = size_t{1} << 20;

  std::unique_ptr<std::byte[]> own_;
  std::byte* data_;
};

}  // namespace truenorm
