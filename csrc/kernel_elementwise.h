// What maps value to value: outputs, and gradients of the input.
#pragma once

#include "kernel_map.h"

namespace truenorm {
namespace {

// bfloat16: y = p + q in float is off by at most 1.5 · 2^-22 of |q|, which is much of y's last
// place where the two cancel, and can turn the rounding wherever y is that near to half way between
// two bfloat16: there the value is computed again in double. Each value is judged by itself,
// whatever its neighbours are. float16, of three more bits, would need it too often to gain: it is
// computed in double throughout.
constexpr float kOff = 3.0f;

// Whether y's distance from half way, in last places of a float, times |y| is less than `off`.
TN_INLINE vi near_half_way(vf y, vf off) {
  const vi distance = ((vi)y & 0xffff) - 0x8000;
  return magnitude(__builtin_convertvector(distance, vf) * y) < off;
}

// p + q, and exact(k, h), half h of vector k in double, where that is needed; off = kOff · |q|.
template <class T, class P, class Exact>
TN_INLINE P sum_exactly(const P& p, const vf (&q)[2], const vf (&off)[2], const Exact& exact) {
  P y;
  if constexpr (std::is_same_v<T, f16>) {
    for (int k = 0; k < 2; ++k) y.v[k] = rejoin(exact(k, 0), exact(k, 1));
    return y;
  }
  vi again[2];
  for (int k = 0; k < 2; ++k) {
    y.v[k] = p.v[k] + q[k];
    again[k] = near_half_way(y.v[k], off[k]);
  }
  if (__builtin_expect(any(again[0] | again[1]), 0))
    for (int k = 0; k < 2; ++k) y.v[k] = again[k] ? rejoin(exact(k, 0), exact(k, 1)) : y.v[k];
  return y;
}

template <class T>
TN_INLINE void apply_run(const T* x, T* y, int64_t len, const Affine<T>& by, bool stream) {
  using P = AnyOrder<T>;
  using V = typename P::V;
  const V hi = splat<V>(by.hi), scale = splat<V>(by.scale), shift = splat<V>(by.shift);
  if constexpr (is_half<T>) {
    const vf off = magnitude(shift) * kOff;
    map<P, 1>({x}, y, len, stream, [&](const P* v, int64_t) TN_FLAT {
      const P p = {(v->v[0] - hi) * scale, (v->v[1] - hi) * scale};
      return sum_exactly<T, P>(p, {shift, shift}, {off, off}, [&](int k, int h) TN_FLAT {
        vd d[2];
        doubles_of(v->v[k], d);
        return (d[h] - by.mean) * by.slope + by.bias;
      });
    });
  } else {
    map<P, 1>({x}, y, len, stream, [&](const P* v, int64_t) TN_FLAT {
      P out;
      for (int k = 0; k < 2; ++k) out.v[k] = (v->v[k] - hi) * scale + shift;
      return out;
    });
  }
}

template <class T>
void apply(const T* x, T* y, int64_t runs, int64_t len, const Affine<T>* by, bool stream) {
  for (int64_t r = 0; r < runs; ++r) apply_run(x + r * len, y + r * len, len, by[r], stream);
}

template <class T>
void apply_each(const T* x, T* y, int64_t rows, int64_t len, const Affines<T>& by, bool stream) {
  using P = InOrder<T>;
  using V = typename P::V;
  map_rows<P, 1>({x}, y, rows, len, stream, [&](const P* v, int64_t i) TN_FLAT {
    P p;
    V shift[2];
    for (int k = 0; k < 2; ++k) {
      const int64_t at = i + k * P::lanes;
      p.v[k] = (v->v[k] - load_raw<V>(by.hi + at)) * load_raw<V>(by.scale + at);
      shift[k] = load_raw<V>(by.shift + at);
    }
    if constexpr (is_half<T>) {
      const vf off[2] = {magnitude(shift[0]) * kOff, magnitude(shift[1]) * kOff};
      return sum_exactly<T, P>(p, shift, off, [&](int k, int h) TN_FLAT {
        const int64_t at = i + k * P::lanes + h * D;
        vd d[2];
        doubles_of(v->v[k], d);
        return (d[h] - load_raw<vd>(by.mean + at)) * load_raw<vd>(by.slope + at) +
               load_raw<vd>(by.bias + at);
      });
    } else {
      for (int k = 0; k < 2; ++k) p.v[k] += shift[k];
      return p;
    }
  });
}

template <class T, bool Weight, bool Bias>
TN_INLINE void map_row(const T* x, T* y, int64_t len, const RowAffine<T>& by, bool stream) {
  using P = InOrder<T>;
  using V = typename P::V;
  const V hi = splat<V>(by.hi), lo = splat<V>(by.lo), rstd = splat<V>(by.rstd);
  map<P, 1>({x}, y, len, stream, [&](const P* v, int64_t i) TN_FLAT {
    P p;
    V bias[2] = {};
    for (int k = 0; k < 2; ++k) {
      const int64_t at = i + k * P::lanes;
      p.v[k] = ((v->v[k] - hi) - lo) * rstd;
      if constexpr (Weight) p.v[k] *= load_raw<V>(by.weight + at);
      if constexpr (Bias) bias[k] = load_raw<V>(by.bias + at);
    }
    if constexpr (std::is_same_v<T, f16> || (is_half<T> && Bias)) {
      const vf off[2] = {magnitude(bias[0]) * kOff, magnitude(bias[1]) * kOff};
      return sum_exactly<T, P>(p, bias, off, [&](int k, int h) TN_FLAT {
        vd d[2], w[2], b[2];
        doubles_of(v->v[k], d);
        doubles_of(bias[k], b);
        d[h] = (d[h] - by.mean) * by.rstd_double;
        if constexpr (Weight) {
          doubles_of(load_raw<vf>(by.weight + i + k * P::lanes), w);
          d[h] *= w[h];
        }
        return Bias ? d[h] + b[h] : d[h];
      });
    } else {
      if constexpr (Bias)
        for (int k = 0; k < 2; ++k) p.v[k] += bias[k];
      return p;
    }
  });
}

template <class T>
void apply_row(const T* x, T* y, int64_t len, const RowAffine<T>& by, bool stream) {
  using A = compute_t<T>;
  RowAffine<T> row = by;
  Padded<A, kStep> weight, bias;
  if (len < kStep) {
    if (by.weight) row.weight = Padded<A, kStep>::fill(weight, by.weight, len, A{});
    if (by.bias) row.bias = Padded<A, kStep>::fill(bias, by.bias, len, A{});
  }
  if (by.weight && by.bias)
    map_row<T, true, true>(x, y, len, row, stream);
  else if (by.weight)
    map_row<T, true, false>(x, y, len, row, stream);
  else if (by.bias)
    map_row<T, false, true>(x, y, len, row, stream);
  else
    map_row<T, false, false>(x, y, len, row, stream);
}

template <class T>
void grad_apply(const T* grad, const T* x, T* grad_x, int64_t runs, int64_t len,
                const GradAffine<compute_t<T>>* by, bool stream) {
  using P = AnyOrder<T>;
  using V = typename P::V;
  for (int64_t r = 0; r < runs; ++r) {
    const V scale = splat<V>(by[r].scale), hi = splat<V>(by[r].hi), rstd = splat<V>(by[r].rstd),
            slope = splat<V>(by[r].slope), shift = splat<V>(by[r].shift);
    const int64_t at = r * len;
    map<P, 2>({grad + at, x + at}, grad_x + at, len, stream, [&](const P* v, int64_t) TN_FLAT {
      P out;
      for (int k = 0; k < 2; ++k)
        out.v[k] = v[0].v[k] * scale + ((v[1].v[k] - hi) * rstd * slope + shift);
      return out;
    });
  }
}

template <class T>
void grad_apply_each(const T* grad, const T* x, T* grad_x, int64_t rows, int64_t len,
                     const GradAffines<compute_t<T>>& by, bool stream) {
  using P = InOrder<T>;
  using V = typename P::V;
  map_rows<P, 2>({grad, x}, grad_x, rows, len, stream, [&](const P* v, int64_t i) TN_FLAT {
    P out;
    for (int k = 0; k < 2; ++k) {
      const int64_t at = i + k * P::lanes;
      const V x_hat = (v[1].v[k] - load_raw<V>(by.hi + at)) * load_raw<V>(by.rstd + at);
      out.v[k] = v[0].v[k] * load_raw<V>(by.scale + at) +
                 (x_hat * load_raw<V>(by.slope + at) + load_raw<V>(by.shift + at));
    }
    return out;
  });
}

template <class T>
void grad_apply_row(const T* grad, const T* x, T* grad_x, int64_t len, const compute_t<T>* weight,
                    const GradAffine<compute_t<T>>& by, bool stream) {
  using A = compute_t<T>;
  using P = InOrder<T>;
  using V = typename P::V;
  const V hi = splat<V>(by.hi), rstd = splat<V>(by.rstd), slope = splat<V>(by.slope),
          shift = splat<V>(by.shift);
  Padded<A, kStep> padded;
  if (weight && len < kStep) weight = Padded<A, kStep>::fill(padded, weight, len, A{});
  const auto run = [&]<bool Weight>(std::bool_constant<Weight>) TN_FLAT {
    map<P, 2>({grad, x}, grad_x, len, stream, [&](const P* v, int64_t i) TN_FLAT {
      P out;
      for (int k = 0; k < 2; ++k) {
        V g = v[0].v[k];
        if constexpr (Weight) g *= load_raw<V>(weight + i + k * P::lanes);
        out.v[k] = g * rstd + ((v[1].v[k] - hi) * rstd * slope + shift);
      }
      return out;
    });
  };
  if (weight)
    run(std::true_type{});
  else
    run(std::false_type{});
}

template <class T>
void grad_scale(const T* grad, T* grad_x, int64_t runs, int64_t len, const compute_t<T>* scale,
                bool stream) {
  using P = AnyOrder<T>;
  for (int64_t r = 0; r < runs; ++r) {
    const auto by = splat<typename P::V>(scale[r]);
    map<P, 1>({grad + r * len}, grad_x + r * len, len, stream,
              [&](const P* v, int64_t) TN_FLAT { return P{v->v[0] * by, v->v[1] * by}; });
  }
}

template <class T>
void grad_scale_each(const T* grad, T* grad_x, int64_t rows, int64_t len, const compute_t<T>* scale,
                     bool stream) {
  using P = InOrder<T>;
  using V = typename P::V;
  map_rows<P, 1>({grad}, grad_x, rows, len, stream, [&](const P* v, int64_t i) TN_FLAT {
    return P{v->v[0] * load_raw<V>(scale + i), v->v[1] * load_raw<V>(scale + i + P::lanes)};
  });
}

}  // namespace
}  // namespace truenorm
