#include "running.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>

namespace truenorm {
namespace {

// (1 − factor) · running + factor · to(channel), for those channels that have(channel).
template <class Has, class To>
void step(const Tensor& running, double factor, const Has& has, const To& to) {
  const int64_t channels = running.numel(), stride = running.dim() > 0 ? running.stride(0) : 1;
  with_type(running, [&]<class T>(T) {
    T* const values = static_cast<T*>(running.mutable_data_ptr());
    for (int64_t c = 0; c < channels; ++c) {
      if (!has(c)) continue;
      T& value = values[c * stride];
      if constexpr (std::is_floating_point_v<T>) {
        value = T((1.0 - factor) * double(value) + factor * to(c));
      } else {
        const Kernels<T>& k = table<T>(kernels());
        double before;
        k.widen(&value, &before, 1);
        const double after = (1.0 - factor) * before + factor * to(c);
        k.narrow(&after, &value, 1);
      }
    }
  });
}

double unbiased(double count) { return count / (count - 1.0); }

void move_over_samples(const Running& running, const Observed& seen, double factor) {
  const int64_t channels = running.mean.numel();
  const auto average = [&](const double* of, double scale) {
    return [=, &seen](int64_t c) {
      double sum = 0.0;
      for (int64_t n = 0; n < seen.samples; ++n) sum += of[n * channels + c];
      return sum / double(seen.samples) * scale;
    };
  };
  const auto all = [](int64_t) { return true; };
  step(running.mean, factor, all, average(seen.mean, 1.0));
  step(running.var, factor, all, average(seen.var, unbiased(seen.count)));
}

// where each statistic spans as many values as its mask says
void move_by_counts(const Running& running, const Observed& seen, double factor) {
  const int64_t channels = running.mean.numel();
  // how many of a channel's statistics count, and the sum of value(statistic) over them
  const auto sum = [&](int64_t c, const auto& value) {
    std::pair<double, double> found{0.0, 0.0};
    for (int64_t i = c; i < seen.samples * channels; i += channels)
      if (seen.counts[i] > 1.0) found.first += 1.0, found.second += value(i);
    return found;
  };
  const auto has = [&](int64_t c) { return sum(c, [](int64_t) { return 0.0; }).first > 0.0; };
  const auto average = [&](const auto& value) {
    return [&, value](int64_t c) {
      const auto [samples, total] = sum(c, value);
      return total / samples;
    };
  };
  step(running.mean, factor, has, average([&](int64_t i) { return seen.mean[i]; }));
  step(running.var, factor, has,
       average([&](int64_t i) { return seen.var[i] * unbiased(seen.counts[i]); }));
}

void move_by_record(const Tensor& running_mean, const Tensor& running_var, Maybe batches,
                    const Tensor& record, std::optional<double> momentum, bool skip_nonfinite) {
  const int64_t channels = running_mean.numel();
  check::running(running_mean, running_var, batches ? &*batches : nullptr, !momentum, channels);
  check::record(record, -1);
  const int64_t statistics = record.size(1);
  if (statistics % channels != 0)
    check::wrong_record(record,
                        "whose columns are as many as the channels of `running_mean`, or "
                        "as many for each sample");
  if (statistics == 0) return;
  const double* const mean = doubles(record);
  const double* const counts = mean + 2 * statistics;
  if (skip_nonfinite &&
      !std::all_of(mean, counts, [](double value) { return std::isfinite(value); }))
    return;
  const bool equal = counts[0] > 1.0 && std::all_of(counts, counts + statistics,
                                                    [&](double n) { return n == counts[0]; });
  move({running_mean, running_var, batches ? &*batches : nullptr, momentum.value_or(std::nan(""))},
       {mean, mean + statistics, statistics / channels, equal ? nullptr : counts, counts[0]});
}

}  // namespace

void move(const Running& running, const Observed& seen) {
  double factor = running.momentum;
  if (running.num_batches_tracked) {
    auto* batches = static_cast<int64_t*>(running.num_batches_tracked->mutable_data_ptr());
    *batches += 1;
    if (std::isnan(factor)) factor = 1.0 / double(*batches);
  }
  seen.counts ? move_by_counts(running, seen, factor) : move_over_samples(running, seen, factor);
}

}  // namespace truenorm

STABLE_TORCH_LIBRARY_IMPL(truenorm, CPU, m) {
  m.impl("move_", TORCH_BOX(&truenorm::move_by_record));
}
