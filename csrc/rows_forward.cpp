// Memory [N, C, S]: each channel of a sample is one run of S values, and each group of channels of
// a sample is one run of C / G · S values.
#include "rows.h"

namespace truenorm {
namespace {

// The part of a group that lies in [begin, end) of its C / G · S values, channel by channel:
// body(channel within the group, first value within the group, number of values).
template <class Body>
void by_channel(int64_t s, int64_t begin, int64_t end, const Body& body) {
  for (int64_t i = begin; i < end;) {
    const int64_t channel = i / s;
    const int64_t stop = std::min(end, (channel + 1) * s);
    body(channel, i, stop - i);
    i = stop;
  }
}

// Of a row, or what of it begins with value `begin`.
template <class T>
RowAffine<T> row_affine(const Forward<T>& f, int64_t statistic, double rstd, int64_t begin) {
  const Geometry& g = f.geometry;
  const int64_t at = statistic % g.groups() * g.channels_per_group() + begin;
  return {f.mean[statistic], rstd, f.weight ? f.weight + at : nullptr,
          f.bias ? f.bias + at : nullptr, f.rounds};
}

template <class T>
void apply_group(const Forward<T>& f, int64_t statistic, double rstd, int64_t begin, int64_t end) {
  const Geometry& g = f.geometry;
  const int64_t per_group = g.channels_per_group();
  const int64_t first_channel = statistic % g.groups() * per_group;
  const int64_t offset = statistic * per_group * g.s;
  if (f.skips(statistic)) return fill_values(f.y + offset + begin, end - begin, f.padding);
  if (g.s == 1) {
    const RowAffine<T> row = row_affine(f, statistic, rstd, begin);
    const int64_t at = offset + begin, count = end - begin;
    if (f.acts())
      f.kernels.act_row(f.inputs(at), f.y + at, count, row, f.act, f.stream);
    else
      f.kernels.apply_rows(f.x + at, f.y + at, 1, count, &row, f.stream);
  } else {
    by_channel(g.s, begin, end, [&](int64_t channel, int64_t i, int64_t count) {
      const Affine<T> a(f.mean[statistic], rstd, f.weight, f.bias, first_channel + channel);
      apply_runs(f, offset + i, 1, count, &a);
    });
  }
  fence(f.stream);
}

constexpr int64_t kNear = int64_t{8} << 10;  // bytes that are still in L1 for the second pass

// Statistics of each sample's groups. A group that fits in cache is read from memory once.
template <class T>
void forward_groups(const Forward<T>& f) {
  const Geometry& g = f.geometry;
  const int64_t statistics = g.num_statistics(), len = g.values_per_statistic();
  const int64_t pieces = ceil_div(len, kPiece);
  const auto begin = [&](int64_t p) { return p * kPiece; };
  const auto end = [&](int64_t p) { return std::min(len, (p + 1) * kPiece); };
  const auto of_piece = [&](int64_t i, int64_t p) {
    if (f.skips(i)) return Moments{};
    return f.kernels.moments(f.x + i * len + begin(p), 1, end(p) - begin(p), 0, g.centred);
  };
  if (kRowsTogether * len * int64_t(sizeof(T)) <= kNear) {
    // some at a time, for a root and a division after the other take longer than a short row
    constexpr int64_t kSome = kRowsTogether;
    parallel(ceil_div(statistics, kSome), kSome * len, [&](int64_t task) {
      const int64_t first = task * kSome, some = std::min(kSome, statistics - first);
      if (!f.fixed) {
        Moments of_rows[kSome];
        const bool skips = f.rows != nullptr;
        if (!skips)
          f.kernels.row_moments(f.x + first * len, some, len, (statistics - first) * len, g.centred,
                                of_rows);
        for (int64_t j = 0; j < some; ++j)
          f.set(first + j, skips ? of_piece(first + j, 0) : of_rows[j]);
      }
      if (!f.y) return;
      double rstds[kSome];
      for (int64_t j = 0; j < some; ++j) rstds[j] = f.rstd(first + j);
      if (g.s == 1 && !f.rows && !f.acts()) {
        RowAffine<T> rows[kSome];
        for (int64_t j = 0; j < some; ++j) rows[j] = row_affine(f, first + j, rstds[j], 0);
        f.kernels.apply_rows(f.x + first * len, f.y + first * len, some, len, rows, f.stream);
        return fence(f.stream);
      }
      for (int64_t j = some - 1; j >= 0; --j) apply_group(f, first + j, rstds[j], 0, len);
    });
    return;
  }
  const bool in_cache = len * int64_t(sizeof(T)) <= kInCache;
  if (pieces == 1 || (in_cache && busy(statistics))) {
    parallel(statistics, len, [&](int64_t i) {
      if (!f.fixed) {
        Moments m;
        for (int64_t p = 0; p < pieces; ++p) m.merge(of_piece(i, p));
        f.set(i, m);
      }
      if (!f.y) return;
      // the piece that was read last is still nearest
      for (int64_t p = pieces - 1; p >= 0; --p) apply_group(f, i, f.rstd(i), begin(p), end(p));
    });
    return;
  }
  if (!f.fixed) {
    const auto partial = scratch<Moments>(statistics * pieces);
    parallel(statistics * pieces, kPiece,
             [&](int64_t i) { partial[i] = of_piece(i / pieces, i % pieces); });
    for (int64_t i = 0; i < statistics; ++i) {
      Moments m;
      for (int64_t p = 0; p < pieces; ++p) m.merge(partial[i * pieces + p]);
      f.set(i, m);
    }
  }
  if (!f.y) return;
  parallel<true>(statistics * pieces, kPiece, [&](int64_t i) {
    apply_group(f, i / pieces, f.rstd(i / pieces), begin(i % pieces), end(i % pieces));
  });
}

// One statistic per channel over the batch. A channel that fits in cache is read from memory once.
template <class T>
void forward_batch(const Forward<T>& f) {
  const Geometry& g = f.geometry;
  const auto affine = scratch<Affine<T>>(g.c);
  const auto set_affine = [&](int64_t c) {
    affine[c] = Affine<T>(f.mean[c], f.rstd(c), f.weight, f.bias, c);
  };
  const auto apply = [&](int64_t channel, int64_t offset, int64_t runs, int64_t len) {
    apply_runs(f, offset, runs, len, affine.get() + channel);
    fence(f.stream);
  };
  if (!f.fixed) {
    const BatchCut cut(g);
    const auto moments = [&](int64_t channel, int64_t part) {
      return of_part(g, cut, channel, part, [&](int64_t offset, int64_t runs, int64_t len) {
        return f.kernels.moments(f.x + offset, runs, len, g.c * g.s, true);
      });
    };
    const auto merge = [&](int64_t channel, const auto& of_part) {
      Moments m;
      for (int64_t part = 0; part < cut.count(); ++part) m.merge(of_part(part));
      f.set(channel, m);
    };
    if (const int64_t channels = f.y ? channels_in_cache<T>(g, 1) : 0) {
      over_channels(g, channels, [&](int64_t first, int64_t count) {
        for (int64_t c = first; c < first + count; ++c) {
          merge(c, [&](int64_t part) { return moments(c, part); });
          set_affine(c);
        }
        for (int64_t n = g.n - 1; n >= 0; --n) apply(first, (n * g.c + first) * g.s, count, g.s);
      });
      return;
    }
    over_batch<Moments>(g, cut, moments, merge);
  }
  if (!f.y) return;
  for (int64_t c = 0; c < g.c; ++c) set_affine(c);
  over_runs(g, apply);
}

}  // namespace

template <class T>
void forward_rows(const Forward<T>& f) {
  if (f.geometry.over_batch())
    forward_batch(f);
  else
    forward_groups(f);
}

TN_EVERY_TYPE(forward_rows, Forward)

}  // namespace truenorm
