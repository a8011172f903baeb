// What maps value to value: outputs, and gradients of the input.
#pragma once

#include "kernel_blocks.h"

namespace truenorm {
namespace {

// out[i] = f(in[0][i], …, coef[0][i], …), 16 values at a time. The last block ends where the run
// does and writes some values a second time, the same; a short run goes through padded copies.
template <class L, int In, int Coefs, class T, class A, class Fn>
TN_INLINE void map(const T* const (&in)[In], const A* const (&coef)[Coefs], int used, T* out,
                   int64_t len, Fn f) {
  using V = typename L::V;
  const auto one = [&](const T* const* from, const A* const* with, T* to) TN_FLAT {
#pragma GCC unroll 8
    for (int j = 0; j < kLanes; j += L::lanes) {
      V values[In], coefs[Coefs] = {};
      for (int k = 0; k < In; ++k) values[k] = L::load(from[k] + j);
      for (int k = 0; k < used; ++k) coefs[k] = load_raw<V>(with[k] + j);
      L::store(to + j, f(values, coefs));
    }
  };
  const T* from[In];
  const A* with[Coefs];
  if (len < kLanes) {
    Padded<T> in_copy[In], out_copy;
    Padded<A> coef_copy[Coefs];
    for (int k = 0; k < In; ++k) from[k] = Padded<T>::fill(in_copy[k], in[k], len, T{});
    for (int k = 0; k < used; ++k) with[k] = Padded<A>::fill(coef_copy[k], coef[k], len, A{});
    one(from, with, out_copy.values);
    std::memcpy(out, out_copy.values, size_t(len) * sizeof(T));
    return;
  }
  blocks(len, [&](int64_t i, int) TN_FLAT {
    for (int k = 0; k < In; ++k) from[k] = in[k] + i;
    for (int k = 0; k < used; ++k) with[k] = coef[k] + i;
    one(from, with, out + i);
  });
}

// the vectors of outputs and of gradients
template <class T>
using Out = std::conditional_t<std::is_same_v<T, float>, Lane<T>, Wide<T>>;
template <class T>
using Grad = Lane<T>;

template <class A>
constexpr const A* kNone[1] = {nullptr};

// bfloat16: y = p + q in float, whose error is some 2^-22 of |p| + |q|. Where the two cancel to
// less than this part of them, that could be more than a sixteenth of y's last place, and the value
// is computed again in double. Each value is judged by itself, whatever its neighbours are.
// float16, of three more bits, would need it too often to gain.
constexpr float kCancelled = 0x1p-10f;

// fast(x, i, p, q) sets the two parts of 16 values' outputs in float; exact(x, i) is one in double.
template <class Fast, class Exact>
TN_INLINE void map_bf16(const bf16* x, bf16* y, int64_t len, const Fast& fast, const Exact& exact) {
  blocks(len, [&](int64_t i, int) TN_FLAT {
#pragma GCC unroll 8
    for (int j = 0; j < kLanes; j += F) {
      vf p, q;
      fast(Lane<bf16>::load(x + i + j), i + j, p, q);
      vf out = p + q;
      const vi bad = magnitude(out) < (magnitude(p) + magnitude(q)) * kCancelled;
      if (__builtin_expect(any(bad), 0))
        for (int k = 0; k < F; ++k)
          if (bad[k]) out[k] = float(exact(to_double(x[i + j + k]), i + j + k));
      Lane<bf16>::store(y + i + j, out);
    }
  });
}

template <class T>
void apply(const T* x, T* y, int64_t len, output_t<T> hi, output_t<T> scale, output_t<T> shift) {
  using V = typename Out<T>::V;
  if constexpr (std::is_same_v<T, bf16>) {
    if (len >= kLanes) {
      const vf h = splat<vf>(float(hi)), sc = splat<vf>(float(scale));
      const vf sh = splat<vf>(float(shift - (hi - double(float(hi))) * scale));
      map_bf16(
          x, y, len, [&](vf v, int64_t, vf& p, vf& q) TN_FLAT { p = (v - h) * sc, q = sh; },
          [&](double v, int64_t) TN_FLAT { return (v - hi) * scale + shift; });
      return;
    }
  }
  const V h = splat<V>(hi), sc = splat<V>(scale), sh = splat<V>(shift);
  map<Out<T>, 1, 1>({x}, kNone<output_t<T>>, 0, y, len,
                    [&](const V* v, const V*) { return (v[0] - h) * sc + sh; });
}

// Per-element coefficients come as doubles: to narrow them costs what map_bf16 saves.
template <class T>
void apply_each(const T* x, T* y, int64_t len, const output_t<T>* hi, const output_t<T>* scale,
                const output_t<T>* shift) {
  using V = typename Out<T>::V;
  map<Out<T>, 1, 3>({x}, {hi, scale, shift}, 3, y, len,
                    [](const V* v, const V* c) { return (v[0] - c[0]) * c[1] + c[2]; });
}

template <class T>
void apply_row(const T* x, T* y, int64_t len, output_t<T> hi, output_t<T> lo, output_t<T> rstd,
               const output_t<T>* weight, const output_t<T>* bias) {
  using V = typename Out<T>::V;
  if constexpr (std::is_same_v<T, bf16>) {
    if (len >= kLanes) {
      const vf h = splat<vf>(float(hi)), l = splat<vf>(float(hi - double(float(hi)))),
               r = splat<vf>(float(rstd));
      map_bf16(
          x, y, len,
          [&](vf v, int64_t i, vf& p, vf& q) TN_FLAT {
            p = ((v - h) - l) * r;
            if (weight) p *= load_narrow(weight + i);
            q = bias ? load_narrow(bias + i) : vf{};
          },
          [&](double v, int64_t i) TN_FLAT {
            return (v - hi) * rstd * (weight ? weight[i] : 1.0) + (bias ? bias[i] : 0.0);
          });
      return;
    }
  }
  const V h = splat<V>(hi), l = splat<V>(lo), r = splat<V>(rstd);
  if (weight && bias)
    map<Out<T>, 1, 2>({x}, {weight, bias}, 2, y, len,
                      [&](const V* v, const V* c) { return ((v[0] - h) - l) * r * c[0] + c[1]; });
  else if (weight)
    map<Out<T>, 1, 1>({x}, {weight}, 1, y, len,
                      [&](const V* v, const V* c) { return ((v[0] - h) - l) * r * c[0]; });
  else if (bias)
    map<Out<T>, 1, 1>({x}, {bias}, 1, y, len,
                      [&](const V* v, const V* c) { return ((v[0] - h) - l) * r + c[0]; });
  else
    map<Out<T>, 1, 1>({x}, kNone<output_t<T>>, 0, y, len,
                      [&](const V* v, const V*) { return ((v[0] - h) - l) * r; });
}

template <class T>
void grad_apply(const T* grad, const T* x, T* grad_x, int64_t len, compute_t<T> scale,
                compute_t<T> hi, compute_t<T> rstd, compute_t<T> slope, compute_t<T> shift) {
  using V = typename Grad<T>::V;
  const V sc = splat<V>(scale), h = splat<V>(hi), r = splat<V>(rstd), sl = splat<V>(slope),
          sh = splat<V>(shift);
  map<Grad<T>, 2, 1>({grad, x}, kNone<compute_t<T>>, 0, grad_x, len,
                     [&](const V* v, const V*) { return v[0] * sc + ((v[1] - h) * r * sl + sh); });
}

template <class T>
void grad_apply_each(const T* grad, const T* x, T* grad_x, int64_t len, const compute_t<T>* scale,
                     const compute_t<T>* hi, const compute_t<T>* rstd, const compute_t<T>* slope,
                     const compute_t<T>* shift) {
  using V = typename Grad<T>::V;
  map<Grad<T>, 2, 5>(
      {grad, x}, {scale, hi, rstd, slope, shift}, 5, grad_x, len,
      [](const V* v, const V* c) { return v[0] * c[0] + ((v[1] - c[1]) * c[2] * c[3] + c[4]); });
}

template <class T>
void grad_apply_row(const T* grad, const T* x, T* grad_x, int64_t len, const compute_t<T>* weight,
                    compute_t<T> hi, compute_t<T> rstd, compute_t<T> slope, compute_t<T> shift) {
  using V = typename Grad<T>::V;
  const V h = splat<V>(hi), r = splat<V>(rstd), sl = splat<V>(slope), sh = splat<V>(shift);
  if (weight)
    map<Grad<T>, 2, 1>({grad, x}, {weight}, 1, grad_x, len, [&](const V* v, const V* c) {
      return v[0] * c[0] * r + ((v[1] - h) * r * sl + sh);
    });
  else
    map<Grad<T>, 2, 1>({grad, x}, kNone<compute_t<T>>, 0, grad_x, len,
                       [&](const V* v, const V*) { return v[0] * r + ((v[1] - h) * r * sl + sh); });
}

template <class T>
void grad_scale(const T* grad, T* grad_x, int64_t len, compute_t<T> scale) {
  using V = typename Grad<T>::V;
  const V sc = splat<V>(scale);
  map<Grad<T>, 1, 1>({grad}, kNone<compute_t<T>>, 0, grad_x, len,
                     [&](const V* v, const V*) { return v[0] * sc; });
}

template <class T>
void grad_scale_each(const T* grad, T* grad_x, int64_t len, const compute_t<T>* scale) {
  using V = typename Grad<T>::V;
  map<Grad<T>, 1, 1>({grad}, {scale}, 1, grad_x, len,
                     [](const V* v, const V* c) { return v[0] * c[0]; });
}

}  // namespace
}  // namespace truenorm
