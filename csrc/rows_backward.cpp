// The backward of rows_forward.cpp: sums along each channel's runs, what they make of a group, and
// the gradients of input and parameters.
#include "rows.h"

namespace truenorm {
namespace {

// weight · sums, and what they make of one group: the coefficients of its gradient.
template <class T>
struct GroupGrad {
  double mean, rstd, mean_grad, mean_grad_x_hat;

  GroupGrad(const Backward<T>& b, int64_t statistic, double sum_grad, double sum_grad_x_hat)
      : mean(b.mean[statistic]), rstd(inverse_std(b.var[statistic], b.eps)) {
    const double count = double(b.geometry.values_per_statistic());
    mean_grad = b.geometry.centred ? sum_grad / count : 0.0;
    mean_grad_x_hat = sum_grad_x_hat / count;
  }
};

template <class T>
void grad_channel(const Backward<T>& b, const GroupGrad<T>& group, int64_t channel, int64_t offset,
                  int64_t count) {
  using A = compute_t<T>;
  const double weight = b.weight ? double(b.weight[channel]) : 1.0;
  const GradAffine<A> a(group.mean, group.rstd, weight, group.mean_grad, group.mean_grad_x_hat);
  b.kernels.grad_apply(b.grad + offset, b.x + offset, b.grad_x + offset, count, a.scale, a.hi,
                       a.rstd, a.slope, a.shift);
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
  if (len <= kPiece) {
    parallel(statistics, len, [&](int64_t i) {
      const double rstd = inverse_std(b.var[i], b.eps);
      for (int64_t run = i * per_group; run < (i + 1) * per_group; ++run)
        sums[run] =
            b.kernels.grad_sums(b.grad + run * g.s, b.x + run * g.s, 1, g.s, 0, b.mean[i], rstd);
      if (!b.grad_x) return;
      const GroupGrad<T> group = group_grad(i);
      for (int64_t k = 0; k < per_group; ++k) {
        const int64_t run = i * per_group + k;
        grad_channel(b, group, run % g.c, run * g.s, g.s);
      }
    });
  } else {
    // a run's pieces are summed by one thread in order; few long runs are cut further
    const int64_t pieces = ceil_div(g.s, kPiece);
    const auto partial = scratch<GradSums>(g.n * g.c * pieces);
    parallel(g.n * g.c * pieces, std::min(g.s, kPiece), [&](int64_t i) {
      const int64_t run = i / pieces, begin = i % pieces * kPiece;
      const int64_t offset = run * g.s + begin;
      partial[i] =
          b.kernels.grad_sums(b.grad + offset, b.x + offset, 1, std::min(kPiece, g.s - begin), 0,
                              b.mean[run / per_group], inverse_std(b.var[run / per_group], b.eps));
    });
    for (int64_t i = 0; i < g.n * g.c * pieces; ++i) {
      sums[i / pieces].grad += partial[i].grad;
      sums[i / pieces].grad_x_hat += partial[i].grad_x_hat;
    }
    if (b.grad_x) {
      parallel(g.n * g.c * pieces, std::min(g.s, kPiece), [&](int64_t i) {
        const int64_t run = i / pieces, begin = i % pieces * kPiece;
        grad_channel(b, group_grad(run / per_group), run % g.c, run * g.s + begin,
                     std::min(kPiece, g.s - begin));
      });
    }
  }
  param_grads(b, sums.get());
}

// One value per channel (LayerNorm, RMSNorm, GroupNorm of (N, C)): weight runs along the row.
template <class T>
void backward_elementwise(const Backward<T>& b) {
  using A = compute_t<T>;
  const Geometry& g = b.geometry;
  const int64_t statistics = g.num_statistics(), len = g.channels_per_group();
  const auto row_weight = [&](int64_t i, int64_t begin) {
    return b.weight ? b.weight + i % g.groups() * len + begin : nullptr;
  };
  if (b.grad_x) {
    const int64_t pieces = ceil_div(len, kPiece);
    const auto partial = scratch<GradSums>(pieces == 1 ? 1 : statistics * pieces);
    const auto sum_piece = [&](int64_t i, int64_t begin) {
      const int64_t offset = i * len + begin;
      return b.kernels.row_grad_sums(b.grad + offset, b.x + offset, std::min(kPiece, len - begin),
                                     b.mean[i], inverse_std(b.var[i], b.eps), row_weight(i, begin));
    };
    const auto write_piece = [&](int64_t i, int64_t begin, const GradSums& s) {
      const GroupGrad<T> group(b, i, s.grad, s.grad_x_hat);
      const GradAffine<A> a(group.mean, group.rstd, 1.0, group.mean_grad, group.mean_grad_x_hat);
      const int64_t offset = i * len + begin;
      b.kernels.grad_apply_row(b.grad + offset, b.x + offset, b.grad_x + offset,
                               std::min(kPiece, len - begin), row_weight(i, begin), a.hi, a.rstd,
                               a.slope, a.shift);
    };
    if (pieces == 1) {
      parallel(statistics, len, [&](int64_t i) { write_piece(i, 0, sum_piece(i, 0)); });
    } else {
      parallel(statistics * pieces, kPiece,
               [&](int64_t i) { partial[i] = sum_piece(i / pieces, i % pieces * kPiece); });
      parallel(statistics * pieces, kPiece, [&](int64_t i) {
        GradSums total;
        for (int64_t p = 0; p < pieces; ++p) {
          total.grad += partial[i / pieces * pieces + p].grad;
          total.grad_x_hat += partial[i / pieces * pieces + p].grad_x_hat;
        }
        write_piece(i / pieces, i % pieces * kPiece, total);
      });
    }
  }
  if (!b.grad_weight && !b.grad_bias) return;
  // columns over blocks of samples: at least 64 rows each, at most 64 blocks
  const int64_t block = std::max<int64_t>(64, ceil_div(g.n, 64));
  const int64_t blocks = ceil_div(g.n, block), width = 1024;
  const int64_t cuts = ceil_div(len, width);
  const auto rstd = scratch<double>(statistics);
  const auto mean = scratch<double>(statistics);
  for (int64_t n = 0; n < g.n; ++n)
    for (int64_t k = 0; k < g.groups(); ++k) {
      // group by group, so that a column's statistics of neighbouring samples are neighbours
      mean[k * g.n + n] = b.mean[n * g.groups() + k];
      rstd[k * g.n + n] = inverse_std(b.var[n * g.groups() + k], b.eps);
    }
  const auto weight_part = scratch<double>(blocks * g.c), bias_part = scratch<double>(blocks * g.c);
  parallel(blocks * g.groups() * cuts, block * std::min(len, width), [&](int64_t i) {
    const int64_t cut = i % cuts, group = i / cuts % g.groups(), part = i / cuts / g.groups();
    const int64_t column = group * len + cut * width, row = part * block;
    b.kernels.row_param_sums(b.grad + row * g.c + column, b.x + row * g.c + column,
                             std::min(block, g.n - row), std::min(width, len - cut * width), g.c,
                             mean.get() + group * g.n + row, rstd.get() + group * g.n + row,
                             bias_part.get() + part * g.c + column,
                             weight_part.get() + part * g.c + column);
  });
  for (int64_t c = 0; c < g.c; ++c) {
    double weight = 0.0, bias = 0.0;
    for (int64_t p = 0; p < blocks; ++p) {
      weight += weight_part[p * g.c + c];
      bias += bias_part[p * g.c + c];
    }
    if (b.grad_weight) b.grad_weight[c] = weight;
    if (b.grad_bias) b.grad_bias[c] = bias;
  }
}

template <class T>
void backward_batch(const Backward<T>& b) {
  using A = compute_t<T>;
  const Geometry& g = b.geometry;
  const auto sums = scratch<GradSums>(g.c);
  const bool needs_sums = b.grad_weight || b.grad_bias || !b.fixed;
  if (needs_sums) {
    const BatchCut cut(g);
    const auto rstd = scratch<double>(g.c);
    for (int64_t c = 0; c < g.c; ++c) rstd[c] = inverse_std(b.var[c], b.eps);
    const auto partial = scratch<GradSums>(cut.count() * g.c);
    over_batch(g, cut,
               [&](int64_t index, int64_t channel, int64_t offset, int64_t runs, int64_t len) {
                 partial[index] = b.kernels.grad_sums(b.grad + offset, b.x + offset, runs, len,
                                                      g.c * g.s, b.mean[channel], rstd[channel]);
               });
    for (int64_t c = 0; c < g.c; ++c) {
      for (int64_t p = 0; p < cut.count(); ++p) {
        sums[c].grad += partial[c * cut.count() + p].grad;
        sums[c].grad_x_hat += partial[c * cut.count() + p].grad_x_hat;
      }
      if (b.grad_weight) b.grad_weight[c] = sums[c].grad_x_hat;
      if (b.grad_bias) b.grad_bias[c] = sums[c].grad;
    }
  }
  if (!b.grad_x) return;
  const int64_t pieces = ceil_div(g.s, kPiece);
  parallel(g.n * g.c * pieces, std::min(g.s, kPiece), [&](int64_t i) {
    const int64_t run = i / pieces, begin = i % pieces * kPiece, c = run % g.c;
    const int64_t offset = run * g.s + begin, count = std::min(kPiece, g.s - begin);
    const double weight = b.weight ? double(b.weight[c]) : 1.0;
    if (b.fixed) {
      const A scale = A(inverse_std(b.var[c], b.eps) * weight);
      b.kernels.grad_scale(b.grad + offset, b.grad_x + offset, count, scale);
      return;
    }
    const GroupGrad<T> group(b, c, weight * sums[c].grad, weight * sums[c].grad_x_hat);
    grad_channel(b, group, c, offset, count);
  });
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
