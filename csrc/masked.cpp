// Normalization over valid positions alone: their values are taken out a slice at a time, go
// through the same loops as a tensor without padding, and are put back. So they get the bits that
// they have without the padding, and what the padding holds is never read.
#include "masked.h"

#include <torch/csrc/stable/library.h>

#include <cmath>
#include <tuple>

#include "tensors.h"

namespace truenorm {
namespace {

// What is normalized in one go: some samples' valid positions of some neighbouring channels.
struct Slice {
  int64_t first_sample, samples, first_channel, channels, count;
};

// Of a slice's packed values, so that each step finds the last one's in L1 or near it.
constexpr int64_t kSliceBytes = int64_t{1} << 16;

// A run from which it pays to go row by row without packing.
constexpr int64_t kLongRun = 256;

// A thread's memory for packed values, kept while it is small.
class PackedMemory {
 public:
  void* of(size_t bytes) {
    if (bytes > size_) {
      memory_.reset(new std::byte[bytes]);  // not made zero
      size_ = bytes;
    }
    return memory_.get();
  }
  void release_if_large() {
    if (size_ > kKept) memory_.reset(), size_ = 0;
  }

 private:
  static constexpr size_t kKept = size_t{4} << 20;

  std::unique_ptr<std::byte[]> memory_;
  size_t size_ = 0;
};

template <class T>
class Slices {
 public:
  // tensors: how many of a slice's size are in use at once
  Slices(const Geometry& g, const Valid& valid, int64_t tensors)
      : g_(g), valid_(valid), tensors_(tensors) {
    // a slice and what is made of it stay in L2; in channels_last a sample is not cut
    const int64_t positions = g.over_batch() ? valid.before(g.n) : valid.most();
    const int64_t step = g.over_batch() ? 1 : g.channels_per_group();
    const int64_t bytes = tensors * step * std::max<int64_t>(positions, 1) * int64_t(sizeof(T));
    per_slice_ = g.memory == Memory::channels
                     ? g.c
                     : step * std::clamp<int64_t>(kSliceBytes / bytes, 1, g.c / step);
    by_channel_ = ceil_div(g.c, per_slice_);
  }

  // body(slice, its geometry, memory for `tensors` packed ones)
  template <class Body>
  void each(const Body& body) const {
    const int64_t samples = g_.over_batch() ? g_.n : 1, by_sample = g_.n / samples;
    parallel(by_sample * by_channel_, samples * per_slice_ * g_.s, [&](int64_t i) {
      // shortest and longest in turn, where samples are sorted by length: equal work for all
      // threads
      const int64_t k = i / by_channel_, sample = k % 2 ? by_sample - 1 - k / 2 : k / 2;
      Slice slice{sample * samples, samples, i % by_channel_ * per_slice_, 0, 0};
      slice.channels = std::min(per_slice_, g_.c - slice.first_channel);
      slice.count = valid_.before(slice.first_sample + samples) - valid_.before(slice.first_sample);
      static thread_local PackedMemory memory;
      const size_t values = size_t(slice.channels * slice.count);
      body(slice, static_cast<T*>(memory.of(size_t(tensors_) * values * sizeof(T))));
      memory.release_if_large();
    });
  }

  Geometry geometry(const Slice& s) const {
    const bool rows = g_.memory == Memory::rows, batch = g_.over_batch();
    const int64_t groups = batch ? 0 : s.channels / g_.channels_per_group();
    if (!rows && batch) return {s.count, s.channels, 1, g_.memory, {}, {}, true, 0, g_.centred};
    return {1, s.channels, s.count, g_.memory, {}, {}, true, groups, g_.centred};
  }
  int64_t first_statistic(const Slice& s) const {
    return g_.over_batch()
               ? s.first_channel
               : s.first_sample * g_.groups() + s.first_channel / g_.channels_per_group();
  }

  // A slice whose every row is one long run, with statistics of its own: no need to pack it.
  bool row_by_row(const Slice& s) const {
    if (g_.memory != Memory::rows || g_.over_batch() || g_.channels_per_group() != 1) return false;
    const Valid::Run* const run = valid_.only_run(s.first_sample);
    return run && run->count >= kLongRun;
  }
  // body(slice of one channel, offset of its run in the tensor)
  template <class Body>
  void each_row(const Slice& s, const Body& body) const {
    const int64_t begin = valid_.only_run(s.first_sample)->begin;
    for (int64_t c = s.first_channel; c < s.first_channel + s.channels; ++c)
      body(Slice{s.first_sample, 1, c, 1, s.count}, (s.first_sample * g_.c + c) * g_.s + begin);
  }
  void fill_rows(const Slice& s, T* to, T fill) const {
    for (int64_t c = s.first_channel; c < s.first_channel + s.channels; ++c)
      valid_.fill_gaps(s.first_sample, to + (s.first_sample * g_.c + c) * g_.s, 1, fill);
  }

