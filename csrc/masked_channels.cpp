// Memory [M, P, C]: M matrices of P positions by C channels, of whose rows those count that lie at
// valid positions. Sums go down the rows where these lie side by side, else down a packed copy;
// outputs go from the input to their place.
#include <array>

#include "channels.h"
#include "masked.h"
#include "tensors.h"

namespace truenorm {
namespace {

using Runs = std::vector<Valid::Run>;

// Batch statistics see one matrix of all samples' positions, the others one matrix per sample; so
// does the mask, see call.cpp.
struct Matrices {
  int64_t count, positions, channels;

  explicit Matrices(const Geometry& g)
      : count(g.over_batch() ? 1 : g.n),
        positions(g.over_batch() ? g.n * g.s : g.s),
        channels(g.c) {}

  int64_t values() const { return positions * channels; }
};

// The geometry of some rows that lie side by side.
Geometry of_rows(const Geometry& g, int64_t rows) {
  if (g.over_batch()) return {rows, g.c, 1, g.memory, {}, {}, true, 0, g.centred};
  return {1, g.c, rows, g.memory, {}, {}, true, g.num_groups, g.centred};
}

template <class T>
T* pack_rows(const T* from, const Runs& runs, int64_t channels, T* to) {
  for (const Valid::Run& run : runs) {
    std::memcpy(to, from + run.begin * channels, size_t(run.count * channels) * sizeof(T));
    to += run.count * channels;
  }
  return to;
}

// The parts of a matrix's runs that lie in [begin, end).
Runs within(const Runs& runs, int64_t begin, int64_t end) {
  Runs found;
  auto run = std::partition_point(runs.begin(), runs.end(),
                                  [&](const Valid::Run& r) { return r.begin + r.count <= begin; });
  for (; run != runs.end() && run->begin < end; ++run) {
    const int64_t first = std::max(begin, run->begin);
    found.push_back({first, std::min(end, run->begin + run->count) - first});
  }
  return found;
}

// Cuts the valid rows, in order, into units of about kPiece values: by mask and shape alone, so
// that the bits do not depend on the number of threads.
std::vector<Runs> units_of(const Runs& runs, const Cut& cut) {
  const int64_t rows = cut.rows_per_piece * cut.fold;
  std::vector<Runs> units;
  int64_t room = 0;
  for (Valid::Run run : runs)
    while (run.count > 0) {
      if (room == 0) units.emplace_back(), room = rows;
      const int64_t some = std::min(room, run.count);
      units.back().push_back({run.begin, some});
      run = {run.begin + some, run.count - some};
      room -= some;
    }
  return units;
}

int64_t rows_of(const Runs& unit) {
  int64_t rows = 0;
  for (const Valid::Run& run : unit) rows += run.count;
  return rows;
}

// body(values of each tensor, rows) of a unit: where they lie, or packed
template <class T, size_t In, class Body>
void side_by_side(const std::array<const T*, In>& from, const Runs& unit, int64_t channels,
                  const Body& body) {
  std::array<const T*, In> values = from;
  const int64_t rows = rows_of(unit);
  if (unit.size() == 1) {
    for (auto& each : values) each += unit[0].begin * channels;
    return body(values, rows);
  }
  const PackedMemory<T> memory(rows * channels * int64_t{In});
  T* to = memory.get();
  for (size_t k = 0; k < In; ++k) {
    values[k] = to;
    to = pack_rows(from[k], unit, channels, to);
  }
  body(values, rows);
}

// Writes rows [begin, end) of a matrix: apply(offset, rows, values of a row) where they are valid,
// `fill` elsewhere. Rows of few values are folded, and all of them written, if runs are short.
template <class T, class Apply>
void write_rows(const Matrices& of, const Runs& runs, int64_t m, int64_t begin, int64_t end,
                int64_t fold, T* to, T fill, const Apply& apply) {
  const int64_t channels = of.channels, offset = m * of.values();
  const auto rows = [&](int64_t first, int64_t count) {
    const int64_t at = offset + first * channels, whole = count / fold;
    if (whole > 0) apply(at, whole, fold * channels);
    if (count % fold > 0) apply(at + whole * fold * channels, 1, count % fold * channels);
  };
  const Runs here = within(runs, begin, end);
  if (rows_of(here) < 2 * fold * int64_t(here.size())) {
    rows(begin, end - begin);
  } else {
    for (const Valid::Run& run : here) rows(run.begin, run.count);
  }
  int64_t at = begin;
  const auto gap = [&](int64_t first, int64_t last) {
    if (last > first) fill_values(to + offset + first * channels, (last - first) * channels, fill);
  };
  for (const Valid::Run& run : here) {
    gap(at, run.begin);
    at = run.begin + run.count;
  }
  gap(at, end);
}

// A whole matrix.
template <class T, class Apply>
void write(const Matrices& of, const Runs& runs, int64_t m, int64_t fold, T* to, T fill,
           const Apply& apply) {
  const int64_t per_task = std::max<int64_t>(1, kPiece / (fold * of.channels)) * fold;
  // what was read last is still nearest
  parallel<true>(ceil_div(of.positions, per_task), per_task * of.channels, [&](int64_t i) {
    const int64_t begin = i * per_task, end = std::min(of.positions, begin + per_task);
    write_rows(of, runs, m, begin, end, fold, to, fill, apply);
  });
}

template <class T>
void write_outputs(const Forward<T>& f, const Matrices& of, int64_t m, int64_t fold) {
  const ForwardCoefficients<T> by(f, m, 1, fold);
  write(
      of, f.valid->runs(m), m, fold, f.y, f.padding,
      [&](int64_t offset, int64_t rows, int64_t len) { apply_rows(f, offset, rows, len, by(0)); });
}

// The gradient of what the activation is applied to, before it is first read.
template <class T>
void make_inner(const Backward<T>& b, const Matrices& of, int64_t m, int64_t fold) {
  if (!b.inner) return;
  const ForwardCoefficients<T> by(b, m, 1, fold);
  write(of, b.valid->runs(m), m, fold, b.inner, T{},
        [&](int64_t offset, int64_t rows, int64_t len) {
          inner_rows(b, offset, rows, len, len, by(0));
        });
}

template <class T>
void write_gradients(const Backward<T>& b, const Matrices& of, int64_t m, int64_t fold,
                     const GradSums* sums, double count) {
  const BackwardCoefficients<T> by(b, m, 1, fold, sums, count);
  write(of, b.valid->runs(m), m, fold, b.grad_x, T{},
        [&](int64_t offset, int64_t rows, int64_t len) { grad_rows(b, offset, rows, len, by(0)); });
}

// body(sample), shortest and longest in turn, where samples are sorted by length
template <class Body>
void over_samples(const Geometry& g, const Body& body) {
  parallel(g.n, g.c * g.s, [&](int64_t k) { body(k % 2 ? g.n - 1 - k / 2 : k / 2); });
}

template <class T>
void forward_samples(const Forward<T>& f) {
  const Geometry& g = f.geometry;
  const Matrices of(g);
  over_samples(g, [&](int64_t n) {
    const int64_t first = n * g.groups(), rows = f.valid->count(n);
    if (rows == 0) {
      for (int64_t i = first; i < first + g.groups() && !f.fixed; ++i) f.set(i, {});
      if (f.y) fill_values(f.y + n * of.values(), of.values(), f.padding);
      return;
    }
    const Geometry packed = of_rows(g, rows);
    if (!f.fixed)
      side_by_side<T, 1>(
          {f.x + n * of.values()}, f.valid->runs(n), g.c, [&](const auto& x, int64_t) {
            forward_channels(Forward<T>{packed, f.kernels, f.eps, x[0], nullptr, nullptr, nullptr,
                                        f.mean + first, f.var + first, false, false});
          });
    if (f.y) write_outputs(f, of, n, Cut(packed).fold);
  });
}

template <class T>
void backward_samples(const Backward<T>& b) {
  const Geometry& g = b.geometry;
  const Matrices of(g);
  const auto own = scratch<GradSums>(b.sums ? 0 : g.n * g.c);
  over_samples(g, [&](int64_t n) {
    const int64_t first = n * g.groups(), rows = b.valid->count(n);
    GradSums* const sums = (b.sums ? b.sums : own.get()) + n * g.c;
    const double count = double(rows * g.channels_per_group());
    const auto zeros = [&](T* to) {
      if (to) fill_values(to + n * of.values(), of.values(), T{});
    };
    if (rows == 0) return zeros(b.inner), zeros(b.grad_x);
    const Geometry packed = of_rows(g, rows);
    const int64_t fold = Cut(packed).fold;
    make_inner(b, of, n, fold);
    const std::array<const T*, 2> from{b.norm_grad() + n * of.values(), b.x + n * of.values()};
    if (b.summing())
      side_by_side<T, 2>(from, b.valid->runs(n), g.c, [&](const auto& values, int64_t) {
        backward_channels(Backward<T>{packed, b.kernels, b.eps, values[0], values[1], nullptr,
                                      nullptr, b.mean + first, b.var + first, false, false, sums});
      });
    if (b.alone(count)) return zeros(b.grad_x);
    if (b.grad_x) write_gradients(b, of, n, fold, sums, count);
  });
}

// Statistics of the batch, from those of its units.
template <class T>
void batch_statistics(const Forward<T>& f, const Cut& whole) {
  const Geometry& g = f.geometry;
  const std::vector<Runs> units = units_of(f.valid->runs(0), whole);
  const int64_t count = int64_t(units.size());
  const auto mean = scratch<double>(count * g.c), var = scratch<double>(count * g.c);
  parallel(count, whole.rows_per_piece * whole.cols, [&](int64_t u) {
    side_by_side<T, 1>({f.x}, units[u], g.c, [&](const auto& x, int64_t rows) {
      const Geometry packed = of_rows(g, rows);
      forward_channels(Forward<T>{packed, f.kernels, f.eps, x[0], nullptr, nullptr, nullptr,
                                  mean.get() + u * g.c, var.get() + u * g.c, false, false});
    });
  });
  // Moments::merge, for many channels side by side
  std::fill_n(f.mean, g.c, 0.0);
  std::fill_n(f.var, g.c, 0.0);
  double rows = 0.0;
  for (int64_t u = 0; u < count; ++u) {
    const double some = double(rows_of(units[u])), total = rows + some, share = some / total;
    for (int64_t c = 0; c < g.c; ++c) {
      const double delta = mean[u * g.c + c] - f.mean[c];
      // the first unit as it is, so that nothing is lost of it
      f.mean[c] = u ? f.mean[c] + delta * share : mean[c];
      const double between = u ? delta * delta * rows * share : 0.0;
      f.var[c] += var[u * g.c + c] * some + between;
    }
    rows = total;
  }
  for (int64_t c = 0; c < g.c; ++c) f.var[c] = rows > 0.0 ? f.var[c] / rows : 0.0;
}

template <class T>
void forward_batch(const Forward<T>& f) {
  const Matrices of(f.geometry);
  const Cut whole(f.geometry);
  if (!f.fixed) batch_statistics(f, whole);
  if (!f.y) return;
  if (f.valid->count(0) == 0) return fill_values(f.y, of.values(), f.padding);
  write_outputs(f, of, 0, whole.fold);
}

// The sums of every unit, and before them, with the gaps behind it, its inner gradient.
template <class T>
void batch_sums(const Backward<T>& b, const Matrices& of, const Cut& whole, GradSums* sums) {
  const Geometry& g = b.geometry;
  const Runs& runs = b.valid->runs(0);
  const std::vector<Runs> units = units_of(runs, whole);
  const int64_t count = int64_t(units.size());
  const auto of_unit = scratch<GradSums>(count * g.c);
  const ForwardCoefficients<T> by(b, 0, b.inner ? 1 : 0, whole.fold);
  parallel(count, 2 * whole.rows_per_piece * whole.cols, [&](int64_t u) {
    if (b.inner) {
      const int64_t begin = u ? units[u][0].begin : 0;
      const int64_t end = u + 1 < count ? units[u + 1][0].begin : of.positions;
      write_rows(of, runs, 0, begin, end, whole.fold, b.inner, T{},
                 [&](int64_t offset, int64_t rows, int64_t len) {
                   inner_rows(b, offset, rows, len, len, by(0));
                 });
    }
    side_by_side<T, 2>({b.norm_grad(), b.x}, units[u], g.c, [&](const auto& values, int64_t rows) {
      const Geometry packed = of_rows(g, rows);
      backward_channels(Backward<T>{packed, b.kernels, b.eps, values[0], values[1], nullptr,
                                    nullptr, b.mean, b.var, false, false, of_unit.get() + u * g.c});
    });
  });
  for (int64_t u = 0; u < count; ++u)
    for (int64_t c = 0; c < g.c; ++c) sums[c].add(of_unit[u * g.c + c]);
}

template <class T>
void backward_batch(const Backward<T>& b) {
  const Geometry& g = b.geometry;
  const Matrices of(g);
  const Cut whole(g);
  const auto own = scratch<GradSums>(b.sums ? 0 : g.c);
  GradSums* const sums = b.sums ? b.sums : own.get();
  const double rows = double(b.valid->count(0));
  if (b.summing() && rows > 0.0)
    batch_sums(b, of, whole, sums);
  else
    make_inner(b, of, 0, whole.fold);
  if (!b.grad_x) return;
  if (rows == 0.0 || b.alone(rows)) return fill_values(b.grad_x, of.values(), T{});
  write_gradients(b, of, 0, whole.fold, sums, rows);
}

}  // namespace

template <class T>
void masked_forward_channels(const Forward<T>& f) {
  f.geometry.over_batch() ? forward_batch(f) : forward_samples(f);
}

template <class T>
void masked_backward_channels(const Backward<T>& b) {
  b.geometry.over_batch() ? backward_batch(b) : backward_samples(b);
}

TN_EVERY_TYPE(masked_forward_channels, Forward)
TN_EVERY_TYPE(masked_backward_channels, Backward)

}  // namespace truenorm
