// Outputs, value by value.
#pragma once

#include "kernel_map.h"
#include "kernel_short.h"

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

// (x − hi) · scale + shift with the coefficients of one run.
template <class T>
struct RunAffine {
  using V = typename Lane<T>::V;
  V hi, scale, shift, scale_rest, shift_rest;

  TN_INLINE RunAffine of(const Affine<T>& by) {
    RunAffine run = {splat<V>(by.hi), splat<V>(by.scale), splat<V>(by.shift), {}, {}};
    if constexpr (is_half<T>)
      run.scale_rest = splat<V>(by.scale_rest), run.shift_rest = splat<V>(by.shift_rest);
    return run;
  }
  template <class P>
  TN_FLAT P operator()(const P& x) const {
    const P d = {x.v[0] - hi, x.v[1] - hi};
    if constexpr (is_half<T>)
      return affine_twice(d, {scale, scale}, {shift, shift}, {scale_rest, scale_rest},
                          {shift_rest, shift_rest});
    else
      return {d.v[0] * scale + shift, d.v[1] * scale + shift};
  }
};

template <class T>
TN_INLINE void apply_run(const T* x, T* y, int64_t len, const Affine<T>& by, bool stream) {
  using P = AnyOrder<T>;
  const auto run = RunAffine<T>::of(by);
  map<P, 1>({x}, y, len, stream, [&](const P* v, int64_t) TN_FLAT { return run(*v); });
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

template <class T>
void apply(const T* x, T* y, int64_t runs, int64_t len, const Affine<T>* by, bool stream) {
  if (are_short(runs, len)) {
    int64_t served = 0;
    if (!stream)
      served = over_ends<1>({x}, y, runs, len, [&](int64_t r) TN_FLAT {
        return [run = RunAffine<T>::of(by[r])](const auto(&v)[1])
                   TN_FLAT { return run(InOrder<T>{v[0], v[0]}).v[0]; };
      });
    x += served * len, y += served * len;
    return over_short_runs(runs - served, len, by + served,
                           [&](int64_t at, int64_t count, const Affines<T>& each) {
                             apply_each(x + at, y + at, 1, count, each, stream);
                           });
  }
  for (int64_t r = 0; r < runs; ++r) apply_run(x + r * len, y + r * len, len, by[r], stream);
}

// A coefficient of rows so short that several of them are one run, value by value.
template <class A>
struct Spread {
  using V = std::conditional_t<std::is_same_v<A, double>, vd, vf>;
  static constexpr int lanes = int(sizeof(V) / sizeof(A));
  // a step past the last row, which begins before a step has ended
  A values[(kRowsTogether + 1) * kStep];

  // what `len` values from `at` on have, and some more until these are put
  TN_FLAT void put(int64_t at, int64_t len, A value) {
    for (int i = 0; i < len; i += lanes) store_raw(values + at + i, splat<V>(value));
  }
  TN_FLAT void put(int64_t at, int64_t len, const A (&from)[kStep]) {
    for (int i = 0; i < len; i += lanes) store_raw(values + at + i, load_raw<V>(from + i));
  }
  TN_FLAT V at(int64_t i) const { return load_raw<V>(values + i); }
};

// The same of weight or bias, which rows share or have of their own.
template <class A>
struct SpreadParameter : Spread<A> {
  const A* last = nullptr;
  A copy[kStep];

  TN_FLAT void put(int64_t at, int64_t len, const A* from, A without) {
    if (at == 0 || from != last) {
      for (A& value : copy) value = without;
      if (from) std::memcpy(copy, from, size_t(len) * sizeof(A));
      last = from;
    }
    Spread<A>::put(at, len, copy);
  }
};

// RowAffine as vectors.
template <class T>
struct RowVectors {
  using V = typename Lane<T>::V;
  V hi, lo, rstd;
  V base, rstd_rest, offset, offset_rest;

  // from what f makes of each
  template <class Of, class F>
  TN_INLINE RowVectors made(const Of& of, const F& f) {
    RowVectors v;
    v.hi = f(of.hi), v.lo = f(of.lo), v.rstd = f(of.rstd);
    if constexpr (is_half<T>) {
      v.base = f(of.base), v.rstd_rest = f(of.rstd_rest);
      v.offset = f(of.offset), v.offset_rest = f(of.offset_rest);
    }
    return v;
  }
  TN_INLINE RowVectors of(const RowAffine<T>& by) {
    return made(by, [](compute_t<T> value) TN_FLAT { return splat<V>(value); });
  }
};

// x̂ as two floats: the one nearest on a grid of RowAffine::kGrid, from which the difference is
// exact as long as x̂ is less than 2^10, and the rest.
template <class T>
TN_INLINE void x_hat_twice(vf x, const RowVectors<T>& by, vf& near, vf& rest) {
  const vf d = x - by.base;
  constexpr float to_grid = float(0x1.8p23 * RowAffine<T>::kGrid);
  near = (fused(d, by.rstd, by.offset) + to_grid) - to_grid;
  rest = fused(d, by.rstd, by.offset - near) + fused(d, by.rstd_rest, by.offset_rest);
}

// To the nearest value of T.
template <class T>
TN_INLINE vf rounded(vf v) {
  if constexpr (std::is_same_v<T, bf16>) return (vf)(round_to_bf16<vu>(v) & 0xffff0000u);
  alignas(kBytes) T values[Lane<T>::lanes];
  Lane<T>::store(values, v);
  return Lane<T>::load(values);
}

// x̂ · weight + bias of one vector, each step rounded.
template <class T, class V>
TN_INLINE V affine_in_steps(V x_hat, const compute_t<T>* weight, const compute_t<T>* bias) {
  V y = rounded<T>(x_hat);
  if (weight) y = rounded<T>(y * load_raw<V>(weight));
  if (bias) y = rounded<T>(y + load_raw<V>(bias));
  return y;
}

// y of one run, by(i) being the coefficients of what follows value i; Centred: unless hi and lo are
// zero.
template <class T, bool Weight, bool Bias, bool Centred, class By>
TN_INLINE void map_row(const T* x, T* y, int64_t len, const compute_t<T>* weights,
                       const compute_t<T>* biases, bool rounds, bool stream, const By& by_of) {
  using P = InOrder<T>;
  using V = typename P::V;
  const auto run = [&]<bool Rounds>(std::bool_constant<Rounds>) TN_FLAT {
    map<P, 1>({x}, y, len, stream, [&](const P* v, int64_t i) TN_FLAT {
      P out;
      for (int k = 0; k < 2; ++k) {
        const int64_t at = i + k * P::lanes;
        const RowVectors<T>& by = by_of(at);
        const auto x_hat = [&]() TN_FLAT {
          const V x = v->v[k];
          return (Centred ? (x - by.hi) - by.lo : x) * by.rstd;
        };
        if constexpr (Rounds) {
          out.v[k] = affine_in_steps<T>(x_hat(), Weight ? weights + at : nullptr,
                                        Bias ? biases + at : nullptr);
        } else if constexpr (is_half<T> && Bias) {
          vf near, rest;
          x_hat_twice(v->v[k], by, near, rest);
          const vf weight = Weight ? load_raw<vf>(weights + at) : splat<vf>(1.0f);
          out.v[k] = fused(weight, rest, fused(weight, near, load_raw<vf>(biases + at)));
        } else {
          out.v[k] = x_hat();
          if constexpr (Weight) out.v[k] *= load_raw<V>(weights + at);
          if constexpr (Bias) out.v[k] += load_raw<V>(biases + at);
        }
      }
      return out;
    });
  };
  if constexpr (is_half<T>) {
    if (rounds) return run(std::true_type{});
  }
  run(std::false_type{});
}

template <class T, bool Centred, class By>
TN_INLINE void map_row(const T* x, T* y, int64_t len, const compute_t<T>* weights,
                       const compute_t<T>* biases, bool rounds, bool stream, const By& by_of) {
  if (weights && biases)
    map_row<T, true, true, Centred>(x, y, len, weights, biases, rounds, stream, by_of);
  else if (weights)
    map_row<T, true, false, Centred>(x, y, len, weights, biases, rounds, stream, by_of);
  else if (biases)
    map_row<T, false, true, Centred>(x, y, len, weights, biases, rounds, stream, by_of);
  else
    map_row<T, false, false, Centred>(x, y, len, weights, biases, rounds, stream, by_of);
}

// A function each: in one, either has fewer registers for the other.
template <bool Centred, class T>
__attribute__((noinline)) void apply_long_rows(const T* x, T* y, int64_t rows, int64_t len,
                                               const RowAffine<T>* by, bool stream) {
  for (int64_t r = 0; r < rows; ++r) {
    const auto row = RowVectors<T>::of(by[r]);
    map_row<T, Centred>(x + r * len, y + r * len, len, by[r].weight, by[r].bias, by[r].rounds,
                        stream, [&](int64_t) TN_FLAT -> const RowVectors<T>& { return row; });
  }
}

template <class T>
void apply_rows(const T* x, T* y, int64_t rows, int64_t len, const RowAffine<T>* by, bool stream) {
  using A = compute_t<T>;
  if (len >= kStep) {
    bool centred = false;
    for (int64_t r = 0; r < rows; ++r) centred = centred || by[r].hi != A{} || by[r].lo != A{};
    return centred ? apply_long_rows<true>(x, y, rows, len, by, stream)
                   : apply_long_rows<false>(x, y, rows, len, by, stream);
  }
  struct {
    Spread<A> hi, lo, rstd, base, rstd_rest, offset, offset_rest;
  } all;
  SpreadParameter<A> weight, bias;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t at = r * len;
    all.hi.put(at, len, by[r].hi), all.lo.put(at, len, by[r].lo), all.rstd.put(at, len, by[r].rstd);
    if constexpr (is_half<T>) {
      all.base.put(at, len, by[r].base), all.rstd_rest.put(at, len, by[r].rstd_rest);
      all.offset.put(at, len, by[r].offset), all.offset_rest.put(at, len, by[r].offset_rest);
    }
    if (by->weight) weight.put(at, len, by[r].weight, A{});
    if (by->bias) bias.put(at, len, by[r].bias, A{});
  }
  map_row<T, true>(x, y, rows * len, by->weight ? weight.values : nullptr,
                   by->bias ? bias.values : nullptr, by->rounds, stream, [&](int64_t i) TN_FLAT {
                     return RowVectors<T>::made(
                         all, [&](const Spread<A>& each) TN_FLAT { return each.at(i); });
                   });
}

template <class T>
void add(const T* one, const T* other, T* to, int64_t len, bool stream) {
  using P = AnyOrder<T>;
  map<P, 2>({one, other}, to, len, stream, [](const P* v, int64_t) TN_FLAT {
    return P{v[0].v[0] + v[1].v[0], v[0].v[1] + v[1].v[1]};
  });
}

}  // namespace
}  // namespace truenorm
