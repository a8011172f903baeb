// Vectors of the instruction set this file is compiled for, by the compiler's vector extension.
// Everything has internal linkage: the same names are compiled once per instruction set, and the
// linker must never merge an AVX-512 copy with the baseline's.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(TRUENORM_X86)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "kernels.h"

#define TN_INLINE static inline __attribute__((always_inline))
// what is one instruction, or dozens, which then are not written out at every place
#if defined(TRUENORM_X86) && !defined(__AVX__)
#define TN_CALLED static __attribute__((noinline))
#else
#define TN_CALLED TN_INLINE
#endif
#define TN_FLAT __attribute__((always_inline))  // for a lambda that an inner loop calls

namespace truenorm {
namespace {

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif

constexpr int F = kBytes / 4;  // floats in a vector
constexpr int D = kBytes / 8;  // doubles in a vector

typedef float vf __attribute__((vector_size(kBytes)));
typedef double vd __attribute__((vector_size(kBytes)));
typedef int64_t vl __attribute__((vector_size(kBytes)));
typedef int32_t vi __attribute__((vector_size(kBytes)));
typedef uint32_t vu __attribute__((vector_size(kBytes)));
typedef uint16_t vus __attribute__((vector_size(kBytes)));
typedef uint16_t vh __attribute__((vector_size(kBytes / 2)));
// as many narrow elements as there are doubles in a vector
typedef float vf_half __attribute__((vector_size(kBytes / 2)));
typedef int32_t vi_half __attribute__((vector_size(kBytes / 2)));
typedef uint32_t vu_half __attribute__((vector_size(kBytes / 2)));
typedef uint16_t vh_half __attribute__((vector_size(kBytes / 4)));

template <class V, class T>
TN_INLINE V load_raw(const T* p) {
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}

template <class V, class T>
TN_INLINE void store_raw(T* p, V v) {
  std::memcpy(p, &v, sizeof(V));
}

TN_INLINE float to_float(uint32_t v) { return float(v); }
TN_INLINE vf to_float(vu v) { return __builtin_convertvector((vi)v, vf); }
TN_INLINE vf_half to_float(vu_half v) {
  return __builtin_convertvector((vi_half)v, vf_half);  // less than 2^31, which takes fewer steps
}

template <class To, class From>
TN_INLINE To bits_of(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

// ---- float16 for instruction sets without a conversion, one value or a vector of them: what may
// be is computed, and then chosen from, since a branch for every lane takes longer

// U: 32 bits for each value, the half's in the lower ones; signed ones compare faster.
template <class V, class I, class U>
TN_INLINE V half_to_float(U h) {
  const U sign = (h & 0x8000u) << 16, magnitude = h & 0x7fffu;
  const I size = bits_of<I>(magnitude);
  const U subnormal = bits_of<U>(V(to_float(magnitude) * 0x1p-24f));
  const U scaled = magnitude << 13;
  const U normal = size >= 0x7c00 ? scaled + 0x70000000u : scaled + 0x38000000u;
  const U bits = size >= 0x400 ? normal : subnormal;
  return bits_of<V>(U(bits | sign));
}

template <class U, class I, class V>
TN_INLINE U float_to_half(V f) {
  const U all = bits_of<U>(f), sign = all >> 16 & 0x8000u, bits = all & 0x7fffffffu;
  const I size = bits_of<I>(bits);
  // below the smallest normal, 2^-14, adding 2^-1 aligns the last half bit with the last float bit:
  // the addition rounds to even
  const U small = bits_of<U>(V(bits_of<V>(bits) + 0.5f)) - 0x3f000000u;
  const U normal = (bits + 0xfffu + (bits >> 13 & 1u) - 0x38000000u) >> 13;
  const U none = U{} + 0x7e00u, infinite = U{} + 0x7c00u;
  const U finite = size < 0x38800000 ? small : normal;
  const U number = size >= 0x47800000 ? infinite : finite;  // 65536 and above
  return sign | (size > 0x7f800000 ? none : number);
}

TN_INLINE vd widen_half(vf_half v) {
#if defined(__AVX512F__)
  // one instruction; from the generic conversion gcc makes two halves and joins them
  return (vd)_mm512_maskz_cvtps_pd(0xff, (__m256)v);
#else
  return __builtin_convertvector(v, vd);
#endif
}

// A vector as doubles, and back, rounded. Of the generic conversions gcc makes scalar ones for the
// upper half, and joins halves in memory.
TN_INLINE void doubles_of(vd v, vd (&out)[1]) { out[0] = v; }
TN_INLINE void doubles_of(vf v, vd (&out)[2]) {
#if defined(TRUENORM_X86) && !defined(__AVX__)
  out[0] = (vd)_mm_cvtps_pd((__m128)v);
  out[1] = (vd)_mm_cvtps_pd(_mm_movehl_ps((__m128)v, (__m128)v));
#else
  vf_half half[2];
  std::memcpy(half, &v, sizeof(v));
  out[0] = widen_half(half[0]);
  out[1] = widen_half(half[1]);
#endif
}
TN_INLINE vf join(vf_half low, vf_half high) {
#if defined(__AVX512F__)
  return (vf)_mm512_insertf32x8(_mm512_castps256_ps512((__m256)low), (__m256)high, 1);
#elif defined(__AVX__)
  return (vf)_mm256_insertf128_ps(_mm256_castps128_ps256((__m128)low), (__m128)high, 1);
#else
  vf v;
  std::memcpy(&v, &low, sizeof(low));
  std::memcpy(reinterpret_cast<char*>(&v) + sizeof(low), &high, sizeof(high));
  return v;
#endif
}
TN_INLINE vf floats_of(const vd (&v)[2]) {
#if defined(TRUENORM_X86) && !defined(__AVX__)
  return (vf)_mm_movelh_ps(_mm_cvtpd_ps((__m128d)v[0]), _mm_cvtpd_ps((__m128d)v[1]));
#else
  return join(__builtin_convertvector(v[0], vf_half), __builtin_convertvector(v[1], vf_half));
#endif
}

// sum + v², v of at most 26 significant bits: its square is exact, so a fused operation gives the
// same bits as two.
TN_INLINE vd add_square(vd sum, vd v) {
#if defined(__AVX512F__)
  return (vd)_mm512_fmadd_pd((__m512d)v, (__m512d)v, (__m512d)sum);
#elif defined(__FMA__)
  return (vd)_mm256_fmadd_pd((__m256d)v, (__m256d)v, (__m256d)sum);
#else
  return sum + v * v;
#endif
}

// Whether a comparison held in any lane.
TN_INLINE bool any(vi held) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask((__m512i)held) != 0;
#elif defined(__AVX__)
  return _mm256_movemask_ps((__m256)held) != 0;
#elif defined(TRUENORM_X86)
  return _mm_movemask_ps((__m128)held) != 0;
#else
  int32_t all = 0;
  for (int i = 0; i < F; ++i) all |= held[i];
  return all != 0;
#endif
}

#if !defined(__FMA__) && !defined(__aarch64__)
// The sum of product and term, rounded to odd: then rounding it once more gives what one rounding
// would.
TN_INLINE vd sum_to_odd(vd product, vd term) {
  const vd sum = product + term;
  const vd rest = sum - product;
  const vd error = (product - (sum - rest)) + (term - rest);
  // an inexact sum whose last bit is even goes to its odd neighbour, on the side of the error; a
  // sum that is not finite has an error that is NaN
  const vl away = (error > 0.0) == (sum > 0.0);
  const vl even = ((vl)sum & 1) == 0;
  const vl inexact = (error > 0.0) | (error < 0.0);
  return (vd)((vl)sum + (inexact & even & ((away & 2) - 1)));
}

// Whether rounding the doubles to float may differ from rounding what they were rounded from: half
// way between two floats, or below the normal ones. Compared in halves of 32 bits, since the
// comparison of 64 is many instructions: of the lower ones, and of the upper ones of what is no
// zero.
TN_INLINE vi rounds_twice(vd sum) {
  const vl bits = (vl)sum;
  const vi half_way = (vi)(bits & 0x1fffffff) == (vi)(vl{} + (0x10000000 | int64_t(1) << 32));
  const vi size = (vi)(bits & 0x7fffffff00000000);
  const vi small = (size > 0) & (size < 0x38100000);
  return half_way | small;
}
#endif

// a · b + c rounded once, with the same bits where there is no instruction for it: there the exact
// product and c are summed in double.
TN_CALLED vf fused(vf a, vf b, vf c) {
#if defined(__AVX512F__)
  return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
  return (vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  vd as[2], bs[2], terms[2], sums[2];
  doubles_of(a, as);
  doubles_of(b, bs);
  doubles_of(c, terms);
  for (int i = 0; i < 2; ++i) {
    as[i] *= bs[i];
    sums[i] = as[i] + terms[i];
  }
  if (__builtin_expect(any(rounds_twice(sums[0]) | rounds_twice(sums[1])), 0))
    for (int i = 0; i < 2; ++i) sums[i] = sum_to_odd(as[i], terms[i]);
  return floats_of(sums);
#endif
}

// 16 bits to 32 and back: gcc makes two halves of the generic conversion and joins them.
TN_INLINE vu widen_bits(vh v) {
#if defined(__AVX512F__)
  return (vu)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)v);
#else
  return __builtin_convertvector(v, vu);
#endif
}
TN_INLINE vu_half widen_bits_half(vh_half v) {
#if defined(__AVX512F__)
  return (vu_half)_mm256_cvtepu16_epi32((__m128i)v);
#else
  return __builtin_convertvector(v, vu_half);
#endif
}
TN_INLINE vh narrow_bits(vu v) {
#if defined(__AVX512F__)
  return (vh)_mm512_maskz_cvtepi32_epi16(0xffff, (__m512i)v);
#else
  return __builtin_convertvector(v, vh);
#endif
}

// To the nearest bfloat16, ties to even, in the upper half, of what is not NaN.
template <class U, class V>
TN_INLINE U round_number_to_bf16(V v) {
  const U bits = (U)v;
  return bits + 0x7fffu + (bits >> 16 & 1u);
}
// The same; a NaN stays one.
template <class U, class V>
TN_INLINE U round_to_bf16(V v) {
  return v != v ? (U)v | 0x400000u : round_number_to_bf16<U>(v);
}

// Whether a or b is NaN in any lane.
TN_INLINE bool unordered(vf a, vf b) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_UNORD_Q) != 0;
#elif defined(__AVX__)
  return _mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_UNORD_Q)) != 0;
