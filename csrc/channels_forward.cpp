// Statistics of columns, and the outputs.
#include "channels.h"

namespace truenorm {
namespace {

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
      cut.columns_of(c, cut.fold, [&](int64_t col) {
        const int64_t from = m * cut.row_pieces * cut.cols + col;
        total.merge({double(cut.rows), mean[from], m2[from]});
      });
      const int64_t rest = m * cut.matrix_values() + cut.rows * cut.cols;
      cut.columns_of(c, cut.left_over, [&](int64_t col) {
        double value;
        f.kernels.widen(f.x + rest + col, &value, 1);
        total.merge({1.0, value, 0.0});
      });
    }
    f.set(i, total);
  });
}

template <class T>
void forward_samples(const Forward<T>& f) {
  const Geometry& g = f.geometry;
  const Geometry one = samples_of(g, 1);
  parallel(g.n, g.c * g.s, [&](int64_t n) {
    const int64_t values = n * g.c * g.s, statistics = n * g.groups();
    forward_channels(Forward<T>{one, f.kernels, f.eps, f.x + values, f.y ? f.y + values : nullptr,
                                f.weight, f.bias, f.mean + statistics, f.var + statistics, f.fixed,
                                f.stream, f.residual ? f.residual + values : nullptr, f.act});
  });
}

}  // namespace

template <class T>
void forward_channels(const Forward<T>& f) {
  if (by_sample<T>(f.geometry, 1)) return forward_samples(f);
  const Cut cut(f.geometry);
  if (!f.fixed) statistics(f, cut);
  if (!f.y) return;
  const ForwardCoefficients<T> by(f, 0, cut.matrices, cut.fold, cut.run);
  over_rows(cut, f.stream, [&](int64_t m, int64_t offset, int64_t rows, int64_t len) {
    apply_rows(f, offset, rows, len, by(m * cut.cols));
  });
}

TN_EVERY_TYPE(forward_channels, Forward)

}  // namespace truenorm
