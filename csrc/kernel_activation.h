// y = act(norm(x) + residual), and the gradient of norm(x) + residual, in one walk over the values.
#pragma once

#include <limits>

#include "kernel_elementwise.h"
#include "kernel_smooth.h"

namespace truenorm {
namespace {

template <class V>
using Bits = std::conditional_t<std::is_same_v<V, vd>, vl, vi>;

// none, ReLU, ReLU6, leaky ReLU: z · slope from zero down, of which ReLU keeps no bit (−∞ · 0 is no
// zero), and no more than `most`, which is NaN where there is no bound.
template <class V>
struct Kink {
  using Value = std::remove_cvref_t<decltype(V{}[0])>;
  V slope, most;
  Bits<V> kept;
  Bits<V> nan_low;  // what torch's gradient takes a NaN for

  explicit Kink(Activation act)
      : slope(splat<V>(Value(act.kind == Act::none         ? 1.0
                             : act.kind == Act::leaky_relu ? act.parameter
                                                           : 0.0))),
        most(splat<V>(act.kind == Act::relu6 ? Value(6) : std::numeric_limits<Value>::quiet_NaN())),
        kept(act.kind == Act::relu || act.kind == Act::relu6 ? Bits<V>{} : ~Bits<V>{}),
        nan_low(act.kind == Act::leaky_relu || act.kind == Act::relu6 ? ~Bits<V>{} : Bits<V>{}) {}
  TN_FLAT V below(V v) const { return (V)((Bits<V>)(v * slope) & kept); }
  TN_FLAT V value(V z) const {
    const V high = z > most ? most : z;
    return z <= 0 ? below(z) : high;
  }
  TN_FLAT V gradient(V grad, V z) const {
    const V high = z >= most ? V{} : grad;
    const Bits<V> low = (z <= 0) | ((z != z) & nan_low);
    return low ? below(grad) : high;
  }
};

template <class V>
struct Called {
  Activation act;