#elif defined(TRUENORM_X86)
  return _mm_movemask_ps(_mm_cmpunord_ps((__m128)a, (__m128)b)) != 0;
#else
  int32_t all = 0;
  for (int i = 0; i < F; ++i) all |= (a[i] != a[i]) | (b[i] != b[i]);
  return all != 0;
#endif
}

// v, or the bound beyond which it lies; a NaN stays one.
TN_INLINE vf between(vf v, vf low, vf high) {
#if defined(__AVX512F__)
  return (vf)_mm512_maskz_min_ps(0xffff, (__m512)high,
                                 _mm512_maskz_max_ps(0xffff, (__m512)low, (__m512)v));
#elif defined(__AVX__)
  return (vf)_mm256_min_ps((__m256)high, _mm256_max_ps((__m256)low, (__m256)v));
#elif defined(TRUENORM_X86)
  return (vf)_mm_min_ps((__m128)high, _mm_max_ps((__m128)low, (__m128)v));
#else
  v = v < low ? low : v;
  return v > high ? high : v;
#endif
}
TN_INLINE vd between(vd v, vd low, vd high) {
  v = v < low ? low : v;
  return v > high ? high : v;
}

TN_INLINE vf magnitude(vf v) { return (vf)((vi)v & 0x7fffffff); }

}  // namespace
}  // namespace truenorm
