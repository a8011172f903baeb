// The backward of one value per channel (LayerNorm, RMSNorm, GroupNorm of (N, C)): each group of a
// sample is one row, and weight runs along it.
#include "rows.h"

namespace truenorm {
namespace {

// A piece of up to kRowsTogether neighbouring samples' rows of one group.
struct Block {
  int64_t sample, count, group, piece;
};

// GradSums of its rows.
struct Sums {
  double grads[kRowsTogether], grads_x_hat[kRowsTogether];

  RowSums from(int64_t row) { return {grads + row, grads_x_hat + row}; }
};

template <class T>
class Rows {
 public:
  explicit Rows(const Backward<T>& b)
      : b_(b), len_(b.geometry.channels_per_group()), pieces_(ceil_div(len_, kPiece)) {}

  int64_t pieces() const { return pieces_; }

  // the gradient of what the activation is applied to, before it is first read
  void make_inner(const Block& block) const {
    if (!b_.inner) return;
    for (int64_t j = 0; j < block.count; ++j) {
      const int64_t i = statistic(block, j), at = offset(block, j), n = count(block);
      if (b_.skips(i)) {
        fill_values(b_.inner + at, n, T{});
        continue;
      }
      const RowAffine<T> by(b_.mean[i], b_.rstd(i), of(b_.weight, block), of(b_.bias, block),
                            b_.rounds);
      b_.kernels.act_row(b_.inputs(at), b_.inner + at, n, by, b_.act, false);
    }
  }

  // sums of each row, and, where these are given, those of the columns [begin, end) of the piece,
  // added to what is there
  void sum(const Block& block, Sums& of_rows, double* sum_grad, double* sum_grad_x_hat,
           int64_t begin, int64_t end) const {
    const Statistics of(*this, block);
    const compute_t<T>* const weight = this->of(b_.weight, block);
    const auto sums = b_.about_zero() && !b_.of_bias ? b_.kernels.row_grad_sums_about_zero
                                                     : b_.kernels.row_grad_sums;
    over_valid(block, [&](int64_t first, int64_t rows) {
      const int64_t at = offset(block, first) + begin;
      // another thread may write what follows in `inner`
      const int64_t own = (rows - 1) * b_.geometry.c + end - begin;
      sums(b_.norm_grad() + at, b_.x + at, rows, end - begin, b_.geometry.c,
           b_.inner ? own : b_.geometry.n * b_.geometry.c - at, of.mean + first, of.rstd + first,
           weight ? weight + begin : nullptr, of_rows.from(first), sum_grad, sum_grad_x_hat);
    });
  }
  void sum(const Block& block, Sums& of_rows, double* sum_grad = nullptr,
           double* sum_grad_x_hat = nullptr) const {
    if (sum_grad || b_.by_sums()) sum(block, of_rows, sum_grad, sum_grad_x_hat, 0, count(block));
  }

  // by the sums over whole rows
  void write(const Block& block, const Sums& of_rows) const {
    const int64_t n = count(block);
    Sums means;
    for (int64_t j = 0; j < block.count; ++j) {
      const int64_t i = statistic(block, j);
      const GradSums mean =
          b_.mean_grads(i, {of_rows.grads[j], of_rows.grads_x_hat[j]}, double(len_));
      means.grads[j] = mean.grad;
      means.grads_x_hat[j] = mean.grad_x_hat;
      if (b_.skips(i)) fill_values(b_.grad_x + offset(block, j), n, T{});
    }
    const Statistics of(*this, block);
    const auto apply =
        b_.about_zero() ? b_.kernels.grad_apply_rows_about_zero : b_.kernels.grad_apply_rows;
    over_valid(block, [&](int64_t first, int64_t rows) {
      const int64_t at = offset(block, first);
      apply(b_.norm_grad() + at, b_.x + at, b_.grad_x + at, rows, n, b_.geometry.c,
            this->of(b_.weight, block), of.mean + first, of.rstd + first, means.from(first),
            b_.stream);
    });
    fence(b_.stream);
  }

  // all of it, of rows of one piece
  void serve(const Block& block, double* sum_grad = nullptr,
             double* sum_grad_x_hat = nullptr) const {
    Sums of_rows = {};
    make_inner(block);
    sum(block, of_rows, sum_grad, sum_grad_x_hat);
    write(block, of_rows);
  }

