// What forward and backward of memory [N, C, S] share: how a channel is cut over the batch.
#pragma once

#include "layers.h"
#include "parallel.h"

namespace truenorm {

// How the values of one channel over the whole batch are cut: blocks of neighbouring samples where
// a channel's run is short, pieces of a run where it is long.
struct BatchCut {
  int64_t samples_per_block, blocks, pieces;

  explicit BatchCut(const Geometry& g)
      : samples_per_block(std::clamp<int64_t>(kPiece / g.s, 1, g.n)),
        blocks(ceil_div(g.n, samples_per_block)),
        pieces(ceil_div(g.s, kPiece)) {}

  int64_t count() const { return blocks * pieces; }
};

// body(index of the part, channel, offset, samples, values of a run) for every part.
template <class Body>
void over_batch(const Geometry& g, const BatchCut& cut, const Body& body) {
  // neighbouring tasks are neighbouring channels, so that threads walk through memory
  parallel(cut.count() * g.c, cut.samples_per_block * std::min(g.s, kPiece), [&](int64_t i) {
    const int64_t channel = i % g.c, part = i / g.c;
    const int64_t first = part / cut.pieces * cut.samples_per_block;
    const int64_t begin = part % cut.pieces * kPiece;
    body(channel * cut.count() + part, channel, (first * g.c + channel) * g.s + begin,
         std::min(cut.samples_per_block, g.n - first), std::min(kPiece, g.s - begin));
  });
}

// body(channel, offset, runs, values of a run) for neighbouring channels of a sample whose runs are
// short, and for the pieces of a run that is long. Backwards: what was read last comes first.
template <class Body>
void over_runs(const Geometry& g, const Body& body) {
  const int64_t pieces = ceil_div(g.s, kPiece);
  const int64_t per_task = std::clamp<int64_t>(kPiece / g.s, 1, g.c);
  const int64_t tasks = ceil_div(g.c, per_task);
  parallel<true>(g.n * tasks * pieces, std::min(g.c * g.s, kPiece), [&](int64_t i) {
    const int64_t begin = i % pieces * kPiece, sample = i / pieces / tasks;
    const int64_t channel = i / pieces % tasks * per_task;
    body(channel, (sample * g.c + channel) * g.s + begin, std::min(per_task, g.c - channel),
         std::min(kPiece, g.s - begin));
  });
}

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
void backward_elementwise(const Backward<T>& b);

}  // namespace truenorm
