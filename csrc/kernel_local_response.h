// LocalResponseNorm in float32, one pass over memory: a ring of the last few channels' squares is
// all that is kept. What float32 may get wrong comes out as NaN or Inf, and is computed again by
// kernel_local_response_exact.h: whether it does depends on the values of the windows concerned
// alone, never on the rest of the tile.
#pragma once

#include <algorithm>

#include "kernel_blocks.h"

namespace truenorm {
namespace {

// How far from 1 the denominators may be in float32. The squares then neither overflow nor lose
// what counts, and in the backward, where x / d · grad is formed, what is lost below float32's
// range is less than its smallest normal number.
template <bool backward>
constexpr float kLargest = backward ? 0x1p30f : 0x1p60f;

// From where on a float is an infinity of the storage type.
template <class T>
constexpr float kOverflow = __builtin_inff();
template <>
constexpr float kOverflow<bf16> = 0x1.ffp127f;
template <>
constexpr float kOverflow<f16> = 65520.0f;

template <class T>
TN_INLINE vf load_some(const T* p, int64_t count) {
  if (count == F) return Lane<T>::load(p);
  Padded<T, F> padded;
  return Lane<T>::load(Padded<T, F>::fill(padded, p, count, T{}));
}

template <class T>
TN_INLINE void store_some(T* p, vf v, int64_t count) {
  if (count == F) return Lane<T>::store(p, v);
  Padded<T, F> padded;
  Lane<T>::store(padded.values, v);
  std::memcpy(p, padded.values, size_t(count) * sizeof(T));
}

// body(first, count), a vector at a time; the last one ends where the run does.
template <class Body>
TN_INLINE void vectors(int64_t len, const Body& body) {
  if (len < F) return body(0, len);
  blocks<F>(len, [&](int64_t i, int) TN_FLAT { body(i, int64_t{F}); });
}

// d^(−quarters / 4), and what is needed for 1 / d. Square roots and divisions take longer (a tenth
// of the forward, a quarter of the backward), and the processor's own estimates differ from one
// instruction set to the next.
template <int quarters>
struct Power {
  vf fourth, error, value;

  TN_INLINE Power of(vf d) {
    // a straight line through the exponent, within 3 % of d^(−1/4), then one step of third order
    // whose coefficients are fitted to that interval: within 6e-5
    vf r = (vf)(0x4f5837d0 - ((vi)d >> 2));
    vf square = r * r;
    vf e = 1.0f - d * (square * square);
    r = r + r * (e * (0.25136056f + 0.15693287f * e));
    square = r * r;
    Power p;
    p.fourth = square * square;
    p.error = e = 1.0f - d * p.fourth;
    // the last step, of third order too, is taken on the power itself: one rounding more, not three
    constexpr float b = float(quarters) / 4.0f;
    const vf rough = quarters == 2 ? square : quarters == 3 ? square * r : p.fourth;
    p.value = rough + rough * (e * (b + b * (b + 1.0f) / 2.0f * e));
    return p;
  }
  TN_INLINE vf inverse(const Power& p) {
    return p.fourth + p.fourth * (p.error + p.error * p.error);
  }
};

// The runs whose sum is a window's.
struct Window {
  const float* run[kResponseSizes];
  int64_t count;
};

// `count` is known to the compiler for the size that networks use
template <int count>
TN_INLINE vf total(const Window& w, int64_t i) {
  vf sum = load_raw<vf>(w.run[0] + i);
#pragma GCC unroll 8
  for (int64_t j = 1; j < (count ? count : w.count); ++j) sum += load_raw<vf>(w.run[j] + i);
  return sum;
}

template <class T, bool backward, int quarters>
struct Response {
  static constexpr float kLow = 1.0f / kLargest<backward>, kHigh = kLargest<backward>;
  float alpha, k, factor;
  vi bad = {};  // lanes that have had a result which is not finite

  explicit Response(const ResponseTile& t)
      : alpha(float(t.alpha)), k(float(t.k)), factor(float(2.0 * t.alpha * t.beta)) {}

  static void squares(const T* x, float* square, int64_t len) {
    vectors(len, [&](int64_t i, int64_t count) TN_FLAT {
      const vf v = load_some(x + i, count);
      store_raw(square + i, v * v);
    });
  }

  template <int count>
  TN_INLINE Power<quarters> power(const Response& r, const Window& w, int64_t i) {
    const vf d = r.k + r.alpha * total<count>(w, i);
    Power<quarters> p = Power<quarters>::of(d);
    const vi outside = ~((d >= kLow) & (d <= kHigh));
    p.value = (vf)((vi)p.value | outside);
    return p;
  }

  TN_INLINE void finish(Response& r, T* out, vf v, int64_t count) {
    r.bad |= ~(magnitude(v) < kOverflow<T>);
    store_some(out, v, count);
  }

  template <int count>
  static void outputs(Response& self, const Window& w, const T* x, T* y, int64_t len) {
    Response r = self;
    vectors(len, [&](int64_t i, int64_t n) TN_FLAT {
      finish(r, y + i, load_some(x + i, n) * power<count>(r, w, i).value, n);
    });
    self.bad = r.bad;
  }

