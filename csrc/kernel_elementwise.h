// What maps value to value: outputs, and gradients of the input.
#pragma once

#include "kernel_map.h"

namespace truenorm {
namespace {

// Half precision: d · scale + shift, each of them two floats, off by little more than the rounding
// to float, whatever cancels.
template <class P>
TN_INLINE P affine_twice(const P& d, const vf (&scale)[2], const vf (&shift)[2],
                         const vf (&scale_rest)[2], const vf (&shift_rest)[2]) {
  P y, out;
  for (int k = 0; k < 2; ++k) {
    y.v[k] = fused(d.v[k], scale[k], shift[k]);
    out.v[k] = y.v[k] + fused(d.v[k], scale_rest[k], shift_rest[k]);
  }
  // the rest of an infinite value may be infinite the other way
  if (__builtin_expect(unordered(out.v[0], out.v[1]), 0))
    for (int k = 0; k < 2; ++k) out.v[k] = out.v[k] == out.v[k] ? out.v[k] : y.v[k];
  return out;
}

template <class T>
TN_INLINE void apply_run(const T* x, T* y, int64_t len, const Affine<T>& by, bool stream) {
  using P = AnyOrder<T>;
  using V = typename P::V;
  const V hi = splat<V>(by.hi), scale = splat<V>(by.scale), shift = splat<V>(by.shift);
  if constexpr (is_half<T>) {
    const V scale_rest = splat<V>(by.scale_rest), shift_rest = splat<V>(by.shift_rest);
    map<P, 1>({x}, y, len, stream, [&](const P* v, int64_t) TN_FLAT {
      return affine_twice(P{v->v[0] - hi, v->v[1] - hi}, {scale, scale}, {shift, shift},
                          {scale_rest, scale_rest}, {shift_rest, shift_rest});
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
    P d;
    V of[Affines<T>::kArrays][2];
    for (int k = 0; k < 2; ++k) {
      for (int j = 0; j < Affines<T>::kArrays; ++j)
        of[j][k] = load_raw<V>(by.of[j] + i + k * P::lanes);
      d.v[k] = v->v[k] - of[0][k];
    }
    if constexpr (is_half<T>) {
      return affine_twice(d, of[1], of[2], of[3], of[4]);
    } else {
      for (int k = 0; k < 2; ++k) d.v[k] = d.v[k] * of[1][k] + of[2][k];
      return d;
    }
  });
}

// x̂ as two floats: the one nearest on a grid of RowAffine::kGrid, from which the difference is
// exact as long as x̂ is less than 2^10, and the rest.
template <class T>
TN_INLINE void x_hat_twice(vf x, const RowAffine<T>& by, vf& near, vf& rest) {
  const vf d = x - by.base, rstd = splat<vf>(by.rstd), offset = splat<vf>(by.offset);
  constexpr float to_grid = float(0x1.8p23 * RowAffine<T>::kGrid);
  near = (fused(d, rstd, offset) + to_grid) - to_grid;
  rest =
      fused(d, rstd, offset - near) + fused(d, splat<vf>(by.rstd_rest), splat<vf>(by.offset_rest));
}

// To the nearest value of T.
template <class T>
TN_INLINE vf rounded(vf v) {
  alignas(kBytes) T values[Lane<T>::lanes];
  Lane<T>::store(values, v);
  return Lane<T>::load(values);
}

// x̂ · weight + bias of one vector, each step rounded.
template <class T>
TN_INLINE vf affine_in_steps(vf x, const RowAffine<T>& by, int64_t at) {
  vf y = rounded<T>(((x - by.hi) - by.lo) * by.rstd);
  if (by.weight) y = rounded<T>(y * load_raw<vf>(by.weight + at));
  if (by.bias) y = rounded<T>(y + load_raw<vf>(by.bias + at));
  return y;
}

template <class T>
void map_row_in_steps(const T* x, T* y, int64_t len, const RowAffine<T>& by, bool stream) {
  using P = InOrder<T>;
  map<P, 1>({x}, y, len, stream, [&](const P* v, int64_t i) TN_FLAT {
    P out;
    for (int k = 0; k < 2; ++k) out.v[k] = affine_in_steps(v->v[k], by, i + k * P::lanes);
    return out;
  });
}

template <class T, bool Weight, bool Bias>
TN_INLINE void map_row(const T* x, T* y, int64_t len, const RowAffine<T>& by, bool stream) {
  using P = InOrder<T>;
  using V = typename P::V;
  const V hi = splat<V>(by.hi), lo = splat<V>(by.lo), rstd = splat<V>(by.rstd);
  map<P, 1>({x}, y, len, stream, [&](const P* v, int64_t i) TN_FLAT {
    P out;
    for (int k = 0; k < 2; ++k) {
      const int64_t at = i + k * P::lanes;
      if constexpr (is_half<T> && Bias) {
        vf near, rest;
        x_hat_twice(v->v[k], by, near, rest);
        const vf weight = Weight ? load_raw<vf>(by.weight + at) : splat<vf>(1.0f);
        out.v[k] = fused(weight, rest, fused(weight, near, load_raw<vf>(by.bias + at)));
      } else {
        out.v[k] = ((v->v[k] - hi) - lo) * rstd;
        if constexpr (Weight) out.v[k] *= load_raw<V>(by.weight + at);
        if constexpr (Bias) out.v[k] += load_raw<V>(by.bias + at);
      }
    }
    return out;
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
  if constexpr (is_half<T>) {
    if (by.rounds) return map_row_in_steps(x, y, len, row, stream);
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
void add(const T* one, const T* other, T* to, int64_t len, bool stream) {
  using P = AnyOrder<T>;
  map<P, 2>({one, other}, to, len, stream, [](const P* v, int64_t) TN_FLAT {
    return P{v[0].v[0] + v[1].v[0], v[0].v[1] + v[1].v[1]};
  });
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
void grad_scale(const T* grad, T* grad_x, int64_t runs, int64_t len,
                const GradAffine<compute_t<T>>* of_runs, bool stream) {
  using P = AnyOrder<T>;
  for (int64_t r = 0; r < runs; ++r) {
    const auto by = splat<typename P::V>(of_runs[r].scale);
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
