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

// a · b + c rounded once, with the same bits where there is no instruction for it: there the sum of
// the exact product and c is rounded to odd in double, and so correctly to float.
TN_INLINE vf fused(vf a, vf b, vf c) {
#if defined(__AVX512F__)
  return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
  return (vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  vf_half as[2], bs[2], cs[2], out[2];
  std::memcpy(as, &a, sizeof(a));
  std::memcpy(bs, &b, sizeof(b));
  std::memcpy(cs, &c, sizeof(c));
  for (int i = 0; i < 2; ++i) {
    const vd product = widen_half(as[i]) * widen_half(bs[i]), term = widen_half(cs[i]);
    const vd sum = product + term;
    const vd rest = sum - product;
    const vd error = (product - (sum - rest)) + (term - rest);
    // an inexact sum whose last bit is even goes to its odd neighbour, on the side of the error; a
    // sum that is not finite has an error that is NaN
    const vl away = (error > 0.0) == (sum > 0.0);
    const vl even = ((vl)sum & 1) == 0;
    const vl inexact = (error > 0.0) | (error < 0.0);
    const vl odd = (vl)sum + (inexact & even & ((away & 2) - 1));
    out[i] = __builtin_convertvector((vd)odd, vf_half);
  }
  vf result;
  std::memcpy(&result, out, sizeof(result));
  return result;
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

// ---- what each storage type offers: the compute vector V of `lanes` elements, and doubles

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
  TN_INLINE void store(bf16* p, V v) { store_raw(p, narrow_bits(round_to_bf16<vu>(v) >> 16)); }
  TN_INLINE vd load_double(const bf16* p) {
    return widen_half((vf_half)(widen_bits_half(load_raw<vh_half>(p)) << 16));
  }
  TN_INLINE void store_double(bf16* p, vd v) {
    const vu_half bits = round_to_bf16<vu_half>(__builtin_convertvector(v, vf_half)) >> 16;
    store_raw(p, __builtin_convertvector(bits, vh_half));
  }
};

template <>
struct Lane<f16> {
  using V = vf;
  static constexpr int lanes = F;
  TN_INLINE V load(const f16* p) {
#if defined(__AVX512F__)
    // the zero-masked form: gcc 12 takes the plain one for an uninitialized read
    return (vf)_mm512_maskz_cvtph_ps(0xffff, load_raw<__m256i>(p));
#elif defined(__F16C__)
    return (vf)_mm256_cvtph_ps(load_raw<__m128i>(p));
#else
    return half_to_float<vf, vi>(widen_bits(load_raw<vh>(p)));
#endif
  }
  TN_INLINE void store(f16* p, V v) {
#if defined(__AVX512F__)
    store_raw(
        p, _mm512_maskz_cvtps_ph(0xffff, (__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__F16C__)
    store_raw(p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
    store_raw(p, narrow_bits(float_to_half<vu, vi>(v)));
#endif
  }
  TN_INLINE vd load_double(const f16* p) {
#if defined(__AVX512F__)
    return widen_half((vf_half)_mm256_cvtph_ps(load_raw<__m128i>(p)));
#elif defined(__F16C__)
    return widen_half((vf_half)_mm_cvtph_ps(_mm_loadl_epi64((const __m128i*)p)));
#else
    return widen_half(half_to_float<vf_half, vi_half>(widen_bits_half(load_raw<vh_half>(p))));
#endif
  }
  TN_INLINE void store_double(f16* p, vd v) {
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

TN_INLINE vf magnitude(vf v) { return (vf)((vi)v & 0x7fffffff); }

// Whether a comparison held in any lane.
TN_INLINE bool any(vi held) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask((__m512i)held) != 0;
#elif defined(__AVX__)
  return _mm256_movemask_ps((__m256)held) != 0;
#else
  int32_t all = 0;
  for (int i = 0; i < F; ++i) all |= held[i];
  return all != 0;
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

// As many doubles as there are floats in a vector, rounded to float.
TN_INLINE vf load_narrow(const double* p) {
  const vf_half half[2] = {__builtin_convertvector(load_raw<vd>(p), vf_half),
                           __builtin_convertvector(load_raw<vd>(p + D), vf_half)};
  return join(half[0], half[1]);
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