 private:
  // mean and 1 / std of a block's rows, side by side
  struct Statistics {
    const double *mean, *rstd;
    double means[kRowsTogether], rstds[kRowsTogether];

    Statistics(const Rows& rows, const Block& block)
        : mean(rows.b_.mean + block.sample), rstd(rows.b_.rstds + block.sample) {
      if (rows.b_.geometry.groups() == 1) return;
      for (int64_t j = 0; j < block.count; ++j) {
        means[j] = rows.b_.mean[rows.statistic(block, j)];
        rstds[j] = rows.b_.rstds[rows.statistic(block, j)];
      }
      mean = means, rstd = rstds;
    }
  };

  int64_t count(const Block& block) const { return std::min(kPiece, len_ - block.piece * kPiece); }
  int64_t statistic(const Block& block, int64_t j) const {
    return (block.sample + j) * b_.geometry.groups() + block.group;
  }
  int64_t offset(const Block& block, int64_t j) const {
    return statistic(block, j) * len_ + block.piece * kPiece;
  }
  const compute_t<T>* of(const compute_t<T>* parameter, const Block& block) const {
    return parameter ? parameter + block.group * len_ + block.piece * kPiece : nullptr;
  }
  // body(first, rows): all together, or, where some do not count, one by one
  template <class Body>
  void over_valid(const Block& block, const Body& body) const {
    const bool* const valid = b_.rows ? b_.rows + block.sample : nullptr;
    if (!valid || std::all_of(valid, valid + block.count, [](bool v) { return v; }))
      return body(0, block.count);
    for (int64_t j = 0; j < block.count; ++j)
      if (valid[j]) body(j, 1);
  }

  const Backward<T>& b_;
  int64_t len_, pieces_;
};

// body(block) for every piece of every row, `together` rows at a time.
template <class T, class Body>
void over_blocks(const Backward<T>& b, int64_t together, int64_t pieces, const Body& body) {
  const Geometry& g = b.geometry;
  const int64_t per_sample = g.groups() * pieces;
  parallel(ceil_div(g.n, together) * per_sample,
           together * std::min(g.channels_per_group(), kPiece), [&](int64_t i) {
             const int64_t n = i / per_sample * together;
             body(Block{n, std::min(together, g.n - n), i % per_sample / pieces, i % pieces});
           });
}

template <class T>
void grad_long_rows(const Backward<T>& b, const Rows<T>& rows) {
  const int64_t pieces = rows.pieces(), groups = b.geometry.groups();
  const auto partial = scratch<GradSums>(b.geometry.num_statistics() * pieces);
  const auto of_row = [&](const Block& block) {
    return partial.get() + (block.sample * groups + block.group) * pieces;
  };
  over_blocks(b, 1, pieces, [&](const Block& block) {
    Sums sums = {};
    rows.make_inner(block);
    rows.sum(block, sums);
    of_row(block)[block.piece] = {sums.grads[0], sums.grads_x_hat[0]};
  });
  over_blocks(b, 1, pieces, [&](const Block& block) {
    GradSums total;
    for (int64_t p = 0; p < pieces; ++p) total.add(of_row(block)[p]);
    Sums sums = {};
    sums.grads[0] = total.grad, sums.grads_x_hat[0] = total.grad_x_hat;
    rows.write(block, sums);
  });
}

// The gradients of weight and bias: columns, summed over blocks of samples.
class Columns {
 public:
  explicit Columns(const Geometry& g)
      : geometry_(g),
        block_(ceil_div(std::max<int64_t>(64, ceil_div(g.n, 64)), kRowsTogether) * kRowsTogether),
        blocks_(ceil_div(g.n, block_)),
        weight_(scratch<double>(blocks_ * g.c)),
        bias_(scratch<double>(blocks_ * g.c)) {}

  int64_t blocks() const { return blocks_; }
  double* weight(int64_t block) const { return weight_.get() + block * geometry_.c; }
  double* bias(int64_t block) const { return bias_.get() + block * geometry_.c; }

