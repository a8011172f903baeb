// A gate beside a norm: what is multiplied by act(g), and the gradients of that, in the type that
// is computed in. act is g · σ(g) (`swish`), or σ(g).
#pragma once

#include "kernel_elementwise.h"
#include "kernel_smooth.h"

namespace truenorm {
namespace {

// σ(g) and 1 − σ(g).
template <class V>
struct Sigmoid {
  V value, rest;

  TN_INLINE Sigmoid of(V g) {
    const V one = splat<V>(typename Constants<V>::Value(1));
    const V e = Exponential<V>::of(-g).value(), value = one / (one + e);
    return {value, e * value};
  }
};

template <class V>
TN_INLINE V opened(V g, const Sigmoid<V>& sigma, bool swish) {
  return swish ? g * sigma.value : sigma.value;
}
template <class V>
TN_INLINE V slope_of(V g, const Sigmoid<V>& sigma, bool swish) {
  const V slope = sigma.value * sigma.rest;
  return swish ? sigma.value + g * slope : slope;
}

// body(i) for each vector of a run; what is past its last whole one goes through padded copies:
// tail(first, count).
template <int L, class Body, class Tail>
TN_INLINE void by_vectors(int64_t len, const Body& body, const Tail& tail) {
  int64_t i = 0;
  for (; i + L <= len; i += L) body(i);
  if (i < len) tail(i, len - i);
}

template <class T>
void gate(const T* from, const T* gate, compute_t<T>* to, compute_t<T>* slopes, int64_t len,
          bool swish) {
  using A = compute_t<T>;
  using V = typename Lane<T>::V;
  constexpr int L = Lane<T>::lanes;
  const auto one = [&](const T* v, const T* g, A* out, A* of_gate) TN_FLAT {
    const V value = Lane<T>::load(v);
    if (!g) return store_raw(out, value);
    const V at = Lane<T>::load(g);
    const Sigmoid<V> sigma = Sigmoid<V>::of(at);
    store_raw(out, value * opened(at, sigma, swish));
    if (of_gate) store_raw(of_gate, value * slope_of(at, sigma, swish));
  };
  by_vectors<L>(
      len,
      [&](int64_t i) TN_FLAT {
        one(from + i, gate ? gate + i : nullptr, to + i, slopes ? slopes + i : nullptr);
      },
      [&](int64_t i, int64_t count) TN_FLAT {
        Padded<T, L> values, gates;
        A made[2][L];
        one(Padded<T, L>::fill(values, from + i, count, T{}),
            gate ? Padded<T, L>::fill(gates, gate + i, count, T{}) : nullptr, made[0], made[1]);
        std::memcpy(to + i, made[0], size_t(count) * sizeof(A));
        if (slopes) std::memcpy(slopes + i, made[1], size_t(count) * sizeof(A));
      });
}

template <class T>
void gated(const compute_t<T>* from, const compute_t<T>* weight, const T* gate, T* to, int64_t len,
           bool swish, GateRounding rounds) {
  using A = compute_t<T>;
  using V = typename Lane<T>::V;
  constexpr int L = Lane<T>::lanes;
  const auto one = [&](const A* v, const A* w, const T* g, T* out) TN_FLAT {
    V y = load_raw<V>(v);
    if constexpr (is_half<T>)
      if (rounds.x_hat) y = rounded<T>(y);
    if (w) y = y * load_raw<V>(w);
    if constexpr (is_half<T>)
      if (rounds.product) y = rounded<T>(y);
    if (g) {
      const V at = Lane<T>::load(g);
      y = y * opened(at, Sigmoid<V>::of(at), swish);
    }
    Lane<T>::store(out, y);
  };
  by_vectors<L>(
      len,
      [&](int64_t i) TN_FLAT {
        one(from + i, weight ? weight + i : nullptr, gate ? gate + i : nullptr, to + i);
      },
      [&](int64_t i, int64_t count) TN_FLAT {
        Padded<A, L> values, weights;
        Padded<T, L> gates;
        T made[L];
        one(Padded<A, L>::fill(values, from + i, count, A{}),
            weight ? Padded<A, L>::fill(weights, weight + i, count, A{}) : nullptr,
            gate ? Padded<T, L>::fill(gates, gate + i, count, T{}) : nullptr, made);
        std::memcpy(to + i, made, size_t(count) * sizeof(T));
      });
}

template <class T>
void gate_grads(const compute_t<T>* grad, const T* other, const T* gate, T* of_other, T* of_gate,
                int64_t len, bool swish) {
  using A = compute_t<T>;
  using V = typename Lane<T>::V;
  constexpr int L = Lane<T>::lanes;
  const auto one = [&](const A* v, const T* o, const T* g, T* to_other, T* to_gate) TN_FLAT {
    const V pulled = load_raw<V>(v), at = Lane<T>::load(g);
    const Sigmoid<V> sigma = Sigmoid<V>::of(at);
    Lane<T>::store(to_other, pulled * opened(at, sigma, swish));
    Lane<T>::store(to_gate, pulled * Lane<T>::load(o) * slope_of(at, sigma, swish));
  };
  by_vectors<L>(
      len,
      [&](int64_t i) TN_FLAT { one(grad + i, other + i, gate + i, of_other + i, of_gate + i); },
      [&](int64_t i, int64_t count) TN_FLAT {
        Padded<A, L> grads;
        Padded<T, L> others, gates;
        T made[2][L];
        one(Padded<A, L>::fill(grads, grad + i, count, A{}),
            Padded<T, L>::fill(others, other + i, count, T{}),
            Padded<T, L>::fill(gates, gate + i, count, T{}), made[0], made[1]);
        std::memcpy(of_other + i, made[0], size_t(count) * sizeof(T));
        std::memcpy(of_gate + i, made[1], size_t(count) * sizeof(T));
      });
}

}  // namespace
}  // namespace truenorm
