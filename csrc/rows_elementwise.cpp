// The backward of one value per channel (LayerNorm, RMSNorm, GroupNorm of (N, C)): each group of a
// sample is one row, and weight runs along it.
#include "rows.h"

namespace truenorm {
namespace {

// The gradient of the input, row by row.
template <class T>
class Rows {
 public:
  explicit Rows(const Backward<T>& b)
      : b_(b), len_(b.geometry.channels_per_group()), pieces_(ceil_div(len_, kPiece)) {}

  int64_t pieces() const { return pieces_; }
  GradSums sum(int64_t i, int64_t p) const {
    const int64_t offset = i * len_ + p * kPiece;
    make_inner(i, p);
    if (!b_.by_sums() || b_.skips(i)) return {};
    return b_.kernels.row_grad_sums(b_.norm_grad() + offset, b_.x + offset, count(p), b_.mean[i],
                                    b_.rstd(i), weight(i, p));
  }
  // the gradient of what the activation is applied to, before it is first read
  void make_inner(int64_t i, int64_t p) const {
    if (!b_.inner) return;
    const int64_t offset = i * len_ + p * kPiece;
    if (b_.skips(i)) return fill_values(b_.inner + offset, count(p), T{});
    const RowAffine<T> by(b_.mean[i], b_.rstd(i), of(b_.weight, i, p), of(b_.bias, i, p),
                          b_.rounds);
    b_.kernels.act_row(b_.inputs(offset), b_.inner + offset, count(p), by, b_.act, false);
  }
  void write(int64_t i, int64_t p, const GradSums& s) const {
    const int64_t offset = i * len_ + p * kPiece;
    if (b_.skips(i)) return fill_values(b_.grad_x + offset, count(p), T{});
    const auto a = b_.affine(i, 1.0, b_.mean_grads(i, s, double(len_)));
    b_.kernels.grad_apply_row(b_.norm_grad() + offset, b_.x + offset, b_.grad_x + offset, count(p),
                              weight(i, p), a, b_.stream);
    fence(b_.stream);
  }

 private:
  int64_t count(int64_t p) const { return std::min(kPiece, len_ - p * kPiece); }
  const compute_t<T>* of(const compute_t<T>* parameter, int64_t i, int64_t p) const {
    return parameter ? parameter + i % b_.geometry.groups() * len_ + p * kPiece : nullptr;
  }
  const compute_t<T>* weight(int64_t i, int64_t p) const { return of(b_.weight, i, p); }

  const Backward<T>& b_;
  int64_t len_, pieces_;
};

template <class T>
void grad_long_rows(const Backward<T>& b, const Rows<T>& rows) {
  const int64_t statistics = b.geometry.num_statistics(), pieces = rows.pieces();
  const auto partial = scratch<GradSums>(statistics * pieces);
  parallel(statistics * pieces, kPiece,
           [&](int64_t i) { partial[i] = rows.sum(i / pieces, i % pieces); });
  parallel<true>(statistics * pieces, kPiece, [&](int64_t i) {
    GradSums total;
    for (int64_t p = 0; p < pieces; ++p) total.add(partial[i / pieces * pieces + p]);
    rows.write(i / pieces, i % pieces, total);
  });
}

// The gradients of weight and bias: columns, summed over blocks of samples.
template <class T>
class Columns {
 public:
  explicit Columns(const Backward<T>& b)
      : b_(b),
        block_(std::max<int64_t>(64, ceil_div(b.geometry.n, 64))),
        blocks_(ceil_div(b.geometry.n, block_)),
        weight_(scratch<double>(blocks_ * b.geometry.c)),
        bias_(scratch<double>(blocks_ * b.geometry.c)) {
    const Geometry& g = b.geometry;
    if (g.groups() == 1) {
      mean_ = b.mean;
      rstd_ = b.rstds;
      return;
    }
    const int64_t statistics = g.num_statistics();
    by_group_ = scratch<double>(2 * statistics);
    double* const mean = by_group_.get();
    double* const rstd = mean + statistics;
    for (int64_t n = 0; n < g.n; ++n)
      for (int64_t k = 0; k < g.groups(); ++k) {
        // group by group, so that a column's statistics of neighbouring samples are neighbours
        mean[k * g.n + n] = b.mean[n * g.groups() + k];
        rstd[k * g.n + n] = b.rstd(n * g.groups() + k);
      }
    mean_ = mean;
    rstd_ = rstd;
  }

  int64_t blocks() const { return blocks_; }
  int64_t first(int64_t block) const { return block * block_; }
  int64_t last(int64_t block) const { return std::min(b_.geometry.n, first(block) + block_); }

  // Columns [begin, end) of a group, over samples [from, to) of a block. A block's samples may come
  // in several calls, in order, each but the last with a multiple of eight: the same bits.
  void add(int64_t block, int64_t group, int64_t begin, int64_t end, int64_t from,
           int64_t to) const {
    const Geometry& g = b_.geometry;
    const int64_t column = group * g.channels_per_group() + begin;
    double* const bias = bias_.get() + block * g.c + column;
    double* const weight = weight_.get() + block * g.c + column;
    if (from == first(block)) {
      std::fill(bias, bias + (end - begin), 0.0);
      std::fill(weight, weight + (end - begin), 0.0);
    }
    over_valid(first(block), from, to, [&](int64_t n, int64_t samples) {
      b_.kernels.row_param_sums(b_.norm_grad() + n * g.c + column, b_.x + n * g.c + column, samples,
                                end - begin, g.c, mean_ + group * g.n + n, rstd_ + group * g.n + n,
                                bias, weight);
    });
  }

