// What goes by a mask: packing, outputs, and sums.
#pragma once

#include "kernel_elementwise.h"
#include "kernel_gradients.h"
#include "kernel_moments.h"

namespace truenorm {
namespace {

#if defined(__AVX512F__)

constexpr int64_t kBlock = 16;

// keep: what is valid of 16 values, `there` what may be read of them
template <class T>
TN_INLINE void pack_block(const T* from, __mmask16 keep, __mmask16 there, T* to) {
  // a register is compressed and stored whole: compressing to memory is slow on some processors
  if constexpr (sizeof(T) == 8) {
    const auto low = __mmask8(keep), high = __mmask8(keep >> 8);
    const __m512d first = _mm512_maskz_loadu_pd(__mmask8(there), from);
    const __m512d second = _mm512_maskz_loadu_pd(__mmask8(there >> 8), from + 8);
    _mm512_storeu_pd(to, _mm512_maskz_compress_pd(low, first));
    _mm512_storeu_pd(to + __builtin_popcount(low), _mm512_maskz_compress_pd(high, second));
  } else if constexpr (sizeof(T) == 4) {
    const __m512 values = _mm512_maskz_loadu_ps(there, from);
    _mm512_storeu_ps(to, _mm512_maskz_compress_ps(keep, values));
  } else {
    const __m512i wide = _mm512_maskz_cvtepu16_epi32(there, _mm256_maskz_loadu_epi16(there, from));
    const __m512i packed = _mm512_maskz_compress_epi32(keep, wide);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                        _mm512_maskz_cvtepi32_epi16(0xffff, packed));
  }
}

template <class T>
TN_INLINE void clear_block(T* values, __mmask16 gone, T fill) {
  if constexpr (sizeof(T) == 8) {
    _mm512_mask_storeu_pd(values, __mmask8(gone), _mm512_set1_pd(fill));
    _mm512_mask_storeu_pd(values + 8, __mmask8(gone >> 8), _mm512_set1_pd(fill));
  } else if constexpr (sizeof(T) == 4) {
    _mm512_mask_storeu_ps(values, gone, _mm512_set1_ps(fill));
  } else {
    _mm256_mask_storeu_epi16(values, gone, _mm256_set1_epi16(int16_t(fill.bits)));
  }
}

// body(first, bits of what is valid, bits of what is there) for every block of positions
template <class Body>
TN_INLINE void over_blocks(const bool* valid, int64_t len, const Body& body) {
  int64_t i = 0;
  for (; i + 64 <= len; i += 64) {
    const __m512i bytes = _mm512_loadu_si512(valid + i);
    const uint64_t bits = _mm512_test_epi8_mask(bytes, bytes);
#pragma GCC unroll 4
    for (int k = 0; k < 64; k += 16) body(i + k, __mmask16(bits >> k), __mmask16(0xffff));
  }
  for (; i < len; i += kBlock) {
    const auto among = __mmask16(len - i >= kBlock ? 0xffff : (1u << (len - i)) - 1);
    const __m128i bytes = _mm_maskz_loadu_epi8(among, valid + i);
    body(i, _mm_test_epi8_mask(bytes, bytes), among);
  }
}

template <class T>
int64_t pack(const T* from, const bool* valid, int64_t len, T* to) {
  const T* const begin = to;
  over_blocks(valid, len, [&](int64_t i, __mmask16 keep, __mmask16 there) TN_FLAT {
    pack_block(from + i, keep, there, to);
    to += __builtin_popcount(keep);
  });
  return to - begin;
}

template <class T>
void clear(T* values, const bool* valid, int64_t len, T fill) {
  over_blocks(valid, len, [&](int64_t i, __mmask16 keep, __mmask16 among) TN_FLAT {
    clear_block(values + i, __mmask16(~keep & among), fill);
  });
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

// Lane by lane, v where it is valid, else `other`. The compiler widens bytes one by one, hence by
// hand.
TN_INLINE vf chosen(const bool* valid, vf v, vf other) {
#if defined(__AVX512F__)
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(valid));
  return (vf)_mm512_mask_blend_ps(_mm_test_epi8_mask(bytes, bytes), (__m512)other, (__m512)v);
#elif defined(__AVX2__)
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(valid));
  const __m256i signs = _mm256_slli_epi32(_mm256_cvtepi8_epi32(bytes), 31);
  return (vf)_mm256_blendv_ps((__m256)other, (__m256)v, (__m256)signs);
#else
  vi flags;
  for (int i = 0; i < F; ++i) flags[i] = valid[i];
  return flags != 0 ? v : other;
#endif
}
TN_INLINE vd chosen(const bool* valid, vd v, vd other) {
#if defined(__AVX512F__)
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(valid));
  const auto flags = __mmask8(_mm_test_epi8_mask(bytes, bytes));
  return (vd)_mm512_mask_blend_pd(flags, (__m512d)other, (__m512d)v);
