// The table of masked_kernels.h, for one instruction set.
#include "masked_kernels.h"
#include "simd.h"

#if !defined(TRUENORM_ISA)
#error "compile once per instruction set, with TRUENORM_ISA naming it"
#endif

namespace truenorm {
namespace {

#if defined(__AVX512F__)

constexpr int64_t kBlock = 16;

// bit i of what is valid among `len` <= 16 positions
TN_INLINE __mmask16 bits_of(const bool* valid, __mmask16 among) {
  const __m128i bytes = _mm_maskz_loadu_epi8(among, valid);
  return _mm_test_epi8_mask(bytes, bytes);
}

template <class T>
TN_INLINE void pack_block(const T* from, __mmask16 keep, T* to) {
  // a register is compressed and stored whole: compressing to memory is slow on some processors
  if constexpr (sizeof(T) == 8) {
    const auto low = __mmask8(keep), high = __mmask8(keep >> 8);
    _mm512_storeu_pd(to, _mm512_maskz_compress_pd(low, _mm512_maskz_loadu_pd(low, from)));
    to += __builtin_popcount(low);
    _mm512_storeu_pd(to, _mm512_maskz_compress_pd(high, _mm512_maskz_loadu_pd(high, from + 8)));
  } else if constexpr (sizeof(T) == 4) {
    _mm512_storeu_ps(to, _mm512_maskz_compress_ps(keep, _mm512_maskz_loadu_ps(keep, from)));
  } else {
    const __m512i wide = _mm512_maskz_cvtepu16_epi32(keep, _mm256_maskz_loadu_epi16(keep, from));
    const __m512i packed = _mm512_maskz_compress_epi32(keep, wide);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                        _mm512_maskz_cvtepi32_epi16(0xffff, packed));
  }
}

template <class T>
int64_t pack(const T* from, const bool* valid, int64_t len, T* to) {
  const T* const begin = to;
  for (int64_t i = 0; i < len; i += kBlock) {
    const auto among = __mmask16(len - i >= kBlock ? 0xffff : (1u << (len - i)) - 1);
    const __mmask16 keep = bits_of(valid + i, among);
    pack_block(from + i, keep, to);
    to += __builtin_popcount(keep);
  }
  return to - begin;
}

template <class T>
void clear(T* values, const bool* valid, int64_t len, T fill) {
  for (int64_t i = 0; i < len; i += kBlock) {
    const auto among = __mmask16(len - i >= kBlock ? 0xffff : (1u << (len - i)) - 1);
    const auto gone = __mmask16(~bits_of(valid + i, among) & among);
    if constexpr (sizeof(T) == 8) {
      const __m512d v = _mm512_set1_pd(fill);
      _mm512_mask_storeu_pd(values + i, __mmask8(gone), v);
      _mm512_mask_storeu_pd(values + i + 8, __mmask8(gone >> 8), v);
    } else if constexpr (sizeof(T) == 4) {
      _mm512_mask_storeu_ps(values + i, gone, _mm512_set1_ps(fill));
    } else {
      _mm256_mask_storeu_epi16(values + i, gone, _mm256_set1_epi16(int16_t(fill.bits)));
    }
  }
}

#else

#if defined(__AVX2__)
// for each byte of flags the places of those that are set, in order
struct Places {
  alignas(8) uint8_t of[256][8] = {};
  constexpr Places() {
    for (int flags = 0; flags < 256; ++flags)
      for (int bit = 0, k = 0; bit < 8; ++bit)
        if (flags >> bit & 1) of[flags][k++] = uint8_t(bit);
  }
};
constexpr Places kPlaces;

TN_INLINE int64_t pack_by_table(const float* from, const bool* valid, int64_t len, float* to,
                                int64_t* packed) {
  int64_t i = 0, k = 0;
  for (; i + 8 <= len; i += 8) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(valid + i));
    const int flags = ~_mm_movemask_epi8(_mm_cmpeq_epi8(bytes, _mm_setzero_si128())) & 0xff;
    const __m256i order =
        _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(kPlaces.of[flags])));
    _mm256_storeu_ps(to + k, _mm256_permutevar8x32_ps(_mm256_loadu_ps(from + i), order));
    k += __builtin_popcount(unsigned(flags));
  }
  *packed = k;
  return i;
}
#endif

template <class T>
int64_t pack(const T* from, const bool* valid, int64_t len, T* to) {
  int64_t i = 0, k = 0;
#if defined(__AVX2__)
  if constexpr (std::is_same_v<T, float>) i = pack_by_table(from, valid, len, to, &k);
#endif
  // without a branch: which position is valid is not foreseen
  for (; i < len; ++i) {
    to[k] = from[i];
    k += valid[i];
  }
  return k;
}

template <class T>
void clear(T* values, const bool* valid, int64_t len, T fill) {
  for (int64_t i = 0; i < len; ++i) values[i] = valid[i] ? values[i] : fill;
}

#endif

template <class T>
constexpr MaskedKernels<T> masked_kernels_of() {
  return {pack<T>, clear<T>};
}

}  // namespace

namespace TRUENORM_ISA {
extern const MaskedSet masked_set;
const MaskedSet masked_set = {masked_kernels_of<double>(), masked_kernels_of<float>(),
                              masked_kernels_of<bf16>(), masked_kernels_of<f16>()};
}  // namespace TRUENORM_ISA

}  // namespace truenorm
