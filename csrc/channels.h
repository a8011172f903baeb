// Memory [M, P, C]: M matrices of P positions by C channels, one statistic per column. Batch
// statistics see one matrix of all samples' positions; the others one matrix per sample, whose
// columns are merged where a group has several channels.
#pragma once

#include "layers.h"
#include "parallel.h"

namespace truenorm {

constexpr int64_t kNarrow = 64;    // columns below which positions are folded into the row
constexpr int64_t kMinRows = 256;  // rows that make a piece worth its partial result
constexpr int64_t kMaxCols = 128;  // columns of a piece

// Where columns of one channel lie in a matrix of `fold` positions to a row, each of `channels` by
// `run` values: body(column).
template <class Body>
void over_columns_of(int64_t channel, int64_t channels, int64_t run, int64_t fold,
                     const Body& body) {
  for (int64_t j = 0; j < fold; ++j)
    for (int64_t i = 0; i < run; ++i) body((j * channels + channel) * run + i);
}

// A matrix of few columns is read as one of `fold` times as many, `fold` positions to a row, so
// that the vectors are full; the positions left over make one short row. In memory [N, C, S] of a
// batch's statistics a sample is a position, and each channel has a run of S columns.
struct Cut {
  int64_t matrices, channels, run, wide, fold, cols, rows, left_over;
  int64_t rows_per_piece, row_pieces, col_pieces;

  explicit Cut(const Geometry& g)
      : matrices(g.over_batch() ? 1 : g.n),
        channels(g.c),
        run(g.memory == Memory::rows ? g.s : 1),
        wide(channels * run) {
    const int64_t positions = g.over_batch() ? g.n * g.s / run : g.s;
    fold = wide < kNarrow ? std::min(ceil_div(kNarrow, wide), positions) : 1;
    cols = fold * wide;
    rows = positions / fold;
    left_over = positions % fold;
    rows_per_piece = std::max(kMinRows, kPiece / cols);
    row_pieces = ceil_div(rows, rows_per_piece);
    col_pieces = ceil_div(cols, kMaxCols);
  }

  int64_t matrix_values() const { return (rows * fold + left_over) * wide; }
  template <class Body>
  void columns_of(int64_t channel, int64_t folded, const Body& body) const {
    over_columns_of(channel, channels, run, folded, body);
  }
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
      body(matrix, offset + cut.rows * cut.cols, 1, cut.left_over * cut.wide);
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
      cut.columns_of(c, cut.fold, [&](int64_t col) { values[m * cut.cols + col] = v; });
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

// Arrays of `size` coefficients each, one after the other.
template <class A>
struct Arrays {
  int64_t size;
  std::unique_ptr<A[]> memory;

  Arrays(int64_t count, int64_t values)
      : size(values), memory(scratch<A>(count > 0 ? count * values + kPastEnd : 0)) {}
  A* operator[](int64_t i) const { return memory.get() + i * size; }
};

// The coefficients of y by column, of some matrices from `first` on, a row of `fold` positions
// each.
template <class T>
struct ForwardCoefficients {
  Arrays<compute_t<T>> values;

  // of a Forward or a Backward
  template <class Of>
  ForwardCoefficients(const Of& f, int64_t first, int64_t matrices, int64_t fold, int64_t run = 1)
      : values(Affines<T>::kArrays, matrices * fold * f.geometry.c * run) {
    const int64_t channels = f.geometry.c, groups = f.geometry.groups();
    const int64_t per_group = channels / groups, cols = fold * channels * run;
    const Affines<T> all = (*this)(0);
    parallel(matrices, 8 * channels, [&](int64_t m) {
      for (int64_t c = 0; c < channels; ++c) {
        const int64_t i = (first + m) * groups + c / per_group;
        const Affine<T> a(f.mean[i], f.rstd(i), f.weight, f.bias, c);
        over_columns_of(c, channels, run, fold, [&](int64_t to) { all.set(m * cols + to, a); });
      }
    });
  }

  Affines<T> operator()(int64_t column) const {
    Affines<T> all;
    for (int64_t i = 0; i < Affines<T>::kArrays; ++i) all.of[i] = values[i];
    return all.from(column);
  }
};

// The same of grad_x, from the sums per channel over `count` values of a statistic.
template <class T>
struct BackwardCoefficients {
  using A = compute_t<T>;
  Arrays<A> values;

  BackwardCoefficients(const Backward<T>& b, int64_t first, int64_t matrices, int64_t fold,
                       const GradSums* sums, double count, int64_t run = 1)
      : values(5, matrices * fold * b.geometry.c * run) {
    const int64_t channels = b.geometry.c, groups = b.geometry.groups();
    const int64_t per_group = channels / groups, cols = fold * channels * run;
    const GradAffines<A> all = (*this)(0);
    parallel(matrices * groups, 16 * per_group, [&](int64_t i) {
      const int64_t m = i / groups, begin = i % groups * per_group, end = begin + per_group;
      GradSums mean;
      for (int64_t c = begin; c < end && b.by_sums(); ++c) {
        const GradSums& s = sums[m * channels + c];
        mean.add({b.weight_of(c) * s.grad / count, b.weight_of(c) * s.grad_x_hat / count});
      }
      const int64_t statistic = first * groups + i;
      mean = b.mean_grads(statistic, mean, 1.0);
      for (int64_t c = begin; c < end; ++c) {
        const GradAffine<A> a = b.affine(statistic, b.weight_of(c), mean);
        over_columns_of(c, channels, run, fold, [&](int64_t to) { all.set(m * cols + to, a); });
      }
    });
  }

  GradAffines<A> operator()(int64_t column) const {
    return GradAffines<A>{values[0], values[1], values[2], values[3], values[4]}.from(column);
  }
};

// y, its inner gradient and grad_x of rows that follow one another.
template <class T>
void apply_rows(const Forward<T>& f, int64_t offset, int64_t rows, int64_t len,
                const Affines<T>& by) {
  if (f.acts())
    f.kernels.act_each(f.inputs(offset), f.y + offset, rows, len, len, by, f.act, f.stream);
  else
    f.kernels.apply_each(f.x + offset, f.y + offset, rows, len, by, f.stream);
}
template <class T>
void inner_rows(const Backward<T>& b, int64_t offset, int64_t rows, int64_t cols, int64_t ld,
                const Affines<T>& by) {
  b.kernels.act_each(b.inputs(offset), b.inner + offset, rows, cols, ld, by, b.act, false);
}
template <class T>
void grad_rows(const Backward<T>& b, int64_t offset, int64_t rows, int64_t len,
               const GradAffines<compute_t<T>>& by) {
  const T* const grads = b.norm_grad() + offset;
  if (b.fixed)
    b.kernels.grad_scale_each(grads, b.grad_x + offset, rows, len, by.scale, b.stream);
  else
    b.kernels.grad_apply_each(grads, b.x + offset, b.grad_x + offset, rows, len, by, b.stream);
}

// A sample whose values are read twice from cache is one task, if there are enough of them. Its
// pieces are the same, and so are the bits.
template <class T>
bool by_sample(const Geometry& g, int64_t tensors) {
  return !g.over_batch() && g.n > 1 && busy(g.n) &&
         tensors * g.c * g.s * int64_t(sizeof(T)) <= kInCache;
}

}  // namespace truenorm