  // Where a slice's valid values lie, packed or, where they are packed as they are, in place.
  const Valid::Run* in_place(const Slice& s) const {
    return g_.memory == Memory::channels && s.samples == 1 ? valid_.only_run(s.first_sample)
                                                           : nullptr;
  }
  template <class P>
  P* run_of(const Slice& s, P* tensor) const {
    return tensor + (s.first_sample * g_.s + in_place(s)->begin) * g_.c;
  }
  const T* pack(const Slice& s, const T* from, T* to) const {
    if (in_place(s)) return run_of(s, from);
    over(s, [&](int64_t n, int64_t offset, int64_t packed, int64_t width) {
      valid_.pack(n, from + offset, to + packed, width);
    });
    return to;
  }
  // Where to write what `unpack` takes: `memory`, or the result itself.
  T* room(const Slice& s, T* memory, T* result) const {
    return in_place(s) ? run_of(s, result) : memory;
  }
  void unpack(const Slice& s, const T* from, T* to, T fill) const {
    if (in_place(s)) {
      valid_.fill_gaps(s.first_sample, to + s.first_sample * g_.s * g_.c, g_.c, fill);
      return;
    }
    over(s, [&](int64_t n, int64_t offset, int64_t packed, int64_t width) {
      valid_.unpack(n, from + packed, to + offset, width, fill);
    });
  }

 private:
  // body(sample, offset in the tensor, offset among the packed, values to a position)
  template <class Body>
  void over(const Slice& s, const Body& body) const {
    const bool rows = g_.memory == Memory::rows;
    parallel(s.samples, s.channels * g_.s, [&](int64_t i) {
      const int64_t n = s.first_sample + i;
      const int64_t before = valid_.before(n) - valid_.before(s.first_sample);
      if (!rows) return body(n, n * g_.s * g_.c, before * g_.c, g_.c);
      for (int64_t c = 0; c < s.channels; ++c)
        body(n, (n * g_.c + s.first_channel + c) * g_.s, c * s.count + before, 1);
    });
  }