#else
  vl flags;
  for (int i = 0; i < D; ++i) flags[i] = valid[i];
  return flags != 0 ? v : other;
#endif
}

template <class T>
void apply_valid(const T* x, T* y, const bool* valid, int64_t runs, int64_t len,
                 const Affine<T>* by, T fill) {
  using P = InOrder<T>;
  using V = typename P::V;
  for (int64_t r = 0; r < runs; ++r, x += len, y += len) {
    if (is_half<T> || len < kStep) {
      apply_run(x, y, len, by[r], false);
      clear(y, valid, len, fill);
      continue;
    }
    if constexpr (!is_half<T>) {
      const V hi = splat<V>(by[r].hi), scale = splat<V>(by[r].scale), shift = splat<V>(by[r].shift),
              rest = splat<V>(fill);
      map<P, 1>({x}, y, len, false, [&](const P* v, int64_t i) TN_FLAT {
        P out;
        for (int k = 0; k < 2; ++k)
          out.v[k] = chosen(valid + i + k * P::lanes, (v->v[k] - hi) * scale + shift, rest);
        return out;
      });
    }
  }
}

template <class T>
void grad_apply_valid(const T* grad, const T* x, T* grad_x, const bool* valid, int64_t runs,
                      int64_t len, const GradAffine<compute_t<T>>* by) {
  using P = InOrder<T>;
  using V = typename P::V;
  for (int64_t r = 0; r < runs; ++r) {
    const int64_t at = r * len;
    if (is_half<T> || len < kStep) {
      grad_apply(grad + at, x + at, grad_x + at, 1, len, by + r, false);
      clear(grad_x + at, valid, len, T{});
      continue;
    }
    const V scale = splat<V>(by[r].scale), hi = splat<V>(by[r].hi), rstd = splat<V>(by[r].rstd),
            slope = splat<V>(by[r].slope), shift = splat<V>(by[r].shift);
    map<P, 2>({grad + at, x + at}, grad_x + at, len, false, [&](const P* v, int64_t i) TN_FLAT {
      P out;
      for (int k = 0; k < 2; ++k) {
        const V all = v[0].v[k] * scale + ((v[1].v[k] - hi) * rstd * slope + shift);
        out.v[k] = chosen(valid + i + k * P::lanes, all, V{});
      }
      return out;
    });
  }
}

// Calls add(tensors' values, valid, keep) for every step of every run; see blocks() and Padded.
template <class T, int In, class Add>
TN_INLINE void over_steps(const T* const (&from)[In], const bool* valid, int64_t runs, int64_t len,
                          int64_t stride, const Add& add) {
  Padded<T, kStep> copies[In];
  Padded<bool, kStep> valid_copy;
  for (int64_t run = 0; run < runs; ++run, valid += len) {
    const T* at[In];
    for (int k = 0; k < In; ++k) {
      at[k] = from[k] + run * stride;
      if (run + kRunsAhead < runs) foresee(at[k] + kRunsAhead * stride, len);
    }
    if (len < kStep) {
      for (int k = 0; k < In; ++k) at[k] = Padded<T, kStep>::fill(copies[k], at[k], len, T{});
      add(at, Padded<bool, kStep>::fill(valid_copy, valid, len, false), 0);
      continue;
    }
    blocks<kStep>(len, [&](int64_t i, int keep) TN_FLAT {
      const T* here[In];
      for (int k = 0; k < In; ++k) here[k] = at[k] + i;
      add(here, valid + i, keep);
    });
  }
}

