// What each storage type offers: how it is read into vectors and written, and sums over their
// lanes.
#pragma once

#include "simd_vectors.h"

namespace truenorm {
namespace {

// The compute vector V of `lanes` elements, and doubles.

template <class T>
struct Lane;

template <>
struct Lane<double> {
  using V = vd;
  static constexpr int lanes = D;
  TN_INLINE V load(const double* p) { return load_raw<vd>(p); }
  TN_INLINE void store(double* p, V v) { store_raw(p, v); }
  TN_INLINE vd load_double(const double* p) { return load_raw<vd>(p); }
  TN_INLINE void store_double(double* p, vd v) { store_raw(p, v); }
};

template <>
struct Lane<float> {
  using V = vf;
  static constexpr int lanes = F;
  TN_INLINE V load(const float* p) { return load_raw<vf>(p); }
  TN_INLINE void store(float* p, V v) { store_raw(p, v); }
  TN_INLINE vd load_double(const float* p) { return widen_half(load_raw<vf_half>(p)); }
  TN_INLINE void store_double(float* p, vd v) { store_raw(p, __builtin_convertvector(v, vf_half)); }
};

template <>
struct Lane<bf16> {
  using V = vf;
  static constexpr int lanes = F;
  TN_INLINE V load(const bf16* p) { return (vf)(widen_bits(load_raw<vh>(p)) << 16); }
  TN_CALLED void store(bf16* p, V v) { store_raw(p, narrow_bits(round_to_bf16<vu>(v) >> 16)); }
  TN_INLINE vd load_double(const bf16* p) {
    return widen_half((vf_half)(widen_bits_half(load_raw<vh_half>(p)) << 16));
  }
  TN_CALLED void store_double(bf16* p, vd v) {
    const vu_half bits = round_to_bf16<vu_half>(__builtin_convertvector(v, vf_half)) >> 16;
    store_raw(p, __builtin_convertvector(bits, vh_half));
  }
};

template <>
struct Lane<f16> {
  using V = vf;
  static constexpr int lanes = F;
  TN_CALLED V load(const f16* p) {
#if defined(__AVX512F__)
    // the zero-masked form: gcc 12 takes the plain one for an uninitialized read
    return (vf)_mm512_maskz_cvtph_ps(0xffff, load_raw<__m256i>(p));
#elif defined(__F16C__)
    return (vf)_mm256_cvtph_ps(load_raw<__m128i>(p));
#else
    return half_to_float<vf, vi>(widen_bits(load_raw<vh>(p)));
#endif
  }
  TN_CALLED void store(f16* p, V v) {
#if defined(__AVX512F__)
    store_raw(
        p, _mm512_maskz_cvtps_ph(0xffff, (__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__F16C__)
    store_raw(p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
    store_raw(p, narrow_bits(float_to_half<vu, vi>(v)));
#endif
  }
  TN_CALLED vd load_double(const f16* p) {
#if defined(__AVX512F__)
    return widen_half((vf_half)_mm256_cvtph_ps(load_raw<__m128i>(p)));
#elif defined(__F16C__)
    return widen_half((vf_half)_mm_cvtph_ps(_mm_loadl_epi64((const __m128i*)p)));
#else
    return widen_half(half_to_float<vf_half, vi_half>(widen_bits_half(load_raw<vh_half>(p))));
#endif
  }
  TN_CALLED void store_double(f16* p, vd v) {
    const vf_half narrowed = __builtin_convertvector(v, vf_half);
#if defined(__AVX512F__)
    store_raw(p, _mm256_cvtps_ph((__m256)narrowed, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__F16C__)
    const __m128i half =
        _mm_cvtps_ph((__m128)narrowed, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm_storel_epi64((__m128i*)p, half);
#else
    const vu_half bits = float_to_half<vu_half, vi_half>(narrowed);
    store_raw(p, __builtin_convertvector(bits, vh_half));
#endif
  }
};

// The same storage, computed in double.
template <class T>
struct Wide {
  using V = vd;
  static constexpr int lanes = D;
  TN_INLINE V load(const T* p) { return Lane<T>::load_double(p); }
  TN_INLINE void store(T* p, V v) { Lane<T>::store_double(p, v); }
};

// ---- 16 lanes of doubles, whatever the width of a vector

constexpr int kLanes = 16;
constexpr int R = kLanes / D;

template <class V, class A>
TN_INLINE V splat(A value) {
  return value - V{};
}

// As many doubles as there are floats in a vector, rounded to float.
TN_INLINE vf load_narrow(const double* p) {
  return floats_of({load_raw<vd>(p), load_raw<vd>(p + D)});
}

// The lanes of a and b, one after the other, that are named.
template <int... I, class V>
TN_INLINE V pick(V a, V b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, I...);
#else
  using Index = std::conditional_t<std::is_same_v<V, vd>, vl, vi>;
  return __builtin_shuffle(a, b, Index{I...});
#endif
}

// Of vectors that hold runs of W lanes: the first half of every run plus its second, a's runs and
// then b's.
template <int W, class V, int... J>
TN_INLINE V add_halves(V a, V b, std::integer_sequence<int, J...>) {
  constexpr int half = W / 2;
  return pick<(J / half * W + J % half)...>(a, b) + pick<(J / half * W + J % half + half)...>(a, b);
}

// a and b being the even and the odd places of a run: the run's first half plus its second.
template <class V, int... J>
TN_INLINE V add_pairs(V a, V b, std::integer_sequence<int, J...>) {
  constexpr int lanes = int(sizeof...(J));
  return pick<(J / 2 + J % 2 * lanes)...>(a, b) +
         pick<(J / 2 + J % 2 * lanes + lanes / 2)...>(a, b);
}

// Sums of the lanes of each of R vectors: lane i plus i + half the lanes, and so on, which is the
// same order for every width of a vector. Several at a time take few shuffles.
template <int W = 0, class A, class V, int R>
TN_INLINE void sum_lanes(const V (&v)[R], A* sums) {
  constexpr int lanes = int(sizeof(V) / sizeof(A)), width = W ? W : lanes;
  constexpr int pairs = (R + 1) / 2;
  V halves[pairs];
#pragma GCC unroll 8
  for (int r = 0; r < pairs; ++r)
    halves[r] = add_halves<width>(v[2 * r], v[R == 1 ? 0 : 2 * r + 1],
                                  std::make_integer_sequence<int, lanes>());
  if constexpr (width == 2)
    std::memcpy(sums, halves, sizeof(halves));
  else
    sum_lanes<width / 2>(halves, sums);
}

template <class T>
TN_INLINE double to_double(T value) {
  return double(value);
}
TN_INLINE double to_double(bf16 value) {
  const uint32_t bits = uint32_t(value.bits) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return double(f);
}
TN_INLINE double to_double(f16 value) {
  return double(half_to_float<float, int32_t>(uint32_t(value.bits)));
}

// Fewer than N values, padded with `fill`, so that one vector code serves them too.
template <class T, int N = kLanes>
struct Padded {
  T values[N];

  TN_INLINE const T* fill(Padded& p, const T* from, int64_t count, T with) {
    for (int i = 0; i < N; ++i) p.values[i] = with;
    std::memcpy(p.values, from, size_t(count) * sizeof(T));
    return p.values;
  }
};

}  // namespace
}  // namespace truenorm
