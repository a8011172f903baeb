// Rows into columns: what lies by channels turned to what lies by positions, and back.
#pragma once

#include "simd.h"

namespace truenorm {
namespace {

// As many values as make a square of vectors, whatever they stand for.
template <int Size>
struct SquareOf;
template <>
struct SquareOf<8> {
  using V = vl;
};
template <>
struct SquareOf<4> {
  using V = vi;
};
template <>
struct SquareOf<2> {
  using V = vh;
};

// a0 b0 a1 b1 …: the first half of them, or the second.
template <int Second, class V, int... J>
TN_INLINE V interleave(V a, V b, std::integer_sequence<int, J...>) {
  constexpr int lanes = int(sizeof...(J)), first = Second * lanes / 2;
#if defined(__clang__)
  return __builtin_shufflevector(a, b, (J % 2 * lanes + first + J / 2)...);
#else
  using I = std::remove_reference_t<decltype(a[0])>;
  return __builtin_shuffle(a, b, V{I(J % 2 * lanes + first + J / 2)...});
#endif
}

// The first half of the rows interleaved with the second, once for each bit of a row's number: then
// its bits and those of a lane's have changed places.
template <class V, int L>
TN_INLINE void turn_square(V (&rows)[L]) {
  constexpr std::make_integer_sequence<int, L> lanes{};
#pragma GCC unroll 8
  for (int bit = 1; bit < L; bit *= 2) {
    V next[L];
#pragma GCC unroll 16
    for (int i = 0; i < L / 2; ++i) {
      next[2 * i] = interleave<0>(rows[i], rows[i + L / 2], lanes);
      next[2 * i + 1] = interleave<1>(rows[i], rows[i + L / 2], lanes);
    }
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) rows[i] = next[i];
  }
}

// A square from `from` to `to`; of fewer rows or columns, value by value.
template <class V, class T>
TN_INLINE void turn_some(const T* from, int64_t rows, int64_t cols, int64_t ld, T* to,
                         int64_t to_ld) {
  constexpr int L = int(sizeof(V) / sizeof(T));
  if (rows < L || cols < L) {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < cols; ++c) to[c * to_ld + r] = from[r * ld + c];
    return;
  }
  V square[L];
#pragma GCC unroll 16
  for (int i = 0; i < L; ++i) square[i] = load_raw<V>(from + i * ld);
  turn_square(square);
#pragma GCC unroll 16
  for (int i = 0; i < L; ++i) store_raw(to + i * to_ld, square[i]);
}

template <class T>
void turn(const T* from, int64_t rows, int64_t cols, int64_t ld, T* to, int64_t to_ld,
          bool along_columns) {
  using V = typename SquareOf<int(sizeof(T))>::V;
  constexpr int64_t L = int64_t(sizeof(V) / sizeof(T));
  const int64_t outer = along_columns ? cols : rows, inner = along_columns ? rows : cols;
  for (int64_t i = 0; i < outer; i += L)
    for (int64_t j = 0; j < inner; j += L) {
      const int64_t r = along_columns ? j : i, c = along_columns ? i : j;
      if (along_columns)
        for (int64_t k = c + L; k < c + 2 * L && k < cols; ++k)
          __builtin_prefetch(to + k * to_ld + r, 1);
      turn_some<V>(from + r * ld + c, rows - r < L ? rows - r : L, cols - c < L ? cols - c : L, ld,
                   to + c * to_ld + r, to_ld);
    }
}

}  // namespace
}  // namespace truenorm
