// LocalResponseNorm in float64, a whole tile at a time: for float64 itself, for windows and
// exponents that the float32 code does not take, and for what it could not compute.
#pragma once

#include <algorithm>
#include <cmath>

#include "kernel_blocks.h"

namespace truenorm {
namespace {

template <class T>
void widen(const T* in, double* out, int64_t len) {
  int64_t i = 0;
  for (; i + D <= len; i += D) store_raw(out + i, Lane<T>::load_double(in + i));
  for (; i < len; ++i) out[i] = to_double(in[i]);
}

template <class T>
void narrow(const double* in, T* out, int64_t len) {
  int64_t i = 0;
  for (; i + D <= len; i += D) Lane<T>::store_double(out + i, load_raw<vd>(in + i));
  if (i == len) return;
  Padded<double> padded;
  Padded<T> result;
  Padded<double>::fill(padded, in + i, len - i, 0.0);
  for (int r = 0; r < R; ++r) {
    Lane<T>::store_double(result.values + r * D, load_raw<vd>(padded.values + r * D));
  }
  std::memcpy(out + i, result.values, size_t(len - i) * sizeof(T));
}

// narrow, to those places that hold no finite value
template <class T>
void repair(const double* in, T* out, int64_t len) {
  for (int64_t i = 0; i < len; i += kLanes) {
    T exact[kLanes];
    const int64_t count = std::min<int64_t>(kLanes, len - i);
    narrow(in + i, exact, count);
    for (int64_t j = 0; j < count; ++j)
      if (!std::isfinite(to_double(out[i + j]))) out[i + j] = exact[j];
  }
}

TN_INLINE vd root(vd v) {
#if defined(__AVX512F__)
  return (vd)_mm512_maskz_sqrt_pd(0xff, (__m512d)v);
#elif defined(__AVX__)
  return (vd)_mm256_sqrt_pd((__m256d)v);
#else
  for (int i = 0; i < D; ++i) v[i] = __builtin_sqrt(v[i]);
  return v;
#endif
}

TN_INLINE vd exact_power(vd d, double beta) {
  if (beta == 0.75) {
    const vd half = root(d);
    return 1.0 / (half * root(half));
  }
  if (beta == 0.5) return 1.0 / root(d);
  if (beta == 1.0) return 1.0 / d;
  for (int i = 0; i < D; ++i) d[i] = std::pow(d[i], -beta);
  return d;
}

// f(i) for vectors at i < len; up to a vector more is written.
template <class Fn>
TN_INLINE void fill(double* to, int64_t len, const Fn& f) {
  for (int64_t i = 0; i < len; i += D) store_raw(to + i, f(i));
}

// sum[i] = in[i] + in[i + step] + … , `count` terms, i < len. By doubling, in place: never by
// subtracting, which would spread a NaN to windows that do not hold it, and lose digits.
inline void window_sums(double* in, double* sum, int64_t len, int64_t count, int64_t step) {
  int64_t done = 0, left = len + (count - 1) * step;
  fill(sum, len, [](int64_t) TN_FLAT { return vd{}; });
  for (int64_t width = 1; width <= count; width *= 2) {
    if (count & width) {
      const double* part = in + done * step;
      fill(sum, len,
           [&](int64_t i) TN_FLAT { return load_raw<vd>(sum + i) + load_raw<vd>(part + i); });
      done += width;
    }
    left -= width * step;
    if (2 * width > count) break;
    const double* next = in + width * step;
    fill(in, left,
         [&](int64_t i) TN_FLAT { return load_raw<vd>(in + i) + load_raw<vd>(next + i); });
  }
}

// A tile as `runs` runs of `len` values `stride` apart, a channel's neighbour `step` values away.
template <class T>
struct ExactTile {
  const ResponseTile& t;
  int64_t runs, len, stride, step;

  int64_t values() const { return runs * len; }

  void read(const T* from, double* to) const {
    for (int64_t r = 0; r < runs; ++r) widen(from + r * stride, to + r * len, len);
  }

  void run(const T* grad, const T* x, T* out, double* scratch, bool repairing) const {
    const int64_t n = values();
    const int64_t before = std::min(t.size / 2, t.channels - 1),
                  after = std::min(t.size - 1 - t.size / 2, t.channels - 1);
    const int64_t room = n + (before + after) * step + kLanes;
    double *v = scratch, *g = v + room, *d = g + room, *sum = d + room, *terms = sum + room;
    const auto sum_of = [&](int64_t low, int64_t high, const auto& term) {
      double* first = terms + low * step;
      fill(first, n, term);
      std::fill(terms, first, 0.0);
      std::fill(first + n, terms + room, 0.0);
      window_sums(terms, sum, n, low + high + 1, step);
    };
    read(x, v);
    sum_of(before, after,
           [&](int64_t i) TN_FLAT { return load_raw<vd>(v + i) * load_raw<vd>(v + i); });
    fill(d, n, [&](int64_t i) TN_FLAT { return t.k + t.alpha * load_raw<vd>(sum + i); });
    if (!grad) {
      fill(sum, n, [&](int64_t i) TN_FLAT {
        return load_raw<vd>(v + i) * exact_power(load_raw<vd>(d + i), t.beta);
      });
    } else {
      read(grad, g);
      fill(g, n, [&](int64_t i) TN_FLAT {
        return load_raw<vd>(g + i) * exact_power(load_raw<vd>(d + i), t.beta);
      });
      // those channels whose window holds this one
      sum_of(after, before, [&](int64_t i) TN_FLAT {
        return load_raw<vd>(g + i) * load_raw<vd>(v + i) / load_raw<vd>(d + i);
      });
      const double factor = 2.0 * t.alpha * t.beta;
      fill(sum, n, [&](int64_t i) TN_FLAT {
        return load_raw<vd>(g + i) - factor * load_raw<vd>(v + i) * load_raw<vd>(sum + i);
      });
    }
    for (int64_t r = 0; r < runs; ++r) {
      T* to = out + r * stride;
      repairing ? repair(sum + r * len, to, len) : narrow(sum + r * len, to, len);
    }
  }
};

template <class T>
void response_exact(const ResponseTile& t, const T* grad, const T* x, T* out, double* scratch,
                    bool repairing) {
  if (t.stride) {
    const ExactTile<T> tile{t, t.channels, t.positions, t.stride, t.positions};
    return tile.run(grad, x, out, scratch, repairing);
  }
  const ExactTile<T> one{t, 1, t.channels, 0, 1};
  for (int64_t p = 0; p < t.positions; ++p) {
    const int64_t at = p * t.channels;
    one.run(grad ? grad + at : nullptr, x + at, out + at, scratch, repairing);
  }
}

}  // namespace
}  // namespace truenorm
