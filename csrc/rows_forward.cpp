// Memory [N, C, S]: each channel of a sample is one run of S values, and each group of channels of
// a sample is one run of C / G · S values.
#include "rows.h"

namespace truenorm {
namespace {

// The part of a group that lies in [begin, end) of its C / G · S values: body(first channel within
// the group, first value within the group, runs, values of each), a channel that is cut by itself.
template <class Body>
void by_channel(int64_t s, int64_t begin, int64_t end, const Body& body) {
  for (int64_t i = begin; i < end;) {
    const int64_t channel = i / s, next = (channel + 1) * s;
    const bool whole = i % s == 0 && next <= end;
    const int64_t runs = whole ? std::min(kRunsTogether, (end - i) / s) : 1;
    const int64_t count = whole ? s : std::min(end, next) - i;
    body(channel, i, runs, count);
    i += runs * count;
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
    Affine<T> by[kRunsTogether];
    by_channel(g.s, begin, end, [&](int64_t channel, int64_t i, int64_t runs, int64_t count) {
      for (int64_t j = 0; j < runs; ++j)
        by[j] = Affine<T>(f.mean[statistic], rstd, f.weight, f.bias, first_channel + channel + j);
      apply_runs(f, offset + i, runs, count, by);
    });
  }
  fence(f.stream);
}

constexpr int64_t kNear = int64_t{16} << 10;  // bytes that are still in L1 for the second pass

constexpr int64_t kGroupsTogether = 64;

// y of neighbouring groups whose channels are runs.
template <class T>
void apply_some(const Forward<T>& f, int64_t first, int64_t some, const double* rstds) {
  const Geometry& g = f.geometry;
  const int64_t per_group = g.channels_per_group();
  Affine<T> by[kRunsTogether];
  int64_t runs = 0, offset = first * per_group * g.s, channel = first * per_group % g.c;
  const auto flush = [&] {
    apply_runs(f, offset, runs, g.s, by);
    offset += runs * g.s;
    runs = 0;
  };
  for (int64_t j = 0; j < some; ++j)
    for (int64_t k = 0; k < per_group; ++k) {
      by[runs++] = Affine<T>(f.mean[first + j], rstds[j], f.weight, f.bias, channel);
      if (++channel == g.c) channel = 0;
      if (runs == kRunsTogether) flush();
    }
  if (runs > 0) flush();
}

// Neighbouring groups of few values: a root and a division after the other take longer than these.
template <class T>
void forward_some(const Forward<T>& f, int64_t first, int64_t some) {
  const Geometry& g = f.geometry;
  const int64_t len = g.values_per_statistic();
  for (int64_t j = 0; !f.fixed && j < some; j += kRowsTogether) {
    const int64_t at = first + j, rows = std::min<int64_t>(kRowsTogether, some - j);
    Moments of_rows[kRowsTogether];
    if (!f.rows)
      f.kernels.row_moments(f.x + at * len, rows, len, (g.num_statistics() - at) * len, g.centred,
                            of_rows);
    for (int64_t r = 0; r < rows; ++r) {
      if (f.rows && !f.skips(at + r))
        of_rows[r] = f.kernels.moments(f.x + (at + r) * len, 1, len, 0, g.centred);
      f.set(at + r, of_rows[r]);
    }
  }
  if (!f.y) return;
  double rstds[kGroupsTogether];
  for (int64_t j = 0; j < some; ++j) rstds[j] = f.rstd(first + j);
  if (g.s > 1) {
    apply_some(f, first, some, rstds);
  } else if (!f.rows && !f.acts()) {
    RowAffine<T> rows[kRowsTogether];
    for (int64_t j = 0; j < some; ++j) rows[j] = row_affine(f, first + j, rstds[j], 0);
    f.kernels.apply_rows(f.x + first * len, f.y + first * len, some, len, rows, f.stream);
  } else {
    for (int64_t j = some - 1; j >= 0; --j) apply_group(f, first + j, rstds[j], 0, len);
  }
  fence(f.stream);
}

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
    // rows of one value per channel have more coefficients than a run's
    const int64_t most = g.s == 1 ? kRowsTogether : kNear / int64_t(sizeof(T)) / len;
    const int64_t some = std::min(most / kRowsTogether * kRowsTogether, kGroupsTogether);
    return parallel(ceil_div(statistics, some), some * len, [&](int64_t task) {
      forward_some(f, task * some, std::min(some, statistics - task * some));
    });
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
  if (!f.geometry.over_batch())
    forward_groups(f);
  else if (gathers(f.geometry) && !f.fixed)
    forward_gathered(f);
  else
    forward_batch(f);
}

TN_EVERY_TYPE(forward_rows, Forward)

}  // namespace truenorm
