// The backward of rows_forward.cpp: sums along each channel's runs, what they make of a group, and
// the gradients of input and parameters.
#include "rows.h"

namespace truenorm {
namespace {

// The gradient of what the activation is applied to, before it is first read.
template <class T>
void make_inner(const Backward<T>& b, int64_t statistic, int64_t channel, int64_t offset,
                int64_t runs, int64_t len, int64_t stride) {
  if (!b.inner) return;
  const Affine<T> by(b.mean[statistic], b.rstd(statistic), b.weight, b.bias, channel);
  for (int64_t run = 0, at = offset; run < runs; ++run, at += stride)
    b.kernels.act(b.inputs(at), b.inner + at, 1, len, &by, b.act, false);
}

template <class T>
void backward_groups(const Backward<T>& b) {
  using A = compute_t<T>;
  const Geometry& g = b.geometry;
  const int64_t statistics = g.num_statistics(), per_group = g.channels_per_group();
  const int64_t len = g.values_per_statistic();
  const auto own = scratch<GradSums>(b.sums ? 0 : g.n * g.c);
  GradSums* const sums = b.sums ? b.sums : own.get();
  const auto mean_grads = [&](int64_t i) {
    GradSums total;
    for (int64_t run = i * per_group; run < (i + 1) * per_group; ++run) {
      const double weight = b.weight_of(run % g.c);
      total.add({weight * sums[run].grad, weight * sums[run].grad_x_hat});
    }
    return b.mean_grads(i, total, double(len));
  };
  const int64_t pieces = ceil_div(g.s, kPiece);
  const auto begin = [&](int64_t p) { return p * kPiece; };
  const auto count = [&](int64_t p) { return std::min(kPiece, g.s - begin(p)); };
  const auto of_piece = [&](int64_t run, int64_t p) {
    const int64_t offset = run * g.s + begin(p), i = run / per_group;
    make_inner(b, i, run % g.c, offset, 1, count(p), 0);
    if (!b.summing()) return GradSums{};
    return b.kernels.grad_sums(b.norm_grad() + offset, b.x + offset, 1, count(p), 0, b.mean[i],
                               b.rstd(i));
  };
  const auto write = [&](int64_t run, int64_t p, const GradSums& means) {
    const GradAffine<A> by = b.affine(run / per_group, b.weight_of(run % g.c), means);
    grad_runs(b, run * g.s + begin(p), 1, count(p), &by);
  };
  const bool in_cache = 2 * len * int64_t(sizeof(T)) <= kInCache;
  if (len <= kPiece || (in_cache && busy(statistics))) {
    parallel(statistics, len, [&](int64_t i) {
      for (int64_t run = i * per_group; run < (i + 1) * per_group; ++run)
        for (int64_t p = 0; p < pieces; ++p) sums[run].add(of_piece(run, p));
      if (!b.grad_x) return;
      const GradSums means = mean_grads(i);
      for (int64_t run = (i + 1) * per_group - 1; run >= i * per_group; --run)
        for (int64_t p = pieces - 1; p >= 0; --p) write(run, p, means);
    });
    return;
  }
  // a run's pieces are summed by one thread in order; few long runs are cut further
  const auto partial = scratch<GradSums>(g.n * g.c * pieces);
  parallel(g.n * g.c * pieces, std::min(g.s, kPiece),
           [&](int64_t i) { partial[i] = of_piece(i / pieces, i % pieces); });
  for (int64_t i = 0; i < g.n * g.c * pieces; ++i) sums[i / pieces].add(partial[i]);
  if (!b.grad_x) return;
  parallel<true>(g.n * g.c * pieces, std::min(g.s, kPiece), [&](int64_t i) {
    const int64_t run = i / pieces;
    write(run, i % pieces, mean_grads(run / per_group));
  });
}

// One statistic per channel over the batch. A channel that fits in cache is read from memory once.
template <class T>
void backward_batch(const Backward<T>& b) {
  using A = compute_t<T>;
  const Geometry& g = b.geometry;
  const auto affine = scratch<GradAffine<A>>(g.c);
  const BatchCut cut(g);
  const auto sums = [&](int64_t channel, int64_t part) {
    return of_part(g, cut, channel, part, [&](int64_t offset, int64_t runs, int64_t len) {
      make_inner(b, channel, channel, offset, runs, len, g.c * g.s);
      return b.kernels.grad_sums(b.norm_grad() + offset, b.x + offset, runs, len, g.c * g.s,
                                 b.mean[channel], b.rstd(channel));
    });
  };
  const auto set_affine = [&](int64_t channel, const GradSums& total) {
    const double w = b.weight_of(channel);
    const GradSums weighted{w * total.grad, w * total.grad_x_hat};
    affine[channel] =
        b.affine(channel, w, b.mean_grads(channel, weighted, double(g.values_per_statistic())));
  };
  const auto add = [&](int64_t channel, const auto& of_part) {
    GradSums total;
    for (int64_t part = 0; part < cut.count(); ++part) total.add(of_part(part));
    if (b.sums) b.sums[channel] = total;
    set_affine(channel, total);
  };
  const bool summing = b.summing();
  const auto apply = [&](int64_t channel, int64_t offset, int64_t runs, int64_t len) {
    if (!summing)
      for (int64_t run = 0; run < runs; ++run)
        make_inner(b, channel + run, channel + run, offset + run * len, 1, len, 0);
    if (b.grad_x) grad_runs(b, offset, runs, len, affine.get() + channel);
  };
  if (const int64_t channels = summing && b.grad_x ? channels_in_cache<T>(g, 2) : 0) {
    over_channels(g, channels, [&](int64_t first, int64_t count) {
      for (int64_t c = first; c < first + count; ++c)
        add(c, [&](int64_t part) { return sums(c, part); });
      for (int64_t n = g.n - 1; n >= 0; --n) apply(first, (n * g.c + first) * g.s, count, g.s);
    });
    return;
  }
  if (summing)
    over_batch<GradSums>(g, cut, sums, add);
  else
    for (int64_t c = 0; c < g.c; ++c) set_affine(c, {});
  if (b.grad_x || (b.inner && !summing)) over_runs(g, apply);
}

}  // namespace

template <class T>
void backward_rows(const Backward<T>& b) {
  if (b.geometry.over_batch() && gathers(b.geometry) && b.summing())
    backward_gathered(b);
  else if (b.geometry.over_batch())
    backward_batch(b);
  else if (b.geometry.s == 1)
    backward_elementwise(b);
  else if (b.geometry.s < kShortRuns)
    backward_short_runs(b);
  else
    backward_groups(b);
}

TN_EVERY_TYPE(backward_rows, Backward)

}  // namespace truenorm