  TN_FLAT V value(V z) const { return called<false, V>(z, V{}, act); }
  TN_FLAT V gradient(V grad, V z) const { return called<true, V>(z, grad, act); }
};

// body(what makes the values, whether it is the gradient, whether there is a residual)
template <class T, class Body>
TN_INLINE void with_activation(const ActInputs<T>& in, Activation act, const Body& body) {
  using V = typename Lane<T>::V;
  const auto with_inputs = [&](const auto& made) TN_FLAT {
    if (in.grad && in.residual)
      body(made, std::true_type{}, std::true_type{});
    else if (in.grad)
      body(made, std::true_type{}, std::false_type{});
    else if (in.residual)
      body(made, std::false_type{}, std::true_type{});
    else
      body(made, std::false_type{}, std::false_type{});
  };
  if (act.kind <= Act::leaky_relu || act.kind == Act::relu6)
    with_inputs(Kink<V>(act));
  else
    with_inputs(Called<V>{act});
}

// z_of(x, residual or null, place) makes z of a pair of vectors. The first and last values of a run
// are made before all others, because `out` may be one of the inputs; out of line, because there
// are many of these functions.
template <class P, bool Gradient, bool Residual, class T, class Made, class Z>
TN_INLINE void act_run(const ActInputs<T>& in, T* out, int64_t len, bool stream, const Made& made,
                       const Z& z_of) {
  constexpr int In = 1 + Gradient + Residual;
  const auto pair = [&](const ActInputs<T>& from, int64_t place, int j) TN_FLAT {
    const P x = P::load(from.x + j);
    P z;
    if constexpr (Residual) {
      const P residual = P::load(from.residual + j);
      z = z_of(x, &residual, place + j);
    } else {
      z = z_of(x, nullptr, place + j);
    }
    P grad;
    if constexpr (Gradient) grad = P::load(from.grad + j);
    for (int k = 0; k < 2; ++k) {
      if constexpr (Gradient)
        z.v[k] = made.gradient(grad.v[k], z.v[k]);
      else
        z.v[k] = made.value(z.v[k]);
    }
    return z;
  };
  const auto step = [&](const ActInputs<T>& from, int64_t place, T* to) TN_FLAT {
    TN_UNROLL for (int j = 0; j < kStep; j += P::size) {
      const P z = pair(from, place, j);
      if (stream)
        P::stream(to + j, z);
      else
        P::store(to + j, z);
    }
  };
  const auto edge = [&](const ActInputs<T>& from, int64_t place, T* to) __attribute__((noinline)) {
#pragma GCC unroll 1
    for (int j = 0; j < kStep; j += P::size) P::store(to + j, pair(from, place, j));
  };
  if (len < kStep) {
    Padded<T, kStep> copies[In], made_here;
    ActInputs<T> from{nullptr, Padded<T, kStep>::fill(copies[0], in.x, len, T{}), nullptr};
    if constexpr (Gradient) from.grad = Padded<T, kStep>::fill(copies[1], in.grad, len, T{});
    if constexpr (Residual)
      from.residual = Padded<T, kStep>::fill(copies[In - 1], in.residual, len, T{});
    edge(from, 0, made_here.values);
    std::memcpy(out, made_here.values, size_t(len) * sizeof(T));
    return;
  }
  Padded<T, kStep> first, last;
  int64_t begin = 0;
  if (stream || len >= 4 * kStep)
    begin = int64_t((-reinterpret_cast<uintptr_t>(out) & (kLine - 1)) / sizeof(T));
  const int64_t end = begin + (len - begin) / kStep * kStep;
  if (begin > 0) edge(in, 0, first.values);
  if (end < len) edge(in.from(len - kStep), len - kStep, last.values);
  for (int64_t i = begin; i < end; i += kStep) step(in.from(i), i, out + i);
  std::memcpy(out, first.values, size_t(begin) * sizeof(T));
  std::memcpy(out + end, last.values + (kStep - (len - end)), size_t(len - end) * sizeof(T));
}

// Half precision: d · scale + shift + residual + low, off by little more than the rounding to
// float, whatever cancels: every rounding's error is added at the end.
TN_INLINE vf sum_exactly(vf d, vf scale, vf shift, vf residual, vf low) {
  const vf product = d * scale;
  const vf of_product = fused(d, scale, -product);
  const vf first = product + shift;
  vf part = first - product;
  const vf of_first = (product - (first - part)) + (shift - part);
  const vf sum = first + residual;
  part = sum - first;
  const vf of_sum = (first - (sum - part)) + (residual - part);
  const vf out = sum + ((of_first + of_sum) + (of_product + low));
  // the errors of an infinite sum are NaN
  return out == out ? out : sum;
}

// z, and its sum with vector k of the residual where there is one, each rounded.
template <class T, class P>
TN_INLINE vf sum_in_steps(vf z, const P* residual, int k) {
  z = rounded<T>(z);
  return residual ? rounded<T>(z + residual->v[k]) : z;
}

// (x − hi) · scale + shift + residual, coefficient j of vector k by at(j, k).
template <class T, class P, class At>
TN_INLINE P affine_sum(const P& x, const P* residual, const Activation& act, const At& at) {
  if (residual && act.by_output) return *residual;
  P z;
  for (int k = 0; k < 2; ++k) z.v[k] = x.v[k] - at(0, k);
  if constexpr (is_half<T>) {
    if (!residual || act.rounds) {
      z = affine_twice(z, {at(1, 0), at(1, 1)}, {at(2, 0), at(2, 1)}, {at(3, 0), at(3, 1)},
                       {at(4, 0), at(4, 1)});
      if (act.rounds)
        for (int k = 0; k < 2; ++k) z.v[k] = sum_in_steps<T>(z.v[k], residual, k);
      return z;
    }
    for (int k = 0; k < 2; ++k)
      z.v[k] = sum_exactly(z.v[k], at(1, k), at(2, k), residual->v[k],
                           fused(z.v[k], at(3, k), at(4, k)));
  } else {
    for (int k = 0; k < 2; ++k) {
      z.v[k] = z.v[k] * at(1, k) + at(2, k);
      if (residual) z.v[k] += residual->v[k];
    }
  }
  return z;
}

template <class T>
void act_each(const ActInputs<T>& in, T* out, int64_t rows, int64_t cols, int64_t ld,
              const Affines<T>& by, Activation act, bool stream) {
  using P = InOrder<T>;
  using V = typename P::V;
  with_activation<T>(in, act, [&]<class G, class R>(const auto& made, G, R) TN_FLAT {
    for (int64_t r = 0; r < rows; ++r)
      act_run<P, G::value, R::value>(in.from(r * ld), out + r * ld, cols, stream, made,
                                     [&](const P& x, const P* residual, int64_t i) TN_FLAT {
                                       return affine_sum<T>(
                                           x, residual, act, [&](int j, int k) TN_FLAT {
                                             return load_raw<V>(by.of[j] + i + k * P::lanes);
                                           });
                                     });
  });
}

template <class T>
void act(const ActInputs<T>& in, T* out, int64_t runs, int64_t len, const Affine<T>* by,
         Activation act, bool stream) {
  using P = AnyOrder<T>;
  using V = typename P::V;
  if (are_short(runs, len))
    return over_short_runs(runs, len, by, [&](int64_t at, int64_t count, const Affines<T>& of) {
      act_each(in.from(at), out + at, 1, count, count, of, act, stream);
    });
  with_activation<T>(in, act, [&]<class G, class R>(const auto& made, G, R) TN_FLAT {
    for (int64_t r = 0; r < runs; ++r) {
      V of[5] = {splat<V>(by[r].hi), splat<V>(by[r].scale), splat<V>(by[r].shift)};
      if constexpr (is_half<T>) {
        of[3] = splat<V>(by[r].scale_rest);
        of[4] = splat<V>(by[r].shift_rest);
      }
      act_run<P, G::value, R::value>(
          in.from(r * len), out + r * len, len, stream, made,
          [&](const P& x, const P* residual, int64_t) TN_FLAT {
            return affine_sum<T>(x, residual, act, [&](int j, int) TN_FLAT { return of[j]; });
          });
    }
  });
}

template <class T>
void act_row(const ActInputs<T>& in, T* out, int64_t len, const RowAffine<T>& by, Activation act,
             bool stream) {
  using A = compute_t<T>;
  using P = InOrder<T>;
  using V = typename P::V;
  RowAffine<T> row = by;
  Padded<A, kStep> weight, bias;
  if (len < kStep) {
    if (by.weight) row.weight = Padded<A, kStep>::fill(weight, by.weight, len, A{});
    if (by.bias) row.bias = Padded<A, kStep>::fill(bias, by.bias, len, A{});
  }
  const auto of_row = RowVectors<T>::of(row);
  with_activation<T>(in, act, [&]<class G, class R>(const auto& made, G, R) TN_FLAT {
    const auto z_of = [&](const P& x, const P* residual, int64_t i) TN_FLAT {
      if (residual && act.by_output) return *residual;
      P z;
      for (int k = 0; k < 2; ++k) {
        const int64_t at = i + k * P::lanes;
        const V w = row.weight ? load_raw<V>(row.weight + at) : splat<V>(A(1));
        const V b = row.bias ? load_raw<V>(row.bias + at) : V{};
        if constexpr (is_half<T>) {
          if (row.rounds) {
            z.v[k] = affine_in_steps<T>(((x.v[k] - of_row.hi) - of_row.lo) * of_row.rstd,
                                        row.weight ? row.weight + at : nullptr,
                                        row.bias ? row.bias + at : nullptr);
            if (residual) z.v[k] = rounded<T>(z.v[k] + residual->v[k]);
            continue;
          }
          vf near, rest;
          x_hat_twice(x.v[k], of_row, near, rest);
          if (residual && !act.rounds) {
            z.v[k] = sum_exactly(w, near, b, residual->v[k], w * rest);
          } else {
            z.v[k] = fused(w, rest, fused(w, near, b));
            if (act.rounds) z.v[k] = sum_in_steps<T>(z.v[k], residual, k);
          }
        } else {
          z.v[k] = ((x.v[k] - of_row.hi) - of_row.lo) * of_row.rstd;
          if (row.weight) z.v[k] *= w;
          if (row.bias) z.v[k] += b;
          if (residual) z.v[k] += residual->v[k];
        }
      }
      return z;
    };
    act_run<P, G::value, R::value>(in, out, len, stream, made, z_of);
  });
}

}  // namespace
}  // namespace truenorm