  // body(first sample, samples) of a block, kRowsTogether at a time
  template <class Body>
  void over_samples(int64_t block, const Body& body) const {
    const int64_t end = std::min(geometry_.n, (block + 1) * block_);
    for (int64_t n = block * block_; n < end; n += kRowsTogether)
      body(n, std::min<int64_t>(kRowsTogether, end - n));
  }

  void store(GradSums* sums) const {
    for (int64_t p = 0; p < blocks_; ++p)
      for (int64_t c = 0; c < geometry_.c; ++c) sums[c].add({bias(p)[c], weight(p)[c]});
  }

 private:
  const Geometry& geometry_;
  int64_t block_, blocks_;
  std::unique_ptr<double[]> weight_, bias_;
};

// What each sample adds to them: its values are one to a channel.
template <class T>
void sums_of_samples(const Backward<T>& b, const Rows<T>& rows) {
  const int64_t len = b.geometry.channels_per_group(), pieces = rows.pieces();
  over_blocks(b, 1, 1, [&](Block block) {
    for (block.piece = 0; block.piece < pieces; ++block.piece) rows.make_inner(block);
    const int64_t i = block.sample * b.geometry.groups() + block.group;
    if (b.skips(i)) return;
    for (int64_t at = i * len; at < (i + 1) * len; ++at)
      b.sums[at] = b.kernels.grad_sums(b.norm_grad() + at, b.x + at, 1, 1, 0, b.mean[i], b.rstd(i));
  });
}

}  // namespace

template <class T>
void backward_elementwise(const Backward<T>& given) {
  const Geometry& g = given.geometry;
  const int64_t len = g.channels_per_group();
  const auto rstds = rstds_of(given);
  Backward<T> b = given;
  b.rstds = rstds.get();
  const Rows<T> rows(b);
  const int64_t pieces = rows.pieces();
  if (b.each_sample) return sums_of_samples(b, rows);
  if (b.inner && !b.grad_x)
    over_blocks(b, 1, pieces, [&](const Block& block) { rows.make_inner(block); });
  if (b.grad_x && pieces > 1) grad_long_rows(b, rows);
  const bool short_rows = b.grad_x && pieces == 1;
  // as many as a core's cache holds until they are read again
  const int64_t fit = kInCache / 2 / (2 * len * int64_t(sizeof(T)));
  const int64_t together = fit < kRowsTogether ? 1 : kRowsTogether;
  const auto serve_rows = [&] {
    if (short_rows) over_blocks(b, together, 1, [&](const Block& block) { rows.serve(block); });
  };
  if (!b.sums) return serve_rows();
  const Columns columns(g);
  if (short_rows && together > 1 && (busy(columns.blocks()) || g.n * g.c <= kWorthAThread)) {
    // the last one, which may be short, first: the first thread has the most of them
    parallel(columns.blocks(), 64 * g.c, [&](int64_t task) {
      const int64_t i = task ? task - 1 : columns.blocks() - 1;
      std::fill_n(columns.bias(i), g.c, 0.0);
      std::fill_n(columns.weight(i), g.c, 0.0);
      columns.over_samples(i, [&](int64_t n, int64_t samples) {
        for (int64_t k = 0; k < g.groups(); ++k)
          rows.serve({n, samples, k, 0}, columns.bias(i) + k * len, columns.weight(i) + k * len);
      });
    });
  } else {
    serve_rows();
    constexpr int64_t width = 1024;
    // the last takes what is left: columns fewer than a step are summed in another way
    const int64_t cuts = std::max<int64_t>(1, len / width);
    parallel(columns.blocks() * g.groups() * cuts, 64 * std::min(len, width), [&](int64_t i) {
      const int64_t begin = i % cuts * width, end = i % cuts + 1 < cuts ? begin + width : len;
      const int64_t k = i / cuts % g.groups(), block = i / cuts / g.groups();
      double* const bias = columns.bias(block) + k * len + begin;
      double* const weight = columns.weight(block) + k * len + begin;
      std::fill_n(bias, end - begin, 0.0);
      std::fill_n(weight, end - begin, 0.0);
      columns.over_samples(block, [&](int64_t n, int64_t samples) {
        Sums unused;
        rows.sum({n, samples, k, 0}, unused, bias, weight, begin, end);
      });
    });
  }
  columns.store(b.sums);
}

TN_EVERY_TYPE(backward_elementwise, Backward)

}  // namespace truenorm
