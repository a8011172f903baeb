// The backward of rows_forward.cpp: sums along each channel's runs, what they make of a group, and
// the gradients of input and parameters.
#include "rows.h"

namespace truenorm {
namespace {

template <class T>
void grad_channel(const Backward<T>& b, const GroupGrad<T>& group, int64_t channel, int64_t offset,
                  int64_t count) {
  using A = compute_t<T>;
  const double weight = b.weight ? double(b.weight[channel]) : 1.0;
  const GradAffine<A> a(group.mean, group.rstd, weight, group.mean_grad, group.mean_grad_x_hat);
  b.kernels.grad_apply(b.norm_grad() + offset, b.x + offset, b.grad_x + offset, 1, count, &a,
                       b.stream);
  fence(b.stream);
}

// The gradient of what the activation is applied to, before it is first read.
template <class T>
void make_inner(const Backward<T>& b, int64_t statistic, int64_t channel, int64_t offset,
                int64_t runs, int64_t len, int64_t stride) {
  if (!b.inner) return;
  const Affine<T> by(b.mean[statistic], inverse_std(b.var[statistic], b.eps), b.weight, b.bias,
                     channel);
  for (int64_t run = 0, at = offset; run < runs; ++run, at += stride)
    b.kernels.act(b.inputs(at), b.inner + at, 1, len, &by, b.act, false);
}

// Weighted sums over the channels of a group, from each channel's own.
template <class T>
GradSums group_sums(const Backward<T>& b, int64_t statistic, const GradSums* of_channel) {
  const int64_t per_group = b.geometry.channels_per_group();
  const int64_t first_channel = statistic % b.geometry.groups() * per_group;
  GradSums total;
  for (int64_t k = 0; k < per_group; ++k) {
    const double weight = b.weight ? double(b.weight[first_channel + k]) : 1.0;
    total.grad += weight * of_channel[k].grad;
    total.grad_x_hat += weight * of_channel[k].grad_x_hat;
  }
  return total;
}

// Gradients of weight and bias from sums per sample and channel, samples added in order.
template <class T>
void param_grads(const Backward<T>& b, const GradSums* sums) {
  const Geometry& g = b.geometry;
  if (!b.grad_weight && !b.grad_bias) return;
  parallel(g.c, g.n, [&](int64_t c) {
    double weight = 0.0, bias = 0.0;
    for (int64_t n = 0; n < g.n; ++n) {
      weight += sums[n * g.c + c].grad_x_hat;
      bias += sums[n * g.c + c].grad;
    }
    if (b.grad_weight) b.grad_weight[c] = weight;
    if (b.grad_bias) b.grad_bias[c] = bias;
  });
}

template <class T>
void backward_groups(const Backward<T>& b) {
  const Geometry& g = b.geometry;
  const int64_t statistics = g.num_statistics(), per_group = g.channels_per_group();
  const int64_t len = g.values_per_statistic();
  const auto sums = scratch<GradSums>(g.n * g.c);
  const auto group_grad = [&](int64_t i) {
    const GradSums s = group_sums(b, i, sums.get() + i * per_group);
    return GroupGrad<T>(b, i, s.grad, s.grad_x_hat);
  };
  const int64_t pieces = ceil_div(g.s, kPiece);
  const auto begin = [&](int64_t p) { return p * kPiece; };
  const auto count = [&](int64_t p) { return std::min(kPiece, g.s - begin(p)); };
  const auto of_piece = [&](int64_t run, int64_t p) {
    const int64_t offset = run * g.s + begin(p), i = run / per_group;
    make_inner(b, i, run % g.c, offset, 1, count(p), 0);
    return b.kernels.grad_sums(b.norm_grad() + offset, b.x + offset, 1, count(p), 0, b.mean[i],
                               inverse_std(b.var[i], b.eps));
  };
  const bool in_cache = 2 * len * int64_t(sizeof(T)) <= kInCache;
  if (len <= kPiece || (in_cache && busy(statistics))) {
    parallel(statistics, len, [&](int64_t i) {
      for (int64_t run = i * per_group; run < (i + 1) * per_group; ++run)
        for (int64_t p = 0; p < pieces; ++p) sums[run].add(of_piece(run, p));
      if (!b.grad_x) return;
      const GroupGrad<T> group = group_grad(i);
      for (int64_t run = (i + 1) * per_group - 1; run >= i * per_group; --run)
        for (int64_t p = pieces - 1; p >= 0; --p)
          grad_channel(b, group, run % g.c, run * g.s + begin(p), count(p));
    });
  } else {
    // a run's pieces are summed by one thread in order; few long runs are cut further
    const auto partial = scratch<GradSums>(g.n * g.c * pieces);
    parallel(g.n * g.c * pieces, std::min(g.s, kPiece),
             [&](int64_t i) { partial[i] = of_piece(i / pieces, i % pieces); });
    for (int64_t i = 0; i < g.n * g.c * pieces; ++i) sums[i / pieces].add(partial[i]);
    if (b.grad_x) {
      parallel<true>(g.n * g.c * pieces, std::min(g.s, kPiece), [&](int64_t i) {
        const int64_t run = i / pieces, p = i % pieces;
        grad_channel(b, group_grad(run / per_group), run % g.c, run * g.s + begin(p), count(p));
      });
    }
  }
  param_grads(b, sums.get());
}

// One statistic per channel over the batch. A channel that fits in cache is read from memory once.
template <class T>
void backward_batch(const Backward<T>& b) {
  using A = compute_t<T>;
  const Geometry& g = b.geometry;
  const auto affine = scratch<GradAffine<A>>(g.c);
  const auto scale = scratch<A>(g.c);  // all that is left of it where the statistics are fixed
  const BatchCut cut(g);
  const auto sums = [&](int64_t channel, int64_t part) {
    return of_part(g, cut, channel, part, [&](int64_t offset, int64_t runs, int64_t len) {
      make_inner(b, channel, channel, offset, runs, len, g.c * g.s);
      return b.kernels.grad_sums(b.norm_grad() + offset, b.x + offset, runs, len, g.c * g.s,
                                 b.mean[channel], inverse_std(b.var[channel], b.eps));
    });
  };
  const auto set_affine = [&](int64_t channel, const GradSums& total) {
    const double w = b.weight ? double(b.weight[channel]) : 1.0;
    const GroupGrad<T> group(b, channel, w * total.grad, w * total.grad_x_hat);
    affine[channel] =
        GradAffine<A>(group.mean, group.rstd, w, group.mean_grad, group.mean_grad_x_hat);
    scale[channel] = affine[channel].scale;
  };
  const auto add = [&](int64_t channel, const auto& of_part) {
    GradSums total;
    for (int64_t part = 0; part < cut.count(); ++part) total.add(of_part(part));
    if (b.grad_weight) b.grad_weight[channel] = total.grad_x_hat;
    if (b.grad_bias) b.grad_bias[channel] = total.grad;
    set_affine(channel, total);
  };
  const bool summing = b.grad_weight || b.grad_bias || !b.fixed;
  const T* const grads = b.norm_grad();
  const auto apply = [&](int64_t channel, int64_t offset, int64_t runs, int64_t len) {
    if (!summing)
      for (int64_t run = 0; run < runs; ++run)
        make_inner(b, channel + run, channel + run, offset + run * len, 1, len, 0);
    if (!b.grad_x) return;
    if (b.fixed)
      b.kernels.grad_scale(grads + offset, b.grad_x + offset, runs, len, scale.get() + channel,
                           b.stream);
    else
      b.kernels.grad_apply(grads + offset, b.x + offset, b.grad_x + offset, runs, len,
                           affine.get() + channel, b.stream);
    fence(b.stream);
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
  if (b.geometry.over_batch())
    backward_batch(b);
  else if (b.geometry.s == 1)
    backward_elementwise(b);
  else
    backward_groups(b);
}

template void backward_rows<double>(const Backward<double>&);
template void backward_rows<float>(const Backward<float>&);
template void backward_rows<bf16>(const Backward<bf16>&);
template void backward_rows<f16>(const Backward<f16>&);

}  // namespace truenorm
