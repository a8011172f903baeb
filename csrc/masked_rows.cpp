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

template <class T>
void write_outputs(const Forward<T>& f, int64_t n, int64_t first, int64_t channels,
                   const Affine<T>* affine) {
  const auto run = [&](int64_t c, int64_t offset, int64_t runs, int64_t len) {
    if (f.acts())
      f.kernels.act(f.inputs(offset), f.y + offset, runs, len, affine + c - first, f.act, false);
    else
      f.kernels.apply(f.x + offset, f.y + offset, runs, len, affine + c - first, false);
  };
  const MaskedKernels<T>& masked = masked_table<T>();
  write(f.geometry, *f.valid, n, first, channels, f.y, f.padding, run,
        [&](int64_t c, int64_t offset, const bool* mask, int64_t runs, int64_t len) {
          if (!f.acts())
            return masked.apply(f.x + offset, f.y + offset, mask, runs, len, affine + c - first,
                                f.padding);
          run(c, offset, runs, len);
          masked.clear(f.y + offset, mask, runs, len, f.padding);
        });
}

// The gradient of what the activation is applied to, before it is first read.
template <class T>
void make_inner(const Backward<T>& b, int64_t n, int64_t first, int64_t channels) {
  if (!b.inner) return;
  const Geometry& g = b.geometry;
  Room<Affine<T>> room;
  Affine<T>* const affine = room.of(channels);
  for (int64_t c = first; c < first + channels; ++c) {
    const int64_t i = g.over_batch() ? c : n * g.groups() + c / g.channels_per_group();
    affine[c - first] = Affine<T>(b.mean[i], b.rstd(i), b.weight, b.bias, c);
  }
  const auto run = [&](int64_t c, int64_t offset, int64_t runs, int64_t len) {
    b.kernels.act(b.inputs(offset), b.inner + offset, runs, len, affine + c - first, b.act, false);
  };
  write(g, *b.valid, n, first, channels, b.inner, T{}, run,
        [&](int64_t c, int64_t offset, const bool* mask, int64_t runs, int64_t len) {
          run(c, offset, runs, len);
          masked_table<T>().clear(b.inner + offset, mask, runs, len, T{});
        });
}