  void store() const {
    const int64_t channels = b_.geometry.c;
    for (int64_t c = 0; c < channels; ++c) {
      double weight = 0.0, bias = 0.0;
      for (int64_t p = 0; p < blocks_; ++p) {
        weight += weight_[p * channels + c];
        bias += bias_[p * channels + c];
      }
      b_.sums[c] = {bias, weight};
    }
  }

 private:
  // body(sample, samples) for what counts of [from, to). The kernel goes by eights: a run that does
  // not begin with one ends with it, so that the bits do not depend on where a block is cut.
  template <class Body>
  void over_valid(int64_t first, int64_t from, int64_t to, const Body& body) const {
    if (!b_.rows) return body(from, to - from);
    for (int64_t n = from, end; n < to; n = end) {
      end = n + 1;
      if (!b_.rows[n]) continue;
      const int64_t past = (n - first) % 8, stop = past ? std::min(to, n + 8 - past) : to;
      while (end < stop && b_.rows[end]) ++end;
      body(n, end - n);
    }
  }

  const Backward<T>& b_;
  int64_t block_, blocks_;
  const double *mean_, *rstd_;
  std::unique_ptr<double[]> by_group_, weight_, bias_;
};

// What each sample adds to them: its values are one to a channel.
template <class T>
void sums_of_samples(const Backward<T>& b, const Rows<T>& rows) {
  const Geometry& g = b.geometry;
  const int64_t len = g.channels_per_group();
  parallel(g.num_statistics(), len, [&](int64_t i) {
    for (int64_t p = 0; p < rows.pieces(); ++p) rows.make_inner(i, p);
    if (b.skips(i)) return;
    for (int64_t at = i * len; at < (i + 1) * len; ++at)
      b.sums[at] = b.kernels.grad_sums(b.norm_grad() + at, b.x + at, 1, 1, 0, b.mean[i], b.rstd(i));
  });
}

}  // namespace

template <class T>
void backward_elementwise(const Backward<T>& given) {
  const Geometry& g = given.geometry;
  const int64_t statistics = g.num_statistics(), len = g.channels_per_group();
  // a row asks for it up to three times, and a root and a division side by side take less time
  const auto rstds = scratch<double>(statistics);
  constexpr int64_t kSome = 512;
  parallel(ceil_div(statistics, kSome), kSome, [&](int64_t i) {
    const int64_t end = std::min(statistics, (i + 1) * kSome);
    for (int64_t at = i * kSome; at < end; ++at) rstds[at] = inverse_std(given.var[at], given.eps);
  });
  Backward<T> b = given;
  b.rstds = rstds.get();
  const bool params = b.sums != nullptr;
  const Rows<T> rows(b);
  if (b.each_sample) return sums_of_samples(b, rows);
  if (b.inner && !b.grad_x)
    parallel(statistics * rows.pieces(), std::min(len, kPiece),
             [&](int64_t i) { rows.make_inner(i / rows.pieces(), i % rows.pieces()); });
  if (b.grad_x && rows.pieces() > 1) grad_long_rows(b, rows);
  const bool short_rows = b.grad_x && rows.pieces() == 1;
  if (!params) {
    if (short_rows) parallel(statistics, len, [&](int64_t i) { rows.write(i, 0, rows.sum(i, 0)); });
    return;
  }
  const Columns<T> columns(b);
  if (short_rows && busy(columns.blocks())) {
    // a few samples at a time, while both passes find them in cache
    const int64_t fit = kInCache / 2 / (2 * g.c * int64_t(sizeof(T)));
    const int64_t step = std::max<int64_t>(8, fit / 8 * 8);
    parallel(columns.blocks(), 64 * g.c, [&](int64_t block) {
      for (int64_t n = columns.first(block); n < columns.last(block); n += step) {
        const int64_t end = std::min(columns.last(block), n + step);
        for (int64_t i = n * g.groups(); i < end * g.groups(); ++i)
          rows.write(i, 0, rows.sum(i, 0));
        for (int64_t k = 0; k < g.groups(); ++k) columns.add(block, k, 0, len, n, end);
      }
    });
  } else {
    if (short_rows) parallel(statistics, len, [&](int64_t i) { rows.write(i, 0, rows.sum(i, 0)); });
    constexpr int64_t width = 1024;
    const int64_t cuts = ceil_div(len, width);
    parallel(columns.blocks() * g.groups() * cuts, 64 * std::min(len, width), [&](int64_t i) {
      const int64_t begin = i % cuts * width, block = i / cuts / g.groups();
      columns.add(block, i / cuts % g.groups(), begin, std::min(len, begin + width),
                  columns.first(block), columns.last(block));
    });
  }
  columns.store();
}

TN_EVERY_TYPE(backward_elementwise, Backward)

}  // namespace truenorm
