// Values of one channel that are summed together, as if they had no padding: where they lie if that
// is one run, else packed.
#pragma once

#include <array>

#include "masked.h"

namespace truenorm {

constexpr int64_t kShortRow = 256;  // of positions: it costs less to compute all of them
constexpr int64_t kLongRun = 64;    // of valid values: it costs less not to pack them

// The valid values of one channel of one sample, side by side.
template <class T>
void pack_row(const Kernels<T>& kernels, const Valid& valid, int64_t n, const T* row, T* to) {
  if (valid.scattered(n) || valid.positions() < kShortRow) {
    kernels.pack(row, valid.mask(n), valid.positions(), to);
    return;
  }
  for (const Valid::Run& run : valid.runs(n)) {
    std::memcpy(to, row + run.begin, size_t(run.count) * sizeof(T));
    to += run.count;
  }
}

// Some tensors' values of one channel, or of a group's, that are summed together.
template <class T, size_t In>
class Gathered {
 public:
  // of a Forward or a Backward
  template <class Of>
  Gathered(const Of& of, const std::array<const T*, In>& from, int64_t capacity)
      : g_(of.geometry),
        valid_(*of.valid),
        kernels_(of.kernels),
        from_(from),
        capacity_(capacity + kPastPacked),
        memory_(int64_t(In) * capacity_) {}

  // body(values of each tensor, count) for what neighbouring channels of a sample hold: one channel
  // as if it had no padding, several in as many parts as are read fast.
  template <class Body>
  void of_sample(int64_t n, int64_t first, int64_t channels, const Body& body) const {
    const Valid::Run* const run = valid_.only_run(n);
    if (run && (channels == 1 || run->count >= kLongRun)) {
      for (int64_t c = first; c < first + channels; ++c) {
        // the next channel's run: what lies apart is no stream that the processor foresees
        if (c + 1 < g_.c) foresee((n * g_.c + c + 1) * g_.s + run->begin, run->count);
        pieces(at((n * g_.c + c) * g_.s + run->begin), run->count, body);
      }
      return;
    }
    for (int64_t c = 0; c < channels; ++c) pack(n, first + c, c * valid_.count(n));
    pieces(packed(), channels * valid_.count(n), body);
  }

  // The same of a channel over some samples, in as many parts as are read fast. Samples in a row
  // without long runs go to masked(values of each tensor, mask, samples, count) first, and are
  // packed where that is false.
  template <class Body, class Masked>
  void of_batch(int64_t begin, int64_t end, int64_t channel, const Body& body,
                const Masked& masked) const {
    for (int64_t n = begin; n < end;) {
      if (has_long_runs(n)) {
        of_runs(n, channel, n + 1 < end, body);
        ++n;
        continue;
      }
      const int64_t first = n;
      int64_t count = 0;
      for (; n < end && !has_long_runs(n); ++n) count += valid_.count(n);
      const Values rows = at((first * g_.c + channel) * g_.s);
      if (masked(rows, valid_.mask(first), n - first, count)) continue;
      for (int64_t k = first, to = 0; k < n; to += valid_.count(k++)) pack(k, channel, to);
      pieces(packed(), count, body);
    }
  }

 private:
  using Values = std::array<const T*, In>;

  bool has_long_runs(int64_t n) const {
    return !valid_.scattered(n) && valid_.count(n) >= kLongRun * int64_t(valid_.runs(n).size());
  }
  template <class Body>
  void of_runs(int64_t n, int64_t channel, bool foreseeing, const Body& body) const {
    if (foreseeing && !valid_.runs(n + 1).empty()) {
      const Valid::Run& next = valid_.runs(n + 1)[0];
      foresee(((n + 1) * g_.c + channel) * g_.s + next.begin, next.count);
    }
    for (const Valid::Run& run : valid_.runs(n))
      pieces(at((n * g_.c + channel) * g_.s + run.begin), run.count, body);
  }
  Values at(int64_t offset) const {
    Values values = from_;
    for (auto& each : values) each += offset;
    return values;
  }
  Values packed() const {
    Values values;
    for (size_t k = 0; k < In; ++k) values[k] = memory_.get() + int64_t(k) * capacity_;
    return values;
  }
  void pack(int64_t n, int64_t channel, int64_t to) const {
    const Values rows = at((n * g_.c + channel) * g_.s);
    for (size_t k = 0; k < In; ++k)
      pack_row(kernels_, valid_, n, rows[k], memory_.get() + int64_t(k) * capacity_ + to);
  }
  void foresee(int64_t offset, int64_t count) const {
    constexpr int64_t kMost = 1024 / int64_t(sizeof(T)), kLine = 64 / int64_t(sizeof(T));
    for (const T* each : from_)
      for (int64_t i = 0; i < std::min(count, kMost); i += kLine)
        __builtin_prefetch(each + offset + i);
  }
  template <class Body>
  static void pieces(Values values, int64_t count, const Body& body) {
    for (int64_t left = count; left > 0; left -= kPiece) {
      body(values, std::min(kPiece, left));
      for (auto& each : values) each += kPiece;
    }
  }

  const Geometry& g_;
  const Valid& valid_;
  const Kernels<T>& kernels_;
  Values from_;
  int64_t capacity_;
  PackedMemory<T> memory_;
};

template <class T>
auto moments_into(const Kernels<T>& kernels, Moments& m, bool centred) {
  return [&, centred](const std::array<const T*, 1>& x, int64_t count) {
    m.merge(kernels.moments(x[0], 1, count, 0, centred));
  };
}

template <class T>
auto sums_into(const Kernels<T>& kernels, GradSums& sums, double mean, double rstd) {
  return [&, mean, rstd](const std::array<const T*, 2>& of, int64_t count) {
    sums.add(kernels.grad_sums(of[0], of[1], 1, count, 0, mean, rstd));
  };
}

}  // namespace truenorm
