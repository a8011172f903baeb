// Memory [M, P, C]: M matrices of P positions by C channels, one statistic per column. Batch
// statistics see one matrix of all samples' positions; the others one matrix per sample, whose
// columns are merged where a group has several channels.
#include "layers.h"
#include "parallel.h"

namespace truenorm {
namespace {

constexpr int64_t kNarrow = 64;    // columns below which positions are folded into the row
constexpr int64_t kMinRows = 256;  // rows that make a piece worth its partial result
constexpr int64_t kMaxCols = 128;  // columns of a piece

// A matrix of few columns is read as one of `fold` times as many, `fold` positions to a row, so
// that the vectors are full; the positions left over make one short row.
struct Cut {
  int64_t matrices, channels, fold, cols, rows, left_over;
  int64_t rows_per_piece, row_pieces, col_pieces;

  explicit Cut(const Geometry& g) : matrices(g.over_batch() ? 1 : g.n), channels(g.c) {
    const int64_t positions = g.over_batch() ? g.n * g.s : g.s;
    fold = g.c < kNarrow ? std::min(ceil_div(kNarrow, g.c), positions) : 1;
    cols = fold * g.c;
    rows = positions / fold;
    left_over = positions % fold;
    rows_per_piece = std::max(kMinRows, kPiece / cols);
    row_pieces = ceil_div(rows, rows_per_piece);
    col_pieces = ceil_div(cols, kMaxCols);
  }

