// The backward of groups whose channels have short runs: the sums of several runs side by side, and
// several runs written by one call.
#include "rows.h"

namespace truenorm {
namespace {

// A value of each of kRunsTogether neighbouring runs, or fewer.
using OfRuns = double[kRunsTogether];

template <class T>
class ShortRuns {
 public:
  ShortRuns(const Backward<T>& b, GradSums* sums)
      : b_(b), g_(b.geometry), per_group_(g_.channels_per_group()), sums_(sums) {}

  // Of the runs [first, end): the gradient of what the activation is applied to, and sums.
  void sum(int64_t first, int64_t end) const {
    if (b_.inner) make_inner(first, end);
    if (!b_.summing()) return;
    // another thread may write what follows in `inner`
    const int64_t readable = (b_.inner ? end : g_.n * g_.c) * g_.s;
    some_at_a_time(first, end, [&](int64_t run, int64_t runs) {
      OfRuns means, rstds, grads, grads_x_hat;
      const double *mean = b_.mean + run, *rstd = b_.rstds + run;
      if (per_group_ > 1) {
        by_group(run, runs, [&](int64_t i, int64_t, int64_t j, int64_t count) {
          std::fill_n(means + j, count, b_.mean[i]);
          std::fill_n(rstds + j, count, b_.rstds[i]);
        });
        mean = means, rstd = rstds;
      }
      for (int64_t j = 0; j < runs; j += kRowsTogether) {
        const int64_t offset = (run + j) * g_.s;
        b_.kernels.row_grad_sums(b_.norm_grad() + offset, b_.x + offset,
                                 std::min<int64_t>(kRowsTogether, runs - j), g_.s, g_.s,
                                 readable - offset, mean + j, rstd + j, nullptr,
                                 {grads + j, grads_x_hat + j}, nullptr, nullptr);
      }
      for (int64_t j = 0; j < runs; ++j) sums_[run + j] = {grads[j], grads_x_hat[j]};
    });
  }

  // What the sums make of the groups [first, end), for `means` of each.
  void add_up(int64_t first, int64_t end, const RowSums& means) const {
    const int64_t groups = end - first;
    const double count = double(g_.values_per_statistic());
    std::fill_n(means.grad, groups, 0.0);
    std::fill_n(means.grad_x_hat, groups, 0.0);
    if (b_.by_sums())
      by_group(first * per_group_, groups * per_group_,
               [&](int64_t i, int64_t channel, int64_t j, int64_t runs) {
                 double grad = 0.0, grad_x_hat = 0.0;
                 for (int64_t k = 0; k < runs; ++k) {
                   const GradSums& of = sums_[first * per_group_ + j + k];
                   const double weight = b_.weight_of(channel + k);
                   grad += weight * of.grad, grad_x_hat += weight * of.grad_x_hat;
                 }
                 means.grad[i - first] = grad, means.grad_x_hat[i - first] = grad_x_hat;
               });
    for (int64_t j = 0; j < groups; ++j) {
      const GradSums mean = b_.mean_grads(first + j, {means.grad[j], means.grad_x_hat[j]}, count);
      means.grad[j] = mean.grad, means.grad_x_hat[j] = mean.grad_x_hat;
    }
  }

  // grad_x of the runs [first, end), means being those of the first one's group and what follows
  void write(int64_t first, int64_t end, const RowSums& means) const {
    const int64_t group = first / per_group_;
    if (b_.fixed) return scale(first, end);
    some_at_a_time(first, end, [&](int64_t run, int64_t runs) {
      OfRuns mean, rstd, weight, grads, grads_x_hat;
      RunTerms of = {b_.mean + run, b_.rstds + run, weight, means.from(run - group)};
      if (per_group_ > 1) of = {mean, rstd, weight, {grads, grads_x_hat}};
      by_group(run, runs, [&](int64_t i, int64_t channel, int64_t j, int64_t count) {
        for (int64_t k = 0; k < count; ++k) weight[j + k] = b_.weight_of(channel + k);
        if (per_group_ == 1) return;
        std::fill_n(mean + j, count, b_.mean[i]);
        std::fill_n(rstd + j, count, b_.rstds[i]);
        std::fill_n(grads + j, count, means.grad[i - group]);
        std::fill_n(grads_x_hat + j, count, means.grad_x_hat[i - group]);
      });
      const int64_t at = run * g_.s;
      b_.kernels.grad_apply_runs(b_.norm_grad() + at, b_.x + at, b_.grad_x + at, runs, g_.s, of,
                                 b_.stream);
      fence(b_.stream);
    });
  }