template <class T>
void write_gradients(const Backward<T>& b, int64_t n, int64_t first, int64_t channels,
                     const GradAffine<compute_t<T>>* affine) {
  const T* const grads = b.norm_grad();
  const auto run = [&](int64_t c, int64_t offset, int64_t runs, int64_t len) {
    const auto* const by = affine + c - first;
    if (!b.fixed)
      return b.kernels.grad_apply(grads + offset, b.x + offset, b.grad_x + offset, runs, len, by,
                                  false);
    for (int64_t r = 0; r < runs; ++r)
      b.kernels.grad_scale(grads + offset + r * len, b.grad_x + offset + r * len, 1, len,
                           &by[r].scale, false);
  };
  const MaskedKernels<T>& masked = masked_table<T>();
  write(b.geometry, *b.valid, n, first, channels, b.grad_x, T{}, run,
        [&](int64_t c, int64_t offset, const bool* mask, int64_t runs, int64_t len) {
          if (!b.fixed)
            return masked.grad_apply(grads + offset, b.x + offset, b.grad_x + offset, mask, runs,
                                     len, affine + c - first);
          run(c, offset, runs, len);
          masked.clear(b.grad_x + offset, mask, runs, len, T{});
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
void forward_groups(const Forward<T>& f) {
  const Geometry& g = f.geometry;
  const int64_t per_group = g.channels_per_group();
  over_groups(g, [&](int64_t n, int64_t first, int64_t groups) {
    const int64_t begin = first * per_group, end = begin + groups * per_group;
    if (!f.fixed) {
      const Gathered<T, 1> gathered(g, *f.valid, {f.x}, per_group * f.valid->count(n));
      for (int64_t channel = begin; channel < end; channel += per_group) {
        Moments m;
        gathered.of_sample(n, channel, per_group, moments_into(f.kernels, m, g.centred));
        f.set(n * g.groups() + channel / per_group, m);
      }
    }
    if (!f.y) return;
    Room<Affine<T>> room;
    Affine<T>* const affine = room.of(end - begin);
    for (int64_t c = begin; c < end; ++c) {
      const int64_t i = n * g.groups() + c / per_group;
      affine[c - begin] = Affine<T>(f.mean[i], f.rstd(i), f.weight, f.bias, c);
    }
    write_outputs(f, n, begin, end - begin, affine);
  });
}

template <class T>
void backward_groups(const Backward<T>& b) {
  using A = compute_t<T>;
  const Geometry& g = b.geometry;
  const int64_t per_group = g.channels_per_group();
  const auto own = scratch<GradSums>(b.sums ? 0 : g.n * g.c);
  GradSums* const sums = b.sums ? b.sums : own.get();
  over_groups(g, [&](int64_t n, int64_t first, int64_t groups) {
    const Gathered<T, 2> gathered(g, *b.valid, {b.norm_grad(), b.x}, b.valid->count(n));
    Room<GradAffine<A>> room;
    GradAffine<A>* const affine = room.of(groups * per_group);
    const int64_t first_channel = first * per_group;
    const double count = double(per_group * b.valid->count(n));
    make_inner(b, n, first_channel, groups * per_group);
    for (int64_t k = 0; k < groups; ++k) {
      const int64_t statistic = n * g.groups() + first + k, channel = first_channel + k * per_group;
      GradSums total;
      for (int64_t c = channel; c < channel + per_group && b.summing(); ++c) {
        GradSums& of_channel = sums[n * g.c + c];
        gathered.of_sample(n, c, 1,
                           sums_into(b.kernels, of_channel, b.mean[statistic], b.rstd(statistic)));
        total.add({b.weight_of(c) * of_channel.grad, b.weight_of(c) * of_channel.grad_x_hat});
      }
      const GradSums means = b.mean_grads(statistic, total, count);
      for (int64_t c = channel; c < channel + per_group; ++c)
        affine[c - first_channel] = b.affine(statistic, b.weight_of(c), means);
    }
    if (!b.grad_x) return;
    if (b.alone(count))
      return fill_values(b.grad_x + (n * g.c + first_channel) * g.s, groups * per_group * g.s, T{});
    write_gradients(b, n, first_channel, groups * per_group, affine);
  });
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
void forward_batch(const Forward<T>& f) {
  const Geometry& g = f.geometry;
  const auto affine = scratch<Affine<T>>(g.c);
  const auto of_unit = [&](int64_t channel, int64_t begin, int64_t end) {
    Moments m;
    if (f.fixed) return m;
    const Gathered<T, 1> gathered(g, *f.valid, {f.x}, unit_capacity(g));
    gathered.of_batch(begin, end, channel, moments_into(f.kernels, m, true),
                      [&](const auto& x, const bool* mask, int64_t samples, int64_t count) {
                        Moments some{double(count), 0.0, 0.0};
                        const bool found =
                            masked_table<T>().moments(x[0], mask, samples, g.s, g.c * g.s, &some);
                        if (found) m.merge(some);
                        return found;
                      });
    return m;
  };
  const auto total = [&](int64_t c, int64_t units, const auto& of) {
    Moments m;
    for (int64_t u = 0; u < units; ++u) m.merge(of(u));
    if (!f.fixed) f.set(c, m);
    affine[c] = Affine<T>(f.mean[c], f.rstd(c), f.weight, f.bias, c);
  };
  over_batch<T, Moments>(g, *f.valid, 1, f.y != nullptr, of_unit, total,
                         [&](int64_t n, int64_t first, int64_t channels) {
                           write_outputs(f, n, first, channels, affine.get() + first);
                         });
}

template <class T>
void backward_batch(const Backward<T>& b) {
  const Geometry& g = b.geometry;
  const auto affine = scratch<GradAffine<compute_t<T>>>(g.c);
  int64_t count = 0;
  for (int64_t n = 0; n < g.n; ++n) count += b.valid->count(n);
  const auto of_unit = [&](int64_t channel, int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) make_inner(b, n, channel, 1);
    GradSums sums;
    if (!b.summing()) return sums;
    const Gathered<T, 2> gathered(g, *b.valid, {b.norm_grad(), b.x}, unit_capacity(g));
    const double mean = b.mean[channel], rstd = b.rstd(channel);
    gathered.of_batch(begin, end, channel, sums_into(b.kernels, sums, mean, rstd),
                      [&](const auto& of, const bool* mask, int64_t samples, int64_t) {
                        sums.add(masked_table<T>().grad_sums(of[0], of[1], mask, samples, g.s,
                                                             g.c * g.s, mean, rstd));
                        return true;
                      });
    return sums;
  };
  const auto total = [&](int64_t c, int64_t units, const auto& of) {
    GradSums sums;
    for (int64_t u = 0; u < units; ++u) sums.add(of(u));
    if (b.sums) b.sums[c] = sums;
    const double weight = b.weight_of(c);
    affine[c] = b.affine(
        c, weight, b.mean_grads(c, {weight * sums.grad, weight * sums.grad_x_hat}, double(count)));
  };
  over_batch<T, GradSums>(g, *b.valid, 2, b.grad_x != nullptr, of_unit, total,
                          [&](int64_t n, int64_t first, int64_t channels) {
                            if (b.alone(double(count)))
                              return fill_values(b.grad_x + (n * g.c + first) * g.s, channels * g.s,
                                                 T{});
                            write_gradients(b, n, first, channels, affine.get() + first);
                          });
}

}  // namespace

template <class T>
void masked_forward_rows(const Forward<T>& f) {
  f.geometry.over_batch() ? forward_batch(f) : forward_groups(f);
}

template <class T>
void masked_backward_rows(const Backward<T>& b) {
  b.geometry.over_batch() ? backward_batch(b) : backward_groups(b);
}

template void masked_forward_rows<double>(const Forward<double>&);
template void masked_forward_rows<float>(const Forward<float>&);
template void masked_forward_rows<bf16>(const Forward<bf16>&);
template void masked_forward_rows<f16>(const Forward<f16>&);
template void masked_backward_rows<double>(const Backward<double>&);
template void masked_backward_rows<float>(const Backward<float>&);
template void masked_backward_rows<bf16>(const Backward<bf16>&);
template void masked_backward_rows<f16>(const Backward<f16>&);

}  // namespace truenorm
