// LocalResponseNorm: each value against the energy of `size` neighbouring channels. In float64,
// value by value: the squares of 1e30 leave float32's range.
#include <cmath>

#include "layers.h"
#include "parallel.h"

namespace truenorm {
namespace {

constexpr int64_t kPositions = 64;  // positions of a tile in [N, C, S], side by side in memory

// A tile is all channels of a few positions. In [N, S, C] one position's channels are neighbours,
// in [N, C, S] one channel's positions are; both are copied into [channel][position], float64.
template <class T>
struct Tiles {
  const Geometry& g;
  const Kernels<T>& kernels;
  bool rows;
  int64_t width, per_sample;

  Tiles(const Geometry& geometry, const Kernels<T>& k)
      : g(geometry),
        kernels(k),
        rows(geometry.memory == Memory::rows),
        width(rows ? std::min(kPositions, geometry.s) : 1),
        per_sample(ceil_div(geometry.s, width)) {}

  int64_t count() const { return g.n * per_sample; }
  int64_t size() const { return g.c * width; }
  int64_t first(int64_t tile) const { return tile % per_sample * width; }
  int64_t positions(int64_t tile) const { return std::min(width, g.s - first(tile)); }
  int64_t offset(int64_t tile) const {
    const int64_t sample = tile / per_sample * g.c * g.s;
    return rows ? sample + first(tile) : sample + first(tile) * g.c;
  }

  void read(const T* from, int64_t tile, double* to) const {
    if (!rows) return kernels.widen(from + offset(tile), to, g.c);
    if (positions(tile) < width) std::fill(to, to + size(), 0.0);
    for (int64_t c = 0; c < g.c; ++c)
      kernels.widen(from + offset(tile) + c * g.s, to + c * width, positions(tile));
  }
  void write(const double* from, int64_t tile, T* to) const {
    if (!rows) return kernels.narrow(from, to + offset(tile), g.c);
    for (int64_t c = 0; c < g.c; ++c)
      kernels.narrow(from + c * width, to + offset(tile) + c * g.s, positions(tile));
  }
};

// out[c] = Σ in[c + low … c + high], channels outside counting as zero.
void window(const double* in, double* out, int64_t channels, int64_t width, int64_t low,
            int64_t high) {
  for (int64_t c = 0; c < channels; ++c) {
    double* to = out + c * width;
    std::fill(to, to + width, 0.0);
    for (int64_t j = std::max<int64_t>(0, c + low); j <= std::min(channels - 1, c + high); ++j)
      for (int64_t s = 0; s < width; ++s) to[s] += in[j * width + s];
  }
}

double power(double d, double beta) {
  // the default, 3/4, by two square roots instead of pow
  if (beta == 0.75) {
    const double root = std::sqrt(d);
    return 1.0 / (root * std::sqrt(root));
  }
  return std::pow(d, -beta);
}

// d = k + alpha / size · Σ x² over each channel's window
void denominators(const double* x, double* square, double* d, int64_t channels, int64_t width,
                  int64_t size, double alpha, double k) {
  for (int64_t i = 0; i < channels * width; ++i) square[i] = x[i] * x[i];
  const int64_t before = size / 2;
  window(square, d, channels, width, -before, size - 1 - before);
  for (int64_t i = 0; i < channels * width; ++i) d[i] = k + alpha / double(size) * d[i];
}

}  // namespace

template <class T>
void local_response_norm(const Geometry& g, const Kernels<T>& kernels, const T* x, T* y,
                         int64_t size, double alpha, double beta, double k) {
  const Tiles<T> tiles(g, kernels);
  const int64_t values = tiles.size();
  parallel(tiles.count(), values * (4 + size), [&](int64_t tile) {
    const auto memory = scratch<double>(3 * values);
    double *v = memory.get(), *square = v + values, *d = square + values;
    tiles.read(x, tile, v);
    denominators(v, square, d, g.c, tiles.width, size, alpha, k);
    for (int64_t i = 0; i < values; ++i) v[i] *= power(d[i], beta);
    tiles.write(v, tile, y);
  });
}

template <class T>
void local_response_norm_backward(const Geometry& g, const Kernels<T>& kernels, const T* grad,
                                  const T* x, T* grad_x, int64_t size, double alpha, double beta,
                                  double k) {
  const Tiles<T> tiles(g, kernels);
  const int64_t values = tiles.size(), before = size / 2;
  parallel(tiles.count(), values * (8 + 2 * size), [&](int64_t tile) {
    const auto memory = scratch<double>(5 * values);
    double *v = memory.get(), *g_ = v + values, *d = g_ + values, *across = d + values,
           *sum = across + values;
    tiles.read(x, tile, v);
    tiles.read(grad, tile, g_);
    denominators(v, across, d, g.c, tiles.width, size, alpha, k);
    for (int64_t i = 0; i < values; ++i) {
      g_[i] *= power(d[i], beta);
      across[i] = g_[i] * v[i] / d[i];
    }
    // those channels whose window holds this one
    window(across, sum, g.c, tiles.width, -(size - 1 - before), before);
    const double factor = 2.0 * alpha * beta / double(size);
    for (int64_t i = 0; i < values; ++i) g_[i] -= factor * v[i] * sum[i];
    tiles.write(g_, tile, grad_x);
  });
}

#define TN_INSTANTIATE(T)                                                                         \
  template void local_response_norm<T>(const Geometry&, const Kernels<T>&, const T*, T*, int64_t, \
                                       double, double, double);                                   \
  template void local_response_norm_backward<T>(const Geometry&, const Kernels<T>&, const T*,     \
                                                const T*, T*, int64_t, double, double, double);
TN_INSTANTIATE(double)
TN_INSTANTIATE(float)
TN_INSTANTIATE(bf16)
TN_INSTANTIATE(f16)

}  // namespace truenorm
