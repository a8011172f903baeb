// The backward of channels_forward.cpp: sums down columns, and the gradients.
#include "channels.h"

namespace truenorm {
namespace {

// The gradient of what the activation is applied to, before it is first read.
template <class T>
class Inner {
 public:
  Inner(const Backward<T>& b, const Cut& cut) : b_(b), cut_(cut) {
    if (b.inner) coefficients_ = std::make_unique<ForwardCoefficients<T>>(b, cut);
  }
  void make(int64_t m, int64_t offset, int64_t rows, int64_t col, int64_t cols) const {
    if (coefficients_)
      b_.kernels.act_each(b_.inputs(offset), b_.inner + offset, rows, cols, cut_.cols,
                          (*coefficients_)(m * cut_.cols + col), b_.act, false);
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
      inner.make(m, rest, 1, 0, cut.left_over * cut.channels);
      b.kernels.column_grad_sums(grads + rest, b.x + rest, 1, cut.left_over * cut.channels,
                                 cut.cols, means.get() + m * cut.cols, rstds.get() + m * cut.cols,
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
      for (int64_t j = 0; j < folded; ++j)
        for (int64_t c = 0; c < cut.channels; ++c) {
          const int64_t from = (m * pieces + piece) * cut.cols + j * cut.channels + c;
          sums[m * cut.channels + c].grad += grad[from];
          sums[m * cut.channels + c].grad_x_hat += of_x_hat[from];
        }
    };
    add(0, cut.fold);
    add(cut.row_pieces, cut.left_over);
  });
}

// The coefficients of grad_x, per matrix and column.
template <class T>
Arrays<compute_t<T>> grad_coefficients(const Backward<T>& b, const Cut& cut, const GradSums* sums) {
  using A = compute_t<T>;
  const Geometry& g = b.geometry;
  const int64_t per_group = g.channels_per_group(), groups = g.groups();
  const double count = double(g.values_per_statistic());
  Arrays<A> arrays(5, cut.matrices * cut.cols);
  parallel(cut.matrices * groups, 16 * per_group, [&](int64_t i) {
    const int64_t m = i / groups, first = i % groups * per_group;
    GradSums mean;
    for (int64_t c = first; c < first + per_group && b.by_sums(); ++c) {
      const GradSums& s = sums[m * cut.channels + c];
      mean.add({b.weight_of(c) * s.grad / count, b.weight_of(c) * s.grad_x_hat / count});
    }
    mean = b.mean_grads(i, mean, 1.0);
    for (int64_t c = first; c < first + per_group; ++c) {
      const GradAffine<A> a = b.affine(i, b.weight_of(c), mean);
      for (int64_t to = m * cut.cols + c; to < (m + 1) * cut.cols; to += cut.channels) {
        arrays[0][to] = a.scale;
        arrays[1][to] = a.hi;
        arrays[2][to] = a.rstd;
        arrays[3][to] = a.slope;
        arrays[4][to] = a.shift;
      }
    }
  });
  return arrays;
}

template <class T>
void backward_samples(const Backward<T>& b) {
  const Geometry& g = b.geometry;
  const Geometry one = one_sample(g);
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
  using A = compute_t<T>;
  if (by_sample<T>(b.geometry, 2)) return backward_samples(b);
  const Cut cut(b.geometry);
  const Inner<T> inner(b, cut);
  const T* const grads = b.norm_grad();
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
  if (b.fixed) {
    const int64_t per_group = b.geometry.channels_per_group(), groups = b.geometry.groups();
    const auto scale = spread<A>(cut, [&](int64_t m, int64_t c) {
      return A(b.rstd(m * groups + c / per_group) * b.weight_of(c));
    });
    over_rows(cut, b.stream, [&](int64_t m, int64_t offset, int64_t rows, int64_t len) {
      if (!summing) inner.make(m, offset, rows, 0, len);
      b.kernels.grad_scale_each(grads + offset, b.grad_x + offset, rows, len,
                                scale.get() + m * cut.cols, b.stream);
    });
    return;
  }
  const Arrays<A> of = grad_coefficients(b, cut, sums);
  const GradAffines<A> all = {of[0], of[1], of[2], of[3], of[4]};
  over_rows(cut, b.stream, [&](int64_t m, int64_t offset, int64_t rows, int64_t len) {
    if (!summing) inner.make(m, offset, rows, 0, len);
    b.kernels.grad_apply_each(grads + offset, b.x + offset, b.grad_x + offset, rows, len,
                              all.from(m * cut.cols), b.stream);
  });
}

template void backward_channels<double>(const Backward<double>&);
template void backward_channels<float>(const Backward<float>&);
template void backward_channels<bf16>(const Backward<bf16>&);
template void backward_channels<f16>(const Backward<f16>&);

}  // namespace truenorm