  int64_t matrix_values() const { return (rows * fold + left_over) * channels; }
  int64_t rows_of(int64_t piece) const {
    return std::min(rows_per_piece, rows - piece * rows_per_piece);
  }
};

// body(matrix, row piece, first column, columns, offset of the first value) for every piece.
template <class Body>
void over_pieces(const Cut& cut, const Body& body) {
  const int64_t cost = cut.rows_per_piece * std::min(cut.cols, kMaxCols);
  parallel(cut.matrices * cut.row_pieces * cut.col_pieces, std::min(cost, cut.matrix_values()),
           [&](int64_t i) {
             const int64_t col = i % cut.col_pieces * kMaxCols;
             const int64_t piece = i / cut.col_pieces % cut.row_pieces;
             const int64_t matrix = i / cut.col_pieces / cut.row_pieces;
             body(matrix, piece, col, std::min(kMaxCols, cut.cols - col),
                  matrix * cut.matrix_values() + piece * cut.rows_per_piece * cut.cols + col);
           });
}

// body(matrix, offset, rows, values of a row), several rows to a task, the last ones first: they
// have just been read.
template <class Body>
void over_rows(const Cut& cut, bool stream, const Body& body) {
  const int64_t rows_per_task = std::max<int64_t>(1, kPiece / cut.cols);
  const int64_t tasks = ceil_div(cut.rows, rows_per_task);
  parallel<true>(cut.matrices * tasks, std::min(kPiece, cut.matrix_values()), [&](int64_t i) {
    const int64_t matrix = i / tasks, first = i % tasks * rows_per_task;
    const int64_t last = std::min(cut.rows, first + rows_per_task);
    const int64_t offset = matrix * cut.matrix_values();
    body(matrix, offset + first * cut.cols, last - first, cut.cols);
    if (last == cut.rows && cut.left_over > 0)
      body(matrix, offset + cut.rows * cut.cols, 1, cut.left_over * cut.channels);
    fence(stream);
  });
}

// Values that vectors may read past the end of an array of coefficients.
constexpr int64_t kPastEnd = 32;

// A value per (matrix, channel), repeated for every folded position: what a row of cols reads.
template <class A, class Value>
std::unique_ptr<A[]> spread(const Cut& cut, const Value& value) {
  auto values = scratch<A>(cut.matrices * cut.cols + kPastEnd);
  for (int64_t m = 0; m < cut.matrices; ++m)
    for (int64_t c = 0; c < cut.channels; ++c) {
      const A v = value(m, c);
      for (int64_t j = 0; j < cut.fold; ++j) values[m * cut.cols + j * cut.channels + c] = v;
    }
  return values;
}

// body(matrix, first column, columns) for every matrix and block of columns.
template <class Body>
void over_columns(const Cut& cut, int64_t cost, const Body& body) {
  parallel(cut.matrices * cut.col_pieces, std::min(kMaxCols, cut.cols) * cost, [&](int64_t i) {
    const int64_t col = i % cut.col_pieces * kMaxCols;
    body(i / cut.col_pieces, col, std::min(kMaxCols, cut.cols - col));
  });
}

template <class T>
void statistics(const Forward<T>& f, const Cut& cut) {
  const Geometry& g = f.geometry;
  const int64_t parts = cut.matrices * cut.row_pieces * cut.cols;
  const auto mean = scratch<double>(parts), m2 = scratch<double>(parts);
  over_pieces(cut, [&](int64_t m, int64_t piece, int64_t col, int64_t cols, int64_t offset) {
    const int64_t to = (m * cut.row_pieces + piece) * cut.cols + col;
    f.kernels.column_moments(f.x + offset, cut.rows_of(piece), cols, cut.cols, mean.get() + to,
                             m2.get() + to);
  });
  // Moments::merge, for many columns side by side: into the first piece, the others in order
  over_columns(cut, cut.row_pieces, [&](int64_t m, int64_t col, int64_t cols) {
    double* const to_mean = mean.get() + m * cut.row_pieces * cut.cols + col;
    double* const to_m2 = m2.get() + m * cut.row_pieces * cut.cols + col;
    double count = double(cut.rows_of(0));
    for (int64_t piece = 1; piece < cut.row_pieces; ++piece) {
      const double *from_mean = to_mean + piece * cut.cols, *from_m2 = to_m2 + piece * cut.cols;
      const double total = count + double(cut.rows_of(piece));
      const double share = double(cut.rows_of(piece)) / total;
      for (int64_t c = 0; c < cols; ++c) {
        const double delta = from_mean[c] - to_mean[c];
        to_mean[c] += delta * share;
        to_m2[c] += from_m2[c] + delta * delta * count * share;
      }
      count = total;
    }
  });
  // folded positions, those left over, and the channels of a group
  const int64_t per_group = g.channels_per_group(), groups = g.groups();
  parallel(cut.matrices * groups, 4 * per_group * cut.fold, [&](int64_t i) {
    const int64_t m = i / groups, first = i % groups * per_group;
    Moments total;
    for (int64_t c = first; c < first + per_group; ++c) {
      for (int64_t j = 0; j < cut.fold; ++j) {
        const int64_t from = m * cut.row_pieces * cut.cols + j * cut.channels + c;
        total.merge({double(cut.rows), mean[from], m2[from]});
      }
      const int64_t rest = m * cut.matrix_values() + cut.rows * cut.cols;
      for (int64_t j = 0; j < cut.left_over; ++j) {
        double value;
        f.kernels.widen(f.x + rest + j * cut.channels + c, &value, 1);
        total.merge({1.0, value, 0.0});
      }
    }
    f.mean[i] = total.mean;
    f.var[i] = total.m2 / total.count;
  });
}

// Sums of one channel of one matrix, pieces and folded positions added in order.
template <class T>
std::unique_ptr<GradSums[]> channel_sums(const Backward<T>& b, const Cut& cut) {
  const Geometry& g = b.geometry;
  const int64_t per_group = g.channels_per_group(), groups = g.groups();
  const auto means =
      spread<double>(cut, [&](int64_t m, int64_t c) { return b.mean[m * groups + c / per_group]; });
  const auto rstds = spread<double>(cut, [&](int64_t m, int64_t c) {
    return inverse_std(b.var[m * groups + c / per_group], b.eps);
  });
  // the short row of positions left over is one more piece
  const int64_t pieces = cut.row_pieces + 1;
  const int64_t parts = cut.matrices * pieces * cut.cols;
  const auto grad = scratch<double>(parts), of_x_hat = scratch<double>(parts);
  over_pieces(cut, [&](int64_t m, int64_t piece, int64_t col, int64_t cols, int64_t offset) {
    const int64_t to = (m * pieces + piece) * cut.cols + col;
    b.kernels.column_grad_sums(b.grad + offset, b.x + offset, cut.rows_of(piece), cols, cut.cols,
                               means.get() + m * cut.cols + col, rstds.get() + m * cut.cols + col,
                               grad.get() + to, of_x_hat.get() + to);
  });
  if (cut.left_over > 0) {
    parallel(cut.matrices, cut.cols, [&](int64_t m) {
      const int64_t rest = m * cut.matrix_values() + cut.rows * cut.cols;
      const int64_t to = (m * pieces + cut.row_pieces) * cut.cols;
      b.kernels.column_grad_sums(b.grad + rest, b.x + rest, 1, cut.left_over * cut.channels,
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
  auto sums = scratch<GradSums>(cut.matrices * cut.channels);
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
  return sums;
}

template <class T>
void param_grads(const Backward<T>& b, const Cut& cut, const GradSums* sums) {
  if (!b.grad_weight && !b.grad_bias) return;
  parallel(cut.channels, 16 * cut.matrices, [&](int64_t c) {
    double weight = 0.0, bias = 0.0;
    for (int64_t m = 0; m < cut.matrices; ++m) {
      const GradSums& s = sums[m * cut.channels + c];
      weight += s.grad_x_hat;
      bias += s.grad;
    }
    if (b.grad_weight) b.grad_weight[c] = weight;
    if (b.grad_bias) b.grad_bias[c] = bias;
  });
}

// Arrays of `size` coefficients each, one after the other.
template <class A>
struct Arrays {
  int64_t size;
  std::unique_ptr<A[]> memory;

  Arrays(int64_t count, int64_t values)
      : size(values), memory(scratch<A>(count > 0 ? count * values + kPastEnd : 0)) {}
  A* operator[](int64_t i) const { return memory.get() + i * size; }
};

// The coefficients of y, per matrix and column.
template <class T>
struct ForwardCoefficients {
  Arrays<compute_t<T>> values;
  Arrays<double> doubles;

  ForwardCoefficients(const Forward<T>& f, const Cut& cut)
      : values(3, cut.matrices * cut.cols), doubles(is_half<T> ? 3 : 0, cut.matrices * cut.cols) {
    const int64_t per_group = f.geometry.channels_per_group(), groups = f.geometry.groups();
    const Affines<T> all = (*this)(0);
    parallel(cut.matrices, 8 * cut.channels, [&](int64_t m) {
      for (int64_t c = 0; c < cut.channels; ++c) {
        const int64_t i = m * groups + c / per_group;
        const Affine<T> a(f.mean[i], inverse_std(f.var[i], f.eps), f.weight, f.bias, c);
        for (int64_t to = m * cut.cols + c; to < (m + 1) * cut.cols; to += cut.channels)
          all.set(to, a);
      }
    });
  }

  Affines<T> operator()(int64_t first) const {
    return Affines<T>{values[0], values[1], values[2], doubles[0], doubles[1], doubles[2]}.from(
        first);
  }
};

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
    const double rstd = inverse_std(b.var[i], b.eps);
    const auto weight = [&](int64_t c) { return b.weight ? double(b.weight[c]) : 1.0; };
    GradSums mean;
    for (int64_t c = first; c < first + per_group; ++c) {
      const GradSums& s = sums[m * cut.channels + c];
      mean.grad += weight(c) * s.grad / count;
      mean.grad_x_hat += weight(c) * s.grad_x_hat / count;
    }
    for (int64_t c = first; c < first + per_group; ++c) {
      const GradAffine<A> a(b.mean[i], rstd, weight(c), mean.grad, mean.grad_x_hat);
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

// A sample whose values are read twice from cache is one task, if there are enough of them: then
// `one` does it all. Its pieces are the same, and so are the bits.
template <class T>
bool by_sample(const Geometry& g, int64_t tensors) {
  return !g.over_batch() && g.n > 1 && busy(g.n) &&
         tensors * g.c * g.s * int64_t(sizeof(T)) <= kInCache;
}

Geometry one_sample(const Geometry& g) {
  return {1, g.c, g.s, g.memory, {}, {}, true, g.num_groups, g.centred};
}

template <class T>
void forward_samples(const Forward<T>& f) {
  const Geometry& g = f.geometry;
  const Geometry one = one_sample(g);
  parallel(g.n, g.c * g.s, [&](int64_t n) {
    const int64_t values = n * g.c * g.s, statistics = n * g.groups();
    forward_channels(Forward<T>{one, f.kernels, f.eps, f.x + values, f.y + values, f.weight, f.bias,
                                f.mean + statistics, f.var + statistics, false, f.stream});
  });
}

template <class T>
void backward_samples(const Backward<T>& b) {
  const Geometry& g = b.geometry;
  const Geometry one = one_sample(g);
  const auto weight = scratch<double>(g.n * g.c), bias = scratch<double>(g.n * g.c);
  parallel(g.n, 2 * g.c * g.s, [&](int64_t n) {
    const int64_t values = n * g.c * g.s, statistics = n * g.groups();
    backward_channels(Backward<T>{one, b.kernels, b.eps, b.grad + values, b.x + values,
                                  b.grad_x ? b.grad_x + values : nullptr, b.weight,
                                  b.mean + statistics, b.var + statistics,
                                  b.grad_weight ? weight.get() + n * g.c : nullptr,
                                  b.grad_bias ? bias.get() + n * g.c : nullptr, false, b.stream});
  });
  const auto add = [&](const double* of_sample, double* to) {
    if (!to) return;
    std::fill(to, to + g.c, 0.0);
    for (int64_t n = 0; n < g.n; ++n)
      for (int64_t c = 0; c < g.c; ++c) to[c] += of_sample[n * g.c + c];
  };
  add(weight.get(), b.grad_weight);
  add(bias.get(), b.grad_bias);
}

}  // namespace

template <class T>
void forward_channels(const Forward<T>& f) {
  if (by_sample<T>(f.geometry, 1)) return forward_samples(f);
  const Cut cut(f.geometry);
  if (!f.fixed) statistics(f, cut);
  const ForwardCoefficients<T> coefficients(f, cut);
  over_rows(cut, f.stream, [&](int64_t m, int64_t offset, int64_t rows, int64_t len) {
    f.kernels.apply_each(f.x + offset, f.y + offset, rows, len, coefficients(m * cut.cols),
                         f.stream);
  });
}

template <class T>
void backward_channels(const Backward<T>& b) {
  using A = compute_t<T>;
  if (by_sample<T>(b.geometry, 2)) return backward_samples(b);
  const Cut cut(b.geometry);
  std::unique_ptr<GradSums[]> sums;
  if (b.grad_weight || b.grad_bias || !b.fixed) {
    sums = channel_sums(b, cut);
    param_grads(b, cut, sums.get());
  }
  if (!b.grad_x) return;
  if (b.fixed) {
    const auto scale = spread<A>(cut, [&](int64_t, int64_t c) {
      return A(inverse_std(b.var[c], b.eps) * (b.weight ? double(b.weight[c]) : 1.0));
    });
    over_rows(cut, b.stream, [&](int64_t, int64_t offset, int64_t rows, int64_t len) {
      b.kernels.grad_scale_each(b.grad + offset, b.grad_x + offset, rows, len, scale.get(),
                                b.stream);
    });
    return;
  }
  const Arrays<A> of = grad_coefficients(b, cut, sums.get());
  const GradAffines<A> all = {of[0], of[1], of[2], of[3], of[4]};
  over_rows(cut, b.stream, [&](int64_t m, int64_t offset, int64_t rows, int64_t len) {
    b.kernels.grad_apply_each(b.grad + offset, b.x + offset, b.grad_x + offset, rows, len,
                              all.from(m * cut.cols), b.stream);
  });
}

#define TN_INSTANTIATE(T)                               \
  template void forward_channels<T>(const Forward<T>&); \
  template void backward_channels<T>(const Backward<T>&);
TN_INSTANTIATE(double)
TN_INSTANTIATE(float)
TN_INSTANTIATE(bf16)
TN_INSTANTIATE(f16)

}  // namespace truenorm
