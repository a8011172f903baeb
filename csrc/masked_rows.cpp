// Memory [N, C, S]: each channel of a sample is one run of S values, of which those count that lie
// at valid positions. Where these are one run its moments are taken where it lies, else from a
// packed copy; outputs go from the input to their place.
#include <array>

#include "masked.h"
#include "rows.h"
#include "tensors.h"

namespace truenorm {
namespace {

constexpr int64_t kShortRow = 256;  // of positions: it costs less to compute all of them
constexpr int64_t kLongRun = 64;    // of valid values: it costs less not to pack them
constexpr int64_t kInL1 = 4096;     // values
constexpr int64_t kTask = 1024;     // values: reading and writing take turns that often

// The valid values of one channel of one sample, side by side.
template <class T>
void pack_row(const MaskedKernels<T>& masked, const Valid& valid, int64_t n, const T* row, T* to) {
  if (valid.scattered(n) || valid.positions() < kShortRow) {
    masked.pack(row, valid.mask(n), valid.positions(), to);
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
  Gathered(const Geometry& g, const Valid& valid, const std::array<const T*, In>& from,
           int64_t capacity)
      : g_(g),
        valid_(valid),
        masked_(masked_table<T>()),
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
      pack_row(masked_, valid_, n, rows[k], memory_.get() + int64_t(k) * capacity_ + to);
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
  const MaskedKernels<T>& masked_;
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

// Writes neighbouring channels of a sample, each by coefficients of its own: run(channel, offset,
// runs, len) where all is valid, masked(channel, offset, mask, runs, len) where not, `fill` in
// gaps.
template <class T, class Run, class Masked>
void write(const Geometry& g, const Valid& valid, int64_t n, int64_t first, int64_t channels, T* to,
           T fill, const Run& run, const Masked& masked) {
  const auto offset = [&](int64_t c) { return (n * g.c + c) * g.s; };
  if (valid.count(n) == 0) return fill_values(to + offset(first), channels * g.s, fill);
  if (valid.count(n) == g.s) return run(first, offset(first), channels, g.s);
  if (g.s < kShortRow) return masked(first, offset(first), valid.mask(n), channels, g.s);
  for (int64_t c = first; c < first + channels; ++c) {
    if (valid.scattered(n)) {
      for (int64_t at = 0; at < g.s; at += kInL1)
        masked(c, offset(c) + at, valid.mask(n) + at, 1, std::min(kInL1, g.s - at));
      continue;
    }
    for (const Valid::Run& each : valid.runs(n)) run(c, offset(c) + each.begin, 1, each.count);
    over_gaps(valid.runs(n), g.s, [&](int64_t begin, int64_t count) {
      fill_values(to + offset(c) + begin, count, fill);
    });
  }
}

// affine: the first channel's coefficients
template <class T>
void write_outputs(const MaskedForward<T>& f, int64_t n, int64_t first, int64_t channels,
                   const Affine<T>* affine) {
  write(
      f.geometry, f.valid, n, first, channels, f.y, f.padding,
      [&](int64_t c, int64_t offset, int64_t runs, int64_t len) {
        f.kernels.apply(f.x + offset, f.y + offset, runs, len, affine + c - first, false);
      },
      [&](int64_t c, int64_t offset, const bool* mask, int64_t runs, int64_t len) {
        f.masked.apply(f.x + offset, f.y + offset, mask, runs, len, affine + c - first, f.padding);
      });
}

template <class T>
void write_gradients(const MaskedBackward<T>& b, int64_t n, int64_t first, int64_t channels,
                     const GradAffine<compute_t<T>>* affine) {
  write(
      b.geometry, b.valid, n, first, channels, b.grad_x, T{},
      [&](int64_t c, int64_t offset, int64_t runs, int64_t len) {
        b.kernels.grad_apply(b.grad + offset, b.x + offset, b.grad_x + offset, runs, len,
                             affine + c - first, false);
      },
      [&](int64_t c, int64_t offset, const bool* mask, int64_t runs, int64_t len) {
        b.masked.grad_apply(b.grad + offset, b.x + offset, b.grad_x + offset, mask, runs, len,
                            affine + c - first);
      });
}

// body(sample, first group, groups): neighbouring groups of a sample that are one task.
template <class Body>
void over_groups(const Geometry& g, const Body& body) {
  const int64_t len = g.values_per_statistic();
  const int64_t per_task = std::clamp<int64_t>(kTask / len, 1, g.groups());
  const int64_t tasks = ceil_div(g.groups(), per_task);
  parallel(g.n * tasks, per_task * len, [&](int64_t i) {
    // shortest and longest in turn, where samples are sorted by length: equal work for all threads
    const int64_t k = i / tasks, first = i % tasks * per_task;
    body(k % 2 ? g.n - 1 - k / 2 : k / 2, first, std::min(per_task, g.groups() - first));
  });
}

template <class T>
void forward_groups(const MaskedForward<T>& f) {
  const Geometry& g = f.geometry;
  const Kernels<T>& kernels = f.kernels;
  const int64_t per_group = g.channels_per_group();
  over_groups(g, [&](int64_t n, int64_t first, int64_t groups) {
    const Gathered<T, 1> gathered(g, f.valid, {f.x}, per_group * f.valid.count(n));
    Room<Affine<T>> room;
    Affine<T>* const affine = room.of(groups * per_group);
    const int64_t first_channel = first * per_group;
    for (int64_t k = 0; k < groups; ++k) {
      const int64_t statistic = n * g.groups() + first + k, channel = first_channel + k * per_group;
      Moments m;
      gathered.of_sample(n, channel, per_group, moments_into(kernels, m, g.centred));
      f.count[statistic] = m.count;
      f.mean[statistic] = m.mean;
      f.var[statistic] = m.count > 0.0 ? m.m2 / m.count : 0.0;
      const double rstd = inverse_std(f.var[statistic], f.eps);
      for (int64_t c = channel; c < channel + per_group; ++c)
        affine[c - first_channel] = Affine<T>(m.mean, rstd, f.weight, f.bias, c);
    }
    write_outputs(f, n, first_channel, groups * per_group, affine);
  });
}

template <class T>
void backward_groups(const MaskedBackward<T>& b) {
  using A = compute_t<T>;
  const Geometry& g = b.geometry;
  const Kernels<T>& kernels = b.kernels;
  const int64_t per_group = g.channels_per_group();
  const auto sums = scratch<GradSums>(g.n * g.c);
  over_groups(g, [&](int64_t n, int64_t first, int64_t groups) {
    const Gathered<T, 2> gathered(g, b.valid, {b.grad, b.x}, b.valid.count(n));
    Room<GradAffine<A>> room;
    GradAffine<A>* const affine = room.of(groups * per_group);
    const int64_t first_channel = first * per_group;
    const double count = double(per_group * b.valid.count(n));
    for (int64_t k = 0; k < groups; ++k) {
      const int64_t statistic = n * g.groups() + first + k, channel = first_channel + k * per_group;
      const double mean = b.mean[statistic], rstd = inverse_std(b.var[statistic], b.eps);
      const auto weight = [&](int64_t c) { return b.weight ? double(b.weight[c]) : 1.0; };
      GradSums total;
      for (int64_t c = channel; c < channel + per_group; ++c) {
        GradSums& of_channel = sums[n * g.c + c];
        gathered.of_sample(n, c, 1, sums_into(kernels, of_channel, mean, rstd));
        total.grad += weight(c) * of_channel.grad;
        total.grad_x_hat += weight(c) * of_channel.grad_x_hat;
      }
      const double mean_grad = g.centred ? total.grad / count : 0.0;
      for (int64_t c = channel; c < channel + per_group; ++c)
        affine[c - first_channel] =
            GradAffine<A>(mean, rstd, weight(c), mean_grad, total.grad_x_hat / count);
    }
    if (!b.grad_x) return;
    // one value is its own mean: its gradient is zero, not the rounding of what cancels
    if (count == 1.0)
      return fill_values(b.grad_x + (n * g.c + first_channel) * g.s, groups * per_group * g.s, T{});
    write_gradients(b, n, first_channel, groups * per_group, affine);
  });
  for (int64_t n = 0; n < g.n; ++n)
    for (int64_t c = 0; c < g.c; ++c) {
      b.grad_weight[c] = (n ? b.grad_weight[c] : 0.0) + sums[n * g.c + c].grad_x_hat;
      b.grad_bias[c] = (n ? b.grad_bias[c] : 0.0) + sums[n * g.c + c].grad;
    }
}

// Neighbouring samples whose values of a channel are summed together: by the mask alone, so that
// the bits do not depend on the number of threads.
std::vector<int64_t> units_of(const Valid& valid) {
  std::vector<int64_t> begins{0};
  int64_t count = 0;
  for (int64_t n = 0; n < valid.samples(); ++n) {
    if (count > 0 && count + valid.count(n) > kPiece) begins.push_back(n), count = 0;
    count += valid.count(n);
  }
  begins.push_back(valid.samples());
  return begins;
}

// Statistics over the batch: sum(channel, first sample, last one) for every unit, total(channel,
// of_unit, units) for every channel, and then write(sample, first channel, channels). A channel
// that fits in cache is read from memory once.
template <class T, class Sum, class OfUnit, class Total, class Write>
void over_batch(const Geometry& g, const Valid& valid, int64_t tensors, bool writing,
                const OfUnit& of_unit, const Total& total, const Write& write) {
  const std::vector<int64_t> units = units_of(valid);
  const int64_t count = int64_t(units.size()) - 1;
  const auto sum = [&](int64_t c, int64_t u) { return of_unit(c, units[u], units[u + 1]); };
  if (const int64_t channels = writing ? channels_in_cache<T>(g, tensors) : 0) {
    over_channels(g, channels, [&](int64_t first, int64_t some) {
      for (int64_t c = first; c < first + some; ++c)
        total(c, count, [&](int64_t u) { return sum(c, u); });
      for (int64_t n = g.n - 1; n >= 0; --n) write(n, first, some);
    });
    return;
  }
  const auto partial = scratch<Sum>(g.c * count);
  parallel(count * g.c, std::min(g.n * g.s, kPiece),
           [&](int64_t i) { partial[i % g.c * count + i / g.c] = sum(i % g.c, i / g.c); });
  for (int64_t c = 0; c < g.c; ++c)
    total(c, count, [&](int64_t u) { return partial[c * count + u]; });
  if (!writing) return;
  const int64_t per_task = std::clamp<int64_t>(kInL1 / g.s, 1, g.c);
  const int64_t tasks = ceil_div(g.c, per_task);
  parallel<true>(g.n * tasks, per_task * g.s, [&](int64_t i) {
    const int64_t first = i % tasks * per_task;
    write(i / tasks, first, std::min(per_task, g.c - first));
  });
}

int64_t unit_capacity(const Geometry& g) { return std::min(g.n * g.s, std::max(kPiece, g.s)); }

template <class T>
void forward_batch(const MaskedForward<T>& f) {
  const Geometry& g = f.geometry;
  const Kernels<T>& kernels = f.kernels;
  const auto affine = scratch<Affine<T>>(g.c);
  const auto of_unit = [&](int64_t channel, int64_t begin, int64_t end) {
    const Gathered<T, 1> gathered(g, f.valid, {f.x}, unit_capacity(g));
    Moments m;
    gathered.of_batch(begin, end, channel, moments_into(kernels, m, true),
                      [&](const auto& x, const bool* mask, int64_t samples, int64_t count) {
                        Moments some{double(count), 0.0, 0.0};
                        const bool found =
                            f.masked.moments(x[0], mask, samples, g.s, g.c * g.s, &some);
                        if (found) m.merge(some);
                        return found;
                      });
    return m;
  };
  const auto total = [&](int64_t c, int64_t units, const auto& of) {
    Moments m;
    for (int64_t u = 0; u < units; ++u) m.merge(of(u));
    f.count[c] = m.count;
    f.mean[c] = m.mean;
    f.var[c] = m.count > 0.0 ? m.m2 / m.count : 0.0;
    affine[c] = Affine<T>(f.mean[c], inverse_std(f.var[c], f.eps), f.weight, f.bias, c);
  };
  over_batch<T, Moments>(g, f.valid, 1, true, of_unit, total,
                         [&](int64_t n, int64_t first, int64_t channels) {
                           write_outputs(f, n, first, channels, affine.get() + first);
                         });
}

template <class T>
void backward_batch(const MaskedBackward<T>& b) {
  using A = compute_t<T>;
  const Geometry& g = b.geometry;
  const Kernels<T>& kernels = b.kernels;
  const auto affine = scratch<GradAffine<A>>(g.c);
  int64_t count = 0;
  for (int64_t n = 0; n < g.n; ++n) count += b.valid.count(n);
  const auto of_unit = [&](int64_t channel, int64_t begin, int64_t end) {
    const Gathered<T, 2> gathered(g, b.valid, {b.grad, b.x}, unit_capacity(g));
    GradSums sums;
    const double mean = b.mean[channel], rstd = inverse_std(b.var[channel], b.eps);
    gathered.of_batch(
        begin, end, channel, sums_into(kernels, sums, mean, rstd),
        [&](const auto& of, const bool* mask, int64_t samples, int64_t) {
          sums.add(b.masked.grad_sums(of[0], of[1], mask, samples, g.s, g.c * g.s, mean, rstd));
          return true;
        });
    return sums;
  };
  const auto total = [&](int64_t c, int64_t units, const auto& of) {
    GradSums sums;
    for (int64_t u = 0; u < units; ++u) sums.add(of(u));
    b.grad_weight[c] = sums.grad_x_hat;
    b.grad_bias[c] = sums.grad;
    const double weight = b.weight ? double(b.weight[c]) : 1.0;
    affine[c] =
        GradAffine<A>(b.mean[c], inverse_std(b.var[c], b.eps), weight,
                      weight * sums.grad / double(count), weight * sums.grad_x_hat / double(count));
  };
  over_batch<T, GradSums>(g, b.valid, 2, b.grad_x != nullptr, of_unit, total,
                          [&](int64_t n, int64_t first, int64_t channels) {
                            if (count == 1)  // one value is its own mean
                              return fill_values(b.grad_x + (n * g.c + first) * g.s, channels * g.s,
                                                 T{});
                            write_gradients(b, n, first, channels, affine.get() + first);
                          });
}

}  // namespace

template <class T>
void masked_forward_rows(const MaskedForward<T>& f) {
  f.geometry.over_batch() ? forward_batch(f) : forward_groups(f);
}

template <class T>
void masked_backward_rows(const MaskedBackward<T>& b) {
  b.geometry.over_batch() ? backward_batch(b) : backward_groups(b);
}

template void masked_forward_rows<double>(const MaskedForward<double>&);
template void masked_forward_rows<float>(const MaskedForward<float>&);
template void masked_forward_rows<bf16>(const MaskedForward<bf16>&);
template void masked_forward_rows<f16>(const MaskedForward<f16>&);
template void masked_backward_rows<double>(const MaskedBackward<double>&);
template void masked_backward_rows<float>(const MaskedBackward<float>&);
template void masked_backward_rows<bf16>(const MaskedBackward<bf16>&);
template void masked_backward_rows<f16>(const MaskedBackward<f16>&);

}  // namespace truenorm