  // scaled = grad · d^−beta, across = scaled · x / d
  template <int count>
  static void across(Response& self, const Window& w, const T* grad, const T* x, float* scaled,
                     float* out, int64_t len) {
    const Response r = self;
    vectors(len, [&](int64_t i, int64_t n) TN_FLAT {
      const Power<quarters> p = power<count>(r, w, i);
      const vf s = load_some(grad + i, n) * p.value;
      store_raw(scaled + i, s);
      store_raw(out + i, s * (load_some(x + i, n) * Power<quarters>::inverse(p)));
    });
  }

  template <int count>
  static void gradients(Response& self, const Window& w, const T* x, const float* scaled, T* out,
                        int64_t len) {
    Response r = self;
    vectors(len, [&](int64_t i, int64_t n) TN_FLAT {
      const vf slope = load_some(x + i, n) * r.factor;
      finish(r, out + i, load_raw<vf>(scaled + i) - slope * total<count>(w, i), n);
    });
    self.bad = r.bad;
  }
};

// The channels low … high of a ring that holds `size` channels, each `width` floats.
TN_INLINE Window ring_window(const float* ring, int64_t size, int64_t width, int64_t low,
                             int64_t high) {
  Window w;
  w.count = high - low + 1;
  for (int64_t c = low; c <= high; ++c) w.run[c - low] = ring + c % size * width;
  return w;
}

#define TN_BY_COUNT(call, w, ...) \
  ((w).count == 5 ? call<5>(r, w, __VA_ARGS__) : call<0>(r, w, __VA_ARGS__))

// [N, C, S]: channel after channel, lanes are positions.
template <class T, bool backward, int quarters>
bool response_rows(const ResponseTile& t, const T* grad, const T* x, T* out, float* scratch) {
  using R = Response<T, backward, quarters>;
  const int64_t len = t.positions, width = (len + kLanes - 1) / kLanes * kLanes,
                last = t.channels - 1;
  const int64_t before = t.size / 2, after = t.size - 1 - before;
  float *square = scratch, *across = square + t.size * width, *scaled = across + t.size * width;
  R r(t);
  int64_t squared = 0;
  for (int64_t c = 0; c <= last + (backward ? before : 0); ++c) {
    if (c <= last) {
      for (; squared <= std::min(last, c + after); ++squared)
        R::squares(x + squared * t.stride, square + squared % t.size * width, len);
      const Window w = ring_window(square, t.size, width, std::max<int64_t>(0, c - before),
                                   std::min(last, c + after));
      const int64_t at = c * t.stride, to = c % t.size * width;
      if constexpr (backward)
        TN_BY_COUNT(R::template across, w, grad + at, x + at, scaled + to, across + to, len);
      else
        TN_BY_COUNT(R::template outputs, w, x + at, out + at, len);
    }
    const int64_t of = c - before;  // the channel whose neighbours are all known now
    if (!backward || of < 0) continue;
    const Window w =
        ring_window(across, t.size, width, std::max<int64_t>(0, of - after), std::min(last, c));
    TN_BY_COUNT(R::template gradients, w, x + of * t.stride, scaled + of % t.size * width,
                out + of * t.stride, len);
  }
  return !any(r.bad);
}

// [N, S, C]: position after position, lanes are channels; zeros stand around each run.
template <class T, bool backward, int quarters>
bool response_channels(const ResponseTile& t, const T* grad, const T* x, T* out, float* scratch) {
  using R = Response<T, backward, quarters>;
  const int64_t len = t.channels, width = (len + kLanes - 1) / kLanes * kLanes + 2 * kResponseSizes;
  const int64_t before = t.size / 2, after = t.size - 1 - before;
  for (int64_t i = 0; i < (backward ? 3 : 1) * width; ++i) scratch[i] = 0.0f;
  float *square = scratch + kResponseSizes, *across = square + width, *scaled = across + width;
  Window of_squares, of_across;
  of_squares.count = of_across.count = t.size;
  for (int64_t j = 0; j < t.size; ++j) {
    of_squares.run[j] = square + j - before;
    of_across.run[j] = across + j - after;
  }
  R r(t);
  for (int64_t p = 0; p < t.positions; ++p) {
    const int64_t at = p * len;
    R::squares(x + at, square, len);
    if constexpr (backward) {
      TN_BY_COUNT(R::template across, of_squares, grad + at, x + at, scaled, across, len);
      TN_BY_COUNT(R::template gradients, of_across, x + at, scaled, out + at, len);
    } else {
      TN_BY_COUNT(R::template outputs, of_squares, x + at, out + at, len);
    }
  }
  return !any(r.bad);
}

template <class T, bool backward, int quarters>
bool response_tile(const ResponseTile& t, const T* grad, const T* x, T* out, float* scratch) {
  return t.stride ? response_rows<T, backward, quarters>(t, grad, x, out, scratch)
                  : response_channels<T, backward, quarters>(t, grad, x, out, scratch);
}

template <class T>
bool response(const ResponseTile& t, const T* grad, const T* x, T* out, float* scratch) {
  if constexpr (std::is_same_v<T, double>)
    return false;
  else {
    const auto with = [&]<bool backward>() {
      if (t.beta == 0.75) return response_tile<T, backward, 3>(t, grad, x, out, scratch);
      if (t.beta == 0.5) return response_tile<T, backward, 2>(t, grad, x, out, scratch);
      return response_tile<T, backward, 4>(t, grad, x, out, scratch);
    };
    return grad ? with.template operator()<true>() : with.template operator()<false>();
  }
}

}  // namespace
}  // namespace truenorm
