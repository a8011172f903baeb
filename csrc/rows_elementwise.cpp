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
    return b_.kernels.row_grad_sums(b_.norm_grad() + offset, b_.x + offset, count(p), b_.mean[i],
                                    inverse_std(b_.var[i], b_.eps), weight(i, p));
  }
  // the gradient of what the activation is applied to, before it is first read
  void make_inner(int64_t i, int64_t p) const {
    if (!b_.inner) return;
    const int64_t offset = i * len_ + p * kPiece;
    const RowAffine<T> by(b_.mean[i], inverse_std(b_.var[i], b_.eps), of(b_.weight, i, p),
                          of(b_.bias, i, p));
    b_.kernels.act_row(b_.inputs(offset), b_.inner + offset, count(p), by, b_.act, false);
  }
  void write(int64_t i, int64_t p, const GradSums& s) const {
    const GroupGrad<T> group(b_, i, s.grad, s.grad_x_hat);
    const GradAffine<compute_t<T>> a(group.mean, group.rstd, 1.0, group.mean_grad,
                                     group.mean_grad_x_hat);
    const int64_t offset = i * len_ + p * kPiece;
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
        mean_(scratch<double>(b.geometry.num_statistics())),
        rstd_(scratch<double>(b.geometry.num_statistics())),
        weight_(scratch<double>(blocks_ * b.geometry.c)),
        bias_(scratch<double>(blocks_ * b.geometry.c)) {
    const Geometry& g = b.geometry;
    for (int64_t n = 0; n < g.n; ++n)
      for (int64_t k = 0; k < g.groups(); ++k) {
        // group by group, so that a column's statistics of neighbouring samples are neighbours
        mean_[k * g.n + n] = b.mean[n * g.groups() + k];
        rstd_[k * g.n + n] = inverse_std(b.var[n * g.groups() + k], b.eps);
      }
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
    b_.kernels.row_param_sums(b_.norm_grad() + from * g.c + column, b_.x + from * g.c + column,
                              to - from, end - begin, g.c, mean_.get() + group * g.n + from,
                              rstd_.get() + group * g.n + from, bias, weight);
  }

  void store() const {
    const int64_t channels = b_.geometry.c;
    for (int64_t c = 0; c < channels; ++c) {
      double weight = 0.0, bias = 0.0;
      for (int64_t p = 0; p < blocks_; ++p) {
        weight += weight_[p * channels + c];
        bias += bias_[p * channels + c];
      }
      if (b_.grad_weight) b_.grad_weight[c] = weight;
      if (b_.grad_bias) b_.grad_bias[c] = bias;
    }
  }

 private:
  const Backward<T>& b_;
  int64_t block_, blocks_;
  std::unique_ptr<double[]> mean_, rstd_, weight_, bias_;
};

}  // namespace

template <class T>
void backward_elementwise(const Backward<T>& b) {
  const Geometry& g = b.geometry;
  const int64_t statistics = g.num_statistics(), len = g.channels_per_group();
  const bool params = b.grad_weight || b.grad_bias;
  const Rows<T> rows(b);
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

template void backward_elementwise<double>(const Backward<double>&);
template void backward_elementwise<float>(const Backward<float>&);
template void backward_elementwise<bf16>(const Backward<bf16>&);
template void backward_elementwise<f16>(const Backward<f16>&);

}  // namespace truenorm