// As sums_about() of kernel_moments.h, over what is valid; double's squares are not exact.
template <class T>
bool moments_of_valid(const T* x, const bool* valid, int64_t runs, int64_t len, int64_t stride,
                      Moments* found) {
  if constexpr (std::is_same_v<T, double>) {
    return false;
  } else {
    using P = InOrder<T>;
    using V = typename P::V;
    constexpr int N = kStep / P::size, H = P::lanes / D;
    vd sums[N][2][H] = {}, squares[N][2][H] = {};
    over_steps<T, 1>({x}, valid, runs, len, stride,
                     [&](const T* const(&from)[1], const bool* flags, int keep) TN_FLAT {
#pragma GCC unroll 8
                       for (int n = 0; n < N; ++n) {
                         const P pair = P::load(from[0] + n * P::size);
                         for (int k = 0; k < 2; ++k) {
                           V v = chosen(flags + n * P::size + k * P::lanes, pair.v[k], V{});
                           if (keep) v = unread<P>(v, n * P::size, k, keep);
                           vd part[H];
                           doubles_of(v, part);
                           for (int h = 0; h < H; ++h) {
                             sums[n][k][h] += part[h];
                             squares[n][k][h] = add_square(squares[n][k][h], part[h]);
                           }
                         }
                       }
                     });
    Totals sum, square;
    std::memcpy(sum.values, sums, sizeof(sums));
    std::memcpy(square.values, squares, sizeof(squares));
    const double n = found->count, s = Totals::sum<P>(sum), q = Totals::sum<P>(square);
    if (!near_zero(s, q, n)) return false;
    found->mean = s / n;
    found->m2 = q - s * s / n;
    return true;
  }
}

// As sum_gradients() of kernel_gradients.h, over what is valid.
template <class T>
GradSums grad_sums_of_valid(const T* grad, const T* x, const bool* valid, int64_t runs, int64_t len,
                            int64_t stride, double mean, double rstd) {
  using P = InOrder<T>;
  using A = compute_t<T>;
  using V = typename P::V;
  constexpr int N = kStep / P::size;
  const V hi = splat<V>(A(mean)), scale = splat<V>(A(rstd));
  Totals sum_g, sum_gx;
  V part_g[N][2] = {}, part_gx[N][2] = {};
  int steps = 0;
  const auto flush = [&]() TN_FLAT {
    for (int n = 0; n < N; ++n)
      for (int k = 0; k < 2; ++k) {
        add_doubles(sum_g.values + n * P::size + k * P::lanes, part_g[n][k]);
        add_doubles(sum_gx.values + n * P::size + k * P::lanes, part_gx[n][k]);
        part_g[n][k] = part_gx[n][k] = V{};
      }
    steps = 0;
  };
  over_steps<T, 2>({grad, x}, valid, runs, len, stride,
                   [&](const T* const(&from)[2], const bool* flags, int keep) TN_FLAT {
#pragma GCC unroll 8
                     for (int n = 0; n < N; ++n) {
                       const P g_pair = P::load(from[0] + n * P::size);
                       const P x_pair = P::load(from[1] + n * P::size);
                       for (int k = 0; k < 2; ++k) {
                         const bool* const here = flags + n * P::size + k * P::lanes;
                         V g = chosen(here, g_pair.v[k], V{});
                         V gx = chosen(here, g * ((x_pair.v[k] - hi) * scale), V{});
                         if (keep) {
                           g = unread<P>(g, n * P::size, k, keep);
                           gx = unread<P>(gx, n * P::size, k, keep);
                         }
                         part_g[n][k] += g;
                         part_gx[n][k] += gx;
                       }
                     }
                     if (++steps == kSteps) flush();
                   });
  flush();
  const double total = Totals::sum<P>(sum_g);
  return {total, without_rest<A>(Totals::sum<P>(sum_gx), total, mean, rstd)};
}

template <class T>
void clear_runs(T* values, const bool* valid, int64_t runs, int64_t len, T fill) {
  for (int64_t r = 0; r < runs; ++r) clear(values + r * len, valid, len, fill);
}

}  // namespace
}  // namespace truenorm
