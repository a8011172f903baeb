// Memory [N, C, S]: each channel of a sample is one run of S values, of which those count that lie
// at valid positions. Where these are one run its moments are taken where it lies, else from a
// packed copy; outputs go from the input to their place.
#include "masked_gather.h"
#include "rows.h"
#include "tensors.h"

namespace truenorm {
namespace {

constexpr int64_t kInL1 = 4096;  // values
constexpr int64_t kTask = 1024;  // values: reading and writing take turns that often

// Writes neighbouring channels of a sample, each by coefficients of its own: run(channel, offset,
// runs, len) where all is valid, masked(channel, offset, mask, runs, len) where not, `fill` in
// gaps.
template <class T, class Of, class Run, class Masked>
void write(const Of& of, int64_t n, int64_t first, int64_t channels, T* to, T fill, const Run& run,
           const Masked& masked) {
  const Geometry& g = of.geometry;
  const Valid& valid = *of.valid;
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
  write(
      f, n, first, channels, f.y, f.padding,
      [&](int64_t c, int64_t offset, int64_t runs, int64_t len) {
        apply_runs(f, offset, runs, len, affine + c - first);
      },
      [&](int64_t c, int64_t offset, const bool* mask, int64_t runs, int64_t len) {
        const Affine<T>* const by = affine + c - first;
        if (!f.acts())
          return f.kernels.apply_valid(f.x + offset, f.y + offset, mask, runs, len, by, f.padding);
        apply_runs(f, offset, runs, len, by);
        f.kernels.clear(f.y + offset, mask, runs, len, f.padding);
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
  write(b, n, first, channels, b.inner, T{}, run,
        [&](int64_t c, int64_t offset, const bool* mask, int64_t runs, int64_t len) {
          run(c, offset, runs, len);
          b.kernels.clear(b.inner + offset, mask, runs, len, T{});
        });
}

template <class T>
void write_gradients(const Backward<T>& b, int64_t n, int64_t first, int64_t channels,
                     const GradAffine<compute_t<T>>* affine) {
  const auto run = [&](int64_t c, int64_t offset, int64_t runs, int64_t len) {
    grad_runs(b, offset, runs, len, affine + c - first);
  };
  write(b, n, first, channels, b.grad_x, T{}, run,
        [&](int64_t c, int64_t offset, const bool* mask, int64_t runs, int64_t len) {
          if (!b.fixed)
            return b.kernels.grad_apply_valid(b.norm_grad() + offset, b.x + offset,
                                              b.grad_x + offset, mask, runs, len,
                                              affine + c - first);
          run(c, offset, runs, len);
          b.kernels.clear(b.grad_x + offset, mask, runs, len, T{});
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
      const Gathered<T, 1> gathered(f, {f.x}, per_group * f.valid->count(n));
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

// As rows_short.cpp takes them.
template <class T>
auto short_sums_into(const Kernels<T>& kernels, GradSums& sums, double mean, double rstd) {
  return [&, mean, rstd](const std::array<const T*, 2>& of, int64_t count) {
    GradSums found;
    kernels.row_grad_sums(of[0], of[1], 1, count, count, count, &mean, &rstd, nullptr,
                          {&found.grad, &found.grad_x_hat}, nullptr, nullptr);
    sums.add(found);
  };
}

template <class T>
void backward_groups(const Backward<T>& b) {
  using A = compute_t<T>;
  const Geometry& g = b.geometry;
  const int64_t per_group = g.channels_per_group();
  const auto own = scratch<GradSums>(b.sums ? 0 : g.n * g.c);
  GradSums* const sums = b.sums ? b.sums : own.get();
  over_groups(g, [&](int64_t n, int64_t first, int64_t groups) {
    const Gathered<T, 2> gathered(b, {b.norm_grad(), b.x}, b.valid->count(n));
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
        const double mean = b.mean[statistic], rstd = b.rstd(statistic);
        if (b.valid->count(n) < kShortRuns)
          gathered.of_sample(n, c, 1, short_sums_into(b.kernels, of_channel, mean, rstd));
        else
          gathered.of_sample(n, c, 1, sums_into(b.kernels, of_channel, mean, rstd));
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
void forward_valid_batch(const Forward<T>& f) {
  const Geometry& g = f.geometry;
  const auto affine = scratch<Affine<T>>(g.c);
  const auto of_unit = [&](int64_t channel, int64_t begin, int64_t end) {
    Moments m;
    if (f.fixed) return m;
    const Gathered<T, 1> gathered(f, {f.x}, unit_capacity(g));
    gathered.of_batch(begin, end, channel, moments_into(f.kernels, m, true),
                      [&](const auto& x, const bool* mask, int64_t samples, int64_t count) {
                        Moments some{double(count), 0.0, 0.0};
                        const bool found =
                            f.kernels.moments_of_valid(x[0], mask, samples, g.s, g.c * g.s, &some);
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
void backward_valid_batch(const Backward<T>& b) {
  const Geometry& g = b.geometry;
  const auto affine = scratch<GradAffine<compute_t<T>>>(g.c);
  int64_t count = 0;
  for (int64_t n = 0; n < g.n; ++n) count += b.valid->count(n);
  const auto of_unit = [&](int64_t channel, int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end && b.inner; ++n) make_inner(b, n, channel, 1);
    GradSums sums;
    if (!b.summing()) return sums;
    const Gathered<T, 2> gathered(b, {b.norm_grad(), b.x}, unit_capacity(g));
    const double mean = b.mean[channel], rstd = b.rstd(channel);
    gathered.of_batch(begin, end, channel, sums_into(b.kernels, sums, mean, rstd),
                      [&](const auto& of, const bool* mask, int64_t samples, int64_t) {
                        sums.add(b.kernels.grad_sums_of_valid(of[0], of[1], mask, samples, g.s,
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
  f.geometry.over_batch() ? forward_valid_batch(f) : forward_groups(f);
}

template <class T>
void masked_backward_rows(const Backward<T>& b) {
  b.geometry.over_batch() ? backward_valid_batch(b) : backward_groups(b);
}

TN_EVERY_TYPE(masked_forward_rows, Forward)
TN_EVERY_TYPE(masked_backward_rows, Backward)

}  // namespace truenorm