  const Geometry& g_;
  const Valid& valid_;
  int64_t tensors_, per_slice_, by_channel_;
};

template <class T>
void run(const Forward<T>& f) {
  f.geometry.memory == Memory::rows ? forward_rows(f) : forward_channels(f);
}

template <class T>
void run(const Backward<T>& b) {
  b.geometry.memory == Memory::rows ? backward_rows(b) : backward_channels(b);
}

Valid valid_of(const Tensor& mask, const Geometry& g) {
  STD_TORCH_CHECK(
      mask.scalar_type() == ScalarType::Bool && mask.is_contiguous() && mask.numel() == g.n * g.s,
      "truenorm: a mask must be a contiguous boolean tensor (N, *positions)");
  return Valid(static_cast<const bool*>(mask.const_data_ptr()), g.n, g.s);
}

template <class T>
T element(double value) {
  T narrow;
  table<T>(kernels()).narrow(&value, &narrow, 1);
  return narrow;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const Tensor& x, const Tensor& mask,
                                                   std::optional<Tensor> weight,
                                                   std::optional<Tensor> bias, int64_t num_groups,
                                                   double eps, double padding_value) {
  const Geometry g = geometry_of(x, {num_groups, 0, true});
  const Valid valid = valid_of(mask, g);
  const Tensor dense = laid_out(x, g), y = new_result(g, x.scalar_type());
  const int64_t statistics = g.num_statistics();
  const Tensor mean = empty(statistics, ScalarType::Double),
               var = empty(statistics, ScalarType::Double),
               count = empty(statistics, ScalarType::Double);
  double *const means = doubles(mean), *const vars = doubles(var), *const counts = doubles(count);
  with_type(x, [&]<class T>(T) {
    const Values<compute_t<T>> w(weight), b(bias);
    const T* const from = static_cast<const T*>(dense.const_data_ptr());
    T* const to = static_cast<T*>(y.mutable_data_ptr());
    const T padding = element<T>(padding_value);
    const Slices<T> slices(g, valid, 2);
    // one slice's valid values, side by side, to theirs of the result
    const auto normalize = [&](const Slice& s, const T* in, T* out) {
      const Geometry packed = slices.geometry(s);
      const int64_t first = slices.first_statistic(s);
      std::fill_n(counts + first, packed.num_statistics(), double(packed.values_per_statistic()));
      if (s.count == 0) {
        std::fill_n(means + first, packed.num_statistics(), 0.0);
        std::fill_n(vars + first, packed.num_statistics(), 0.0);
        return;
      }
      run(Forward<T>{packed, table<T>(kernels()), eps, in, out,
                     w.get() ? w.get() + s.first_channel : nullptr,
                     b.get() ? b.get() + s.first_channel : nullptr, means + first, vars + first,
                     false, false});
    };
    slices.each([&](const Slice& s, T* memory) {
      if (slices.row_by_row(s)) {
        slices.each_row(s,
                        [&](const Slice& row, int64_t at) { normalize(row, from + at, to + at); });
        slices.fill_rows(s, to, padding);
        return;
      }
      T* const out = slices.room(s, memory + s.channels * s.count, to);
      normalize(s, slices.pack(s, from, memory), out);
      slices.unpack(s, out, to, padding);
    });
  });
  return {y, mean, var, count};
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad, const Tensor& x, const Tensor& mask,
                                            const Tensor& mean, const Tensor& var,
                                            std::optional<Tensor> weight, int64_t num_groups,
                                            double eps, int64_t needs) {
  const Geometry g = geometry_of(x, {num_groups, 0, true});
  const Valid valid = valid_of(mask, g);
  const Tensor dense_x = laid_out(x, g), dense_grad = laid_out_like(x, grad, g);
  const Params params(x, weight, g, 0);
  const Tensor grad_x = needs & kInput ? new_result(g, x.scalar_type()) : empty(0, x.scalar_type());
  const Tensor of_weight = needs & kWeight ? params.gradient() : empty(0, params.type);
  const Tensor of_bias = needs & kBias ? params.gradient() : empty(0, params.type);
  const Values<double> m(mean), v(var);
  // batch statistics: one row of sums; else one of each sample, added in order
  const int64_t rows = g.over_batch() ? 1 : g.n;
  const auto weights = scratch<double>(rows * g.c), biases = scratch<double>(rows * g.c);
  with_type(x, [&]<class T>(T) {
    const Values<compute_t<T>> w(weight);
    const T* const from = static_cast<const T*>(dense_x.const_data_ptr());
    const T* const from_grad = static_cast<const T*>(dense_grad.const_data_ptr());
    T* const to = needs & kInput ? static_cast<T*>(grad_x.mutable_data_ptr()) : nullptr;
    const Slices<T> slices(g, valid, 3);
    const auto pull_back = [&](const Slice& s, const T* in_grad, const T* in, T* out) {
      const int64_t first = slices.first_statistic(s);
      const int64_t sums = (g.over_batch() ? 0 : s.first_sample) * g.c + s.first_channel;
      if (s.count == 0) {
        std::fill_n(weights.get() + sums, s.channels, 0.0);
        std::fill_n(biases.get() + sums, s.channels, 0.0);
        return;
      }
      const Geometry packed = slices.geometry(s);
      // one value is its own mean: its gradient is zero, not the rounding of what cancels
      const bool alone = packed.values_per_statistic() == 1;
      if (alone && out) std::fill_n(out, s.channels, element<T>(0.0));
      run(Backward<T>{packed, table<T>(kernels()), eps, in_grad, in, alone ? nullptr : out,
                      w.get() ? w.get() + s.first_channel : nullptr, m.get() + first,
                      v.get() + first, needs & kWeight ? weights.get() + sums : nullptr,
                      needs & kBias ? biases.get() + sums : nullptr, false, false});
    };
    slices.each([&](const Slice& s, T* memory) {
      if (slices.row_by_row(s)) {
        slices.each_row(s, [&](const Slice& row, int64_t at) {
          pull_back(row, from_grad + at, from + at, to ? to + at : nullptr);
        });
        if (to) slices.fill_rows(s, to, element<T>(0.0));
        return;
      }
      const int64_t values = s.channels * s.count;
      T* const out = to ? slices.room(s, memory + 2 * values, to) : nullptr;
      pull_back(s, slices.pack(s, from_grad, memory + values), slices.pack(s, from, memory), out);
      if (to) slices.unpack(s, out, to, element<T>(0.0));
    });
  });
  for (int64_t n = 1; n < rows; ++n)
    for (int64_t c = 0; c < g.c; ++c) {
      if (needs & kWeight) weights[c] += weights[n * g.c + c];
      if (needs & kBias) biases[c] += biases[n * g.c + c];
    }
  const auto store = [&](const Tensor& to, const double* sums) {
    with_type(to, [&]<class T>(T) {
      table<T>(kernels()).narrow(sums, static_cast<T*>(to.mutable_data_ptr()), g.c);
    });
  };
  if (needs & kWeight) store(of_weight, weights.get());
  if (needs & kBias) store(of_bias, biases.get());
  return {grad_x, of_weight, of_bias};
}

}  // namespace
}  // namespace truenorm

STABLE_TORCH_LIBRARY_IMPL(truenorm, CPU, m) {
  m.impl("masked_forward", TORCH_BOX(&truenorm::forward));
  m.impl("masked_backward", TORCH_BOX(&truenorm::backward));
}
