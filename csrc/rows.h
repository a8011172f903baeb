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

// body(offset, samples, values of a run) for one part of a channel.
template <class Body>
auto of_part(const Geometry& g, const BatchCut& cut, int64_t channel, int64_t part,
             const Body& body) {
  const int64_t first = part / cut.pieces * cut.samples_per_block;
  const int64_t begin = part % cut.pieces * kPiece;
  return body((first * g.c + channel) * g.s + begin, std::min(cut.samples_per_block, g.n - first),
              std::min(kPiece, g.s - begin));
}

// What body makes of every part of every channel, [C, parts], `add`ed up in order: total(channel).
template <class Sum, class Body, class Total>
void over_batch(const Geometry& g, const BatchCut& cut, const Body& body, const Total& total) {
  const auto partial = scratch<Sum>(cut.count() * g.c);
  // neighbouring tasks are neighbouring channels, so that threads walk through memory
  parallel(cut.count() * g.c, cut.samples_per_block * std::min(g.s, kPiece),
           [&](int64_t i) { partial[i % g.c * cut.count() + i / g.c] = body(i % g.c, i / g.c); });
  for (int64_t c = 0; c < g.c; ++c)
    total(c, [&](int64_t part) { return partial[c * cut.count() + part]; });
}

// Neighbouring channels that are one task, so that their second pass finds all their values over
// the batch in cache; 0 where they do not fit, or are too few tasks.
template <class T>
int64_t channels_in_cache(const Geometry& g, int64_t tensors) {
  constexpr int64_t kRun = 1024;  // values that lie side by side, for the prefetcher
  const int64_t fit = kInCache / (tensors * g.n * g.s * int64_t(sizeof(T)));
  if (fit == 0) return 0;
  const int64_t channels = std::clamp<int64_t>(ceil_div(kRun, g.s), 1, std::min(g.c, fit));
  return busy(ceil_div(g.c, channels)) ? channels : 0;
}

// body(first channel, channels) for every such task.
template <class Body>
void over_channels(const Geometry& g, int64_t channels, const Body& body) {
  parallel(ceil_div(g.c, channels), channels * g.n * g.s,
           [&](int64_t i) { body(i * channels, std::min(channels, g.c - i * channels)); });
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

// y of `runs` of neighbouring channels' values that follow one another.
template <class T>
void apply_runs(const Forward<T>& f, int64_t offset, int64_t runs, int64_t len,
                const Affine<T>* by) {
  if (f.acts())
    f.kernels.act(f.inputs(offset), f.y + offset, runs, len, by, f.act, f.stream);
  else
    f.kernels.apply(f.x + offset, f.y + offset, runs, len, by, f.stream);
}

// grad_x of the same.
template <class T>
void grad_runs(const Backward<T>& b, int64_t offset, int64_t runs, int64_t len,
               const GradAffine<compute_t<T>>* by) {
  const T* const grads = b.norm_grad() + offset;
  if (b.fixed)
    b.kernels.grad_scale(grads, b.grad_x + offset, runs, len, by, b.stream);
  else
    b.kernels.grad_apply(grads, b.x + offset, b.grad_x + offset, runs, len, by, b.stream);
  fence(b.stream);
}

// 1 / std of each statistic: what asks for it several times, or side by side, which takes less
// time.
template <class T>
std::unique_ptr<double[]> rstds_of(const Backward<T>& b) {
  const int64_t statistics = b.geometry.num_statistics();
  auto rstds = scratch<double>(statistics);
  constexpr int64_t kSome = 512;
  parallel(ceil_div(statistics, kSome), kSome, [&](int64_t i) {
    const int64_t end = std::min(statistics, (i + 1) * kSome);
    for (int64_t at = i * kSome; at < end; ++at) rstds[at] = inverse_std(b.var[at], b.eps);
  });
  return rstds;
}

template <class T>
void backward_elementwise(const Backward<T>& b);

// Values of a run below which several are summed side by side.
constexpr int64_t kShortRuns = 320;

template <class T>
void backward_short_runs(const Backward<T>& b);

template <class T>
void forward_gathered(const Forward<T>& f);
template <class T>
void backward_gathered(const Backward<T>& b);

}  // namespace truenorm
