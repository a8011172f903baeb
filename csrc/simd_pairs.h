// Two vectors at a time: how the inner loops read and write neighbouring values.
#pragma once

#include "simd.h"

namespace truenorm {
namespace {

constexpr int kStep = 32;  // values that the inner loops take side by side
constexpr uintptr_t kLine = 64;

// A step, pair by pair: side by side where these are a few instructions. Without fused operations a
// pair of half precision is hundreds, which gain nothing by it and take the compiler a minute.
#if defined(TRUENORM_X86) && !defined(__FMA__)
#define TN_UNROLL _Pragma("GCC unroll 1")
#else
#define TN_UNROLL _Pragma("GCC unroll 8")
#endif

// Past the caches; `p` on a vector's boundary.
template <class T, class V>
TN_INLINE void store_streaming(T* p, V v) {
#if defined(__AVX512F__)
  _mm512_stream_si512(reinterpret_cast<__m512i*>(p), (__m512i)v);
#elif defined(__AVX__)
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)v);
#elif defined(TRUENORM_X86)
  _mm_stream_si128(reinterpret_cast<__m128i*>(p), (__m128i)v);
#else
  store_raw(p, v);
#endif
}

// A pair of vectors as bfloat16 in the upper halves; NaN is the rare case, looked for once.
TN_INLINE void round_pair(const vf (&v)[2], vu (&out)[2]) {
  const bool numbers = !unordered(v[0], v[1]);
  for (int k = 0; k < 2; ++k)
    out[k] =
        __builtin_expect(numbers, 1) ? round_number_to_bf16<vu>(v[k]) : round_to_bf16<vu>(v[k]);
}

// The upper halves, one vector's after the other's.
TN_INLINE vu upper_halves(vu low, vu high) {
#if defined(__AVX512BW__)
  vus odd;
  for (int i = 0; i < 2 * F; ++i) odd[i] = uint16_t(2 * i + 1);
  return (vu)_mm512_permutex2var_epi16((__m512i)low, (__m512i)odd, (__m512i)high);
#else
  const vh half[2] = {narrow_bits(low >> 16), narrow_bits(high >> 16)};
  return load_raw<vu>(half);
#endif
}

// 2 · lanes neighbouring values in their order, which values of other arrays can be matched with.
template <class T>
struct InOrder {
  using V = typename Lane<T>::V;
  static constexpr int lanes = Lane<T>::lanes, size = 2 * lanes;
  V v[2];

  TN_INLINE InOrder load(const T* p) { return {Lane<T>::load(p), Lane<T>::load(p + lanes)}; }
  TN_INLINE void store(T* p, const InOrder& s) {
    if constexpr (std::is_same_v<T, bf16>) {
      store_raw(p, joined(s));
    } else {
      Lane<T>::store(p, s.v[0]);
      Lane<T>::store(p + lanes, s.v[1]);
    }
  }
  TN_INLINE void stream(T* p, const InOrder& s) {
    if constexpr (sizeof(T) == sizeof(s.v[0][0])) {
      store_streaming(p, s.v[0]);
      store_streaming(p + lanes, s.v[1]);
    } else if constexpr (std::is_same_v<T, bf16>) {
      store_streaming(p, joined(s));
    } else {
      alignas(kBytes) T values[size];
      store(values, s);
      store_streaming(p, load_raw<vi>(values));
    }
  }
  TN_INLINE vu joined(const InOrder& s) {
    vu rounded[2];
    round_pair(s.v, rounded);
    return upper_halves(rounded[0], rounded[1]);
  }
  // which of the values is in lane `lane` of vector `k`
  static constexpr int place(int k, int lane) { return k * lanes + lane; }
};

// bfloat16 as its even and odd places: one instruction instead of two to read a vector, and none to
// join two.
struct EvenOdd {
  using V = vf;
  static constexpr int lanes = F, size = 2 * F;
  V v[2];

  TN_INLINE EvenOdd load(const bf16* p) {
    const vu both = load_raw<vu>(p);
    return {(vf)(both << 16), (vf)(both & 0xffff0000u)};
  }
  TN_INLINE vu joined(const EvenOdd& s) {
    vu rounded[2];
    round_pair(s.v, rounded);
    return rounded[0] >> 16 | (rounded[1] & 0xffff0000u);
  }
  TN_INLINE void store(bf16* p, const EvenOdd& s) { store_raw(p, joined(s)); }
  TN_INLINE void stream(bf16* p, const EvenOdd& s) { store_streaming(p, joined(s)); }
  static constexpr int place(int k, int lane) { return 2 * lane + k; }
};

// The order that is cheapest, where it does not matter.
template <class T>
using AnyOrder = std::conditional_t<std::is_same_v<T, bf16>, EvenOdd, InOrder<T>>;

// The places of vector k of the pair at `start`.
template <class P>
TN_INLINE auto places(int start, int k) {
  using I = std::conditional_t<std::is_same_v<typename P::V, vd>, vl, vi>;
  // an array: of a vector that is set lane by lane gcc warns at -O2
  std::conditional_t<std::is_same_v<I, vl>, int64_t, int32_t> places[P::lanes];
  for (int i = 0; i < P::lanes; ++i) places[i] = start + P::place(k, i);
  return load_raw<I>(places);
}

// v, with `value` for what is before place `keep` of the step; v is vector k of the pair at
// `start`.
template <class P, class V>
TN_INLINE V unread(V v, int start, int k, int keep, V value = V{}) {
  return places<P>(start, k) >= keep ? v : value;
}

// The same for what is not before place `count`.
template <class P, class V>
TN_INLINE V first_of(V v, int start, int k, int count, V value = V{}) {
  return places<P>(start, k) < count ? v : value;
}

}  // namespace
}  // namespace truenorm
