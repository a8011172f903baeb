// LocalResponseNorm: each value against the energy of `size` neighbouring channels, cut into tiles.
#include "layers.h"
#include "parallel.h"

namespace truenorm {
namespace {

constexpr int64_t kWidth = 256;    // most positions of a tile in [N, C, S], side by side in memory
constexpr int64_t kValues = 8192;  // values of a tile in [N, S, C]
constexpr int64_t kAligned = 16;

// Whether float32 keeps the promises, by what is the same for every sample. A window of one channel
// is left to float64: there the two terms of the gradient can cancel everywhere at once.
template <class T>
bool in_float(const ResponseTile& t) {
  const bool power = t.beta == 0.5 || t.beta == 0.75 || t.beta == 1.0;
  const bool scale = t.alpha >= 0x1p-60 && t.alpha <= 1.0 && t.k >= 0.0 && t.k <= 0x1p30;
  return !std::is_same_v<T, double> && t.size <= kResponseSizes && t.size > 1 && t.channels > 1 &&
         power && scale;
}

// A tile is all channels of a few positions. In [N, S, C] a position's channels are a run, and the
// samples' positions follow one another; in [N, C, S] a channel's positions are.
template <class T>
void tiles(const Geometry& g, const Kernels<T>& kernels, const T* grad, const T* x, T* out,
           int64_t size, double alpha, double beta, double k) {
  const bool rows = g.memory == Memory::rows && g.s > 1;
  const int64_t samples = rows ? g.n : 1, positions = rows ? g.s : g.n * g.s;
  int64_t width = std::max<int64_t>(1, kValues / g.c);
  if (rows) {
    // as equal as they can be, so that the last one is not a splinter
    const int64_t count = ceil_div(positions, kWidth);
    width = ceil_div(ceil_div(positions, count), kAligned) * kAligned;
  }
  const int64_t per_sample = ceil_div(positions, width);
  const ResponseTile whole{g.c, 0, rows ? g.s : 0, size, alpha / double(size), beta, k};
  const bool fast = in_float<T>(whole);
  const int64_t reach = std::min(size / 2, g.c - 1) + std::min(size - 1 - size / 2, g.c - 1);
  const int64_t window = std::min(size, kResponseSizes);  // of those that go to float
  const int64_t padded = rows ? window * ceil_div(width, kAligned) * kAligned
                              : ceil_div(g.c, kAligned) * kAligned + 2 * kResponseSizes;
  const int64_t wide = 5 * ((g.c + reach) * (rows ? width : 1) + kAligned);
  parallel(samples * per_sample, width * g.c * (grad ? 8 : 4), [&](int64_t i) {
    const int64_t first = i % per_sample * width;
    ResponseTile tile = whole;
    tile.positions = std::min(width, positions - first);
    const int64_t at = i / per_sample * g.c * g.s + first * (rows ? 1 : g.c);
    const T* incoming = grad ? grad + at : nullptr;
    if (fast) {
      const auto memory = scratch<float>((grad ? 3 : 1) * padded);
      if (kernels.response(tile, incoming, x + at, out + at, memory.get())) return;
    }
    const auto memory = scratch<double>(wide);
    kernels.response_exact(tile, incoming, x + at, out + at, memory.get(), fast);
  });
}

}  // namespace

template <class T>
void local_response_norm(const Geometry& g, const Kernels<T>& kernels, const T* x, T* y,
                         int64_t size, double alpha, double beta, double k) {
  tiles<T>(g, kernels, nullptr, x, y, size, alpha, beta, k);
}

template <class T>
void local_response_norm_backward(const Geometry& g, const Kernels<T>& kernels, const T* grad,
                                  const T* x, T* grad_x, int64_t size, double alpha, double beta,
                                  double k) {
  tiles<T>(g, kernels, grad, x, grad_x, size, alpha, beta, k);
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
