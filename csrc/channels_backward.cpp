// The backward of channels_forward.cpp: sums down columns, and the gradients.
#include "channels.h"

namespace truenorm {
namespace {

// The gradient of what the activation is applied to, before it is first read.
template <class T>
class Inner {
 public:
  Inner(const Backward<T>& b, const Cut& cut) : b_(b), cut_(cut) {
    if (b.inner)
      coefficients_ =
          std::make_unique<ForwardCoefficients<T>>(b, 0, cut.matrices, cut.fold, cut.run);
  }
  void make(int64_t m, int64_t offset, int64_t rows, int64_t col, int64_t cols) const {
    if (coefficients_)
      inner_rows(b_, offset, rows, cols, cut_.cols, (*coefficients_)(m * cut_.cols + col));
  }

 private:
  const Backward<T>& b_;
  const Cut& cut_;
  std::unique_ptr<ForwardCoefficients<T>> coefficients_;
};

// Sums of one channel of one matrix, pieces and folded positions added in order.
template <class T>
void channel_sums(const Backward<T>& b, const Cut& cut, const Inner<T>& inner, GradSums* sums) {
  const Geometry& g = b.geometry;
  const int64_t per_group = g.channels_per_group(), groups = g.groups();
  const auto means =
      spread<double>(cut, [&](int64_t m, int64_t c) { return b.mean[m * groups + c / per_group]; });
  const auto rstds =
      spread<double>(cut, [&](int64_t m, int64_t c) { return b.rstd(m * groups + c / per_group); });
  const T* const grads = b.norm_grad();
  // the short row of positions left over is one more piece
  const int64_t pieces = cut.row_pieces + 1;
  const int64_t parts = cut.matrices * pieces * cut.cols;
  const auto grad = scratch<double>(parts), of_x_hat = scratch<double>(parts);
  over_pieces(cut, [&](int64_t m, int64_t piece, int64_t col, int64_t cols, int64_t offset) {
    const int64_t to = (m * pieces + piece) * cut.cols + col;
    inner.make(m, offset, cut.rows_of(piece), col, cols);
    b.kernels.column_grad_sums(grads + offset, b.x + offset, cut.rows_of(piece), cols, cut.cols,
                               means.get() + m * cut.cols + col, rstds.get() + m * cut.cols + col,
                               grad.get() + to, of_x_hat.get() + to);
  });
  if (cut.left_over > 0) {
    parallel(cut.matrices, cut.cols, [&](int64_t m) {
      const int64_t rest = m * cut.matrix_values() + cut.rows * cut.cols;
      const int64_t to = (m * pieces + cut.row_pieces) * cut.cols;
      inner.make(m, rest, 1, 0, cut.left_over * cut.wide);
      b.kernels.column_grad_sums(grads + rest, b.x + rest, 1, cut.left_over * cut.wide, cut.cols,
                                 means.get() + m * cut.cols, rstds.get() + m * cut.cols,
                                 grad.get() + to, of_x_hat.get() + to);
    });
  }
  over_columns(cut, cut.row_pieces, [&](int64_t m, int64_t col, int64_t cols) {
    double* const to = grad.get() + m * pieces * cut.cols + col;
    double* const to_x = of_x_hat.get() + m * pieces * cut.cols + col;
    for (int64_t piece = 1; piece < cut.row_pieces; ++piece)
      for (int64_t c = 0; c < cols; ++c) {
        to[c] += to[piece * cut.cols + c];
        to_x[c] += to_x[piece * cut.cols + c];
      }
  });
  parallel(cut.matrices, cut.cols, [&](int64_t m) {
    const auto add = [&](int64_t piece, int64_t folded) {
      for (int64_t j = 0, from = (m * pieces + piece) * cut.cols; j < folded; ++j)
        for (int64_t c = 0; c < cut.channels; ++c)
          for (int64_t i = 0; i < cut.run; ++i, ++from)
            sums[m * cut.channels + c].add({grad[from], of_x_hat[from]});
    };
    add(0, cut.fold);
    add(cut.row_pieces, cut.left_over);
  });
}

template <class T>
void backward_samples(const Backward<T>& b) {
  const Geometry& g = b.geometry;
  const Geometry one = samples_of(g, 1);
  parallel(g.n, 2 * g.c * g.s, [&](int64_t n) {
    const int64_t values = n * g.c * g.s, statistics = n * g.groups();
    backward_channels(Backward<T>{one, b.kernels, b.eps, b.grad + values, b.x + values,
                                  b.grad_x ? b.grad_x + values : nullptr, b.weight,
                                  b.mean + statistics, b.var + statistics, b.fixed, b.stream,
                                  b.sums ? b.sums + n * g.c : nullptr, b.each_sample,
                                  b.mean_grad ? b.mean_grad + statistics : nullptr,
                                  b.mean_grad ? b.mean_grad_x_hat + statistics : nullptr,
                                  b.inner ? b.inner + values : nullptr, b.bias,
                                  b.residual ? b.residual + values : nullptr, b.act});
  });
}

}  // namespace

template <class T>
void backward_channels(const Backward<T>& b) {
  if (by_sample<T>(b.geometry, 2)) return backward_samples(b);
  const Cut cut(b.geometry);
  const Inner<T> inner(b, cut);
  const bool summing = b.summing();
  const auto own = scratch<GradSums>(b.sums || !summing ? 0 : cut.matrices * cut.channels);
  GradSums* const sums = b.sums ? b.sums : own.get();
  if (summing) channel_sums(b, cut, inner, sums);
  if (!b.grad_x) {
    if (b.inner && !summing)
      over_rows(cut, false, [&](int64_t m, int64_t offset, int64_t rows, int64_t len) {
        inner.make(m, offset, rows, 0, len);
      });
    return;
  }
  const double count = double(b.geometry.values_per_statistic());
  const BackwardCoefficients<T> by(b, 0, cut.matrices, cut.fold, sums, count, cut.run);
  over_rows(cut, b.stream, [&](int64_t m, int64_t offset, int64_t rows, int64_t len) {
    if (!summing) inner.make(m, offset, rows, 0, len);
    grad_rows(b, offset, rows, len, by(m * cut.cols));
  });
}

TN_EVERY_TYPE(backward_channels, Backward)

}  // namespace truenorm
