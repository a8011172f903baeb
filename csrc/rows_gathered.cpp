// Batch statistics of few samples whose channels have short runs: some channels at a time are
// gathered, all of a channel's runs in one row, so that several rows are summed side by side; what
// follows is made of many runs by one call.
#include "rows.h"

namespace truenorm {
namespace {

// Neighbouring channels of a batch.
struct Channels {
  int64_t first, count;
};

template <class Body>
void over_some(const Geometry& g, const Body& body) {
  constexpr int64_t kValues = 8192;  // of a tensor, which then is still near for the second pass
  const int64_t fit = kValues / (g.n * g.s) / kRowsTogether * kRowsTogether;
  const int64_t together = std::clamp<int64_t>(fit, kRowsTogether, kRunsTogether);
  parallel(ceil_div(g.c, together), together * g.n * g.s, [&](int64_t i) {
    body(Channels{i * together, std::min(together, g.c - i * together)});
  });
}

// body(offset) for each sample, where the channels' runs follow one another.
template <class Body>
void over_samples(const Geometry& g, const Channels& some, const Body& body) {
  for (int64_t n = 0; n < g.n; ++n) body((n * g.c + some.first) * g.s);
}

template <class T>
class Gathered {
 public:
  Gathered(const Geometry& g, const Channels& some, const T* from)
      : len_(g.n * g.s), count_(some.count), values_(scratch<T>(count_ * len_ + kBlock)) {
    const int64_t sample = g.c * g.s, all = g.n * sample;
    T* to = values_.get();
    for (int64_t c = 0; c < count_; ++c) {
      // what follows these channels another thread may write
      const bool inside = (count_ - c) * g.s >= g.s + kBlock;
      for (int64_t at = (some.first + c) * g.s; at < all; at += sample, to += g.s)
        if (inside)
          copy_more(from + at, to, g.s);
        else
          std::memcpy(to, from + at, size_t(g.s) * sizeof(T));
    }
  }

  const T* row(int64_t i) const { return values_.get() + i * len_; }
  int64_t readable(int64_t from) const { return (count_ - from) * len_; }

 private:
  static constexpr int64_t kBlock = 32 / int64_t(sizeof(T));

  // What is copied past a run's end the next one overwrites: a call for each run takes longer.
  static void copy_more(const T* from, T* to, int64_t count) {
    for (int64_t i = 0; i < count; i += kBlock)
      std::memcpy(to + i, from + i, size_t(kBlock) * sizeof(T));
  }

  int64_t len_, count_;
  std::unique_ptr<T[]> values_;
};

// body(row, rows), kRowsTogether at a time
template <class Body>
void rows_together(int64_t count, const Body& body) {
  for (int64_t i = 0; i < count; i += kRowsTogether)
    body(i, std::min<int64_t>(kRowsTogether, count - i));
}

}  // namespace

template <class T>
void forward_gathered(const Forward<T>& f) {
  const Geometry& g = f.geometry;
  over_some(g, [&](const Channels& some) {
    const Gathered<T> x(g, some, f.x);
    rows_together(some.count, [&](int64_t i, int64_t rows) {
      Moments of_rows[kRowsTogether];
      f.kernels.row_moments(x.row(i), rows, g.n * g.s, x.readable(i), true, of_rows);
      for (int64_t j = 0; j < rows; ++j) f.set(some.first + i + j, of_rows[j]);
    });
    if (!f.y) return;
    Affine<T> by[kRunsTogether];
    for (int64_t i = 0; i < some.count; ++i) {
      const int64_t c = some.first + i;
      by[i] = Affine<T>(f.mean[c], f.rstd(c), f.weight, f.bias, c);
    }
    over_samples(g, some, [&](int64_t at) { apply_runs(f, at, some.count, g.s, by); });
    fence(f.stream);
  });
}

template <class T>
void backward_gathered(const Backward<T>& b) {
  const Geometry& g = b.geometry;
  const double count = double(g.values_per_statistic());
  over_some(g, [&](const Channels& some) {
    const double* const mean = b.mean + some.first;
    double rstd[kRunsTogether], weight[kRunsTogether];
    for (int64_t i = 0; i < some.count; ++i) {
      rstd[i] = b.rstd(some.first + i);
      weight[i] = b.weight_of(some.first + i);
    }
    if (b.inner) {
      Affine<T> by[kRunsTogether];
      for (int64_t i = 0; i < some.count; ++i)
        by[i] = Affine<T>(mean[i], rstd[i], b.weight, b.bias, some.first + i);
      over_samples(g, some, [&](int64_t at) {
        b.kernels.act(b.inputs(at), b.inner + at, some.count, g.s, by, b.act, false);
      });
    }
    double grads[kRunsTogether], grads_x_hat[kRunsTogether];
    const Gathered<T> grad(g, some, b.norm_grad()), x(g, some, b.x);
    rows_together(some.count, [&](int64_t i, int64_t rows) {
      b.kernels.row_grad_sums(grad.row(i), x.row(i), rows, g.n * g.s, g.n * g.s, x.readable(i),
                              mean + i, rstd + i, nullptr, {grads + i, grads_x_hat + i}, nullptr,
                              nullptr);
    });
    for (int64_t i = 0; i < some.count && b.sums; ++i)
      b.sums[some.first + i] = {grads[i], grads_x_hat[i]};
    if (!b.grad_x) return;
    if (b.fixed) {
      GradAffine<compute_t<T>> by[kRunsTogether];
      for (int64_t i = 0; i < some.count; ++i) by[i] = b.affine(some.first + i, weight[i], {});
      return over_samples(g, some, [&](int64_t at) { grad_runs(b, at, some.count, g.s, by); });
    }
    for (int64_t i = 0; i < some.count; ++i) {
      const GradSums of =
          b.mean_grads(some.first + i, {weight[i] * grads[i], weight[i] * grads_x_hat[i]}, count);
      grads[i] = of.grad, grads_x_hat[i] = of.grad_x_hat;
    }
    over_samples(g, some, [&](int64_t at) {
      b.kernels.grad_apply_runs(b.norm_grad() + at, b.x + at, b.grad_x + at, some.count, g.s,
                                {mean, rstd, weight, {grads, grads_x_hat}}, b.stream);
    });
    fence(b.stream);
  });
}

TN_EVERY_TYPE(forward_gathered, Forward)
TN_EVERY_TYPE(backward_gathered, Backward)

}  // namespace truenorm