 private:
  // body(first, runs)
  template <class Body>
  static void some_at_a_time(int64_t first, int64_t end, const Body& body) {
    for (int64_t run = first; run < end; run += kRunsTogether)
      body(run, std::min(kRunsTogether, end - run));
  }

  // body(statistic, first channel, where it is among the runs, runs) of each group
  template <class Body>
  void by_group(int64_t run, int64_t runs, const Body& body) const {
    int64_t i = run / per_group_, channel = run % g_.c;
    for (int64_t j = 0; j < runs; ++i) {
      const int64_t count = std::min((i + 1) * per_group_ - run, runs) - j;
      body(i, channel, j, count);
      j += count, channel += count;
      if (channel == g_.c) channel = 0;
    }
  }

  // grad_x where the statistics do not depend on x
  void scale(int64_t first, int64_t end) const {
    some_at_a_time(first, end, [&](int64_t run, int64_t runs) {
      GradAffine<compute_t<T>> by[kRunsTogether];
      by_group(run, runs, [&](int64_t i, int64_t channel, int64_t j, int64_t count) {
        for (int64_t k = 0; k < count; ++k) by[j + k] = b_.affine(i, b_.weight_of(channel + k), {});
      });
      grad_runs(b_, run * g_.s, runs, g_.s, by);
    });
  }

  void make_inner(int64_t first, int64_t end) const {
    some_at_a_time(first, end, [&](int64_t run, int64_t runs) {
      Affine<T> by[kRunsTogether];
      by_group(run, runs, [&](int64_t i, int64_t channel, int64_t j, int64_t count) {
        for (int64_t k = 0; k < count; ++k)
          by[j + k] = Affine<T>(b_.mean[i], b_.rstds[i], b_.weight, b_.bias, channel + k);
      });
      const int64_t at = run * g_.s;
      b_.kernels.act(b_.inputs(at), b_.inner + at, runs, g_.s, by, b_.act, false);
    });
  }

  const Backward<T>& b_;
  const Geometry& g_;
  const int64_t per_group_;
  GradSums* const sums_;
};

}  // namespace

template <class T>
void backward_short_runs(const Backward<T>& given) {
  const Geometry& g = given.geometry;
  const auto rstds = rstds_of(given);
  Backward<T> b = given;
  b.rstds = rstds.get();
  const int64_t groups = g.num_statistics(), per_group = g.channels_per_group();
  const int64_t len = g.values_per_statistic(), runs = g.n * g.c;
  const auto own = scratch<GradSums>(b.sums ? 0 : runs);
  const ShortRuns<T> all(b, b.sums ? b.sums : own.get());
  if (len <= kPiece || (2 * len * int64_t(sizeof(T)) <= kInCache && busy(groups))) {
    constexpr int64_t kNear = 2048, kMost = 256;  // values that are still in L1 for the second pass
    const int64_t together = std::clamp<int64_t>(kNear / len, 1, kMost);
    return parallel(ceil_div(groups, together), together * len, [&](int64_t i) {
      const int64_t first = i * together, end = std::min(groups, first + together);
      all.sum(first * per_group, end * per_group);
      if (!b.grad_x) return;
      double grads[kMost], grads_x_hat[kMost];
      all.add_up(first, end, {grads, grads_x_hat});
      all.write(first * per_group, end * per_group, {grads, grads_x_hat});
    });
  }
  const int64_t together = kPiece / g.s, tasks = ceil_div(runs, together);
  const auto end = [&](int64_t i) { return std::min(runs, (i + 1) * together); };
  parallel(tasks, kPiece, [&](int64_t i) { all.sum(i * together, end(i)); });
  if (!b.grad_x) return;
  const auto memory = scratch<double>(2 * groups);
  const RowSums means = {memory.get(), memory.get() + groups};
  all.add_up(0, groups, means);
  parallel<true>(tasks, kPiece, [&](int64_t i) {
    all.write(i * together, end(i), means.from(i * together / per_group));
  });
}

TN_EVERY_TYPE(backward_short_runs, Backward)

}  // namespace truenorm
