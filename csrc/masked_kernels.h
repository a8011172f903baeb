// Inner loops over what a mask says: a table of its own beside kernels.h's, for each instruction
// set.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace truenorm {

template <class T>
struct MaskedKernels {
  // The values where `valid`, side by side; up to kPastPacked more may be written. Returns how
  // many.
  int64_t (*pack)(const T* from, const bool* valid, int64_t len, T* to);

  // `apply` and `grad_apply` of kernels.h on runs that follow one another and share a mask; `fill`,
  // or zero, for what is not valid.
  void (*apply)(const T* x, T* y, const bool* valid, int64_t runs, int64_t len, const Affine<T>* by,
                T fill);
  void (*grad_apply)(const T* grad, const T* x, T* grad_x, const bool* valid, int64_t runs,
                     int64_t len, const GradAffine<compute_t<T>>* by);

  // Runs that share a mask: `fill` for what is not valid.
  void (*clear)(T* values, const bool* valid, int64_t runs, int64_t len, T fill);

  // Mean and m2 of what is valid of `runs` runs, whose masks follow one another, of which count is
  // known. False where sums about zero do not serve: then they are to be packed.
  bool (*moments)(const T* x, const bool* valid, int64_t runs, int64_t len, int64_t stride,
                  Moments* found);
  GradSums (*grad_sums)(const T* grad, const T* x, const bool* valid, int64_t runs, int64_t len,
                        int64_t stride, double mean, double rstd);
};
constexpr int64_t kPastPacked = 16;

struct MaskedSet {
  MaskedKernels<double> f64;
  MaskedKernels<float> f32;
  MaskedKernels<bf16> bf;
  MaskedKernels<f16> hf;
};

// of the instruction set in use
const MaskedSet& masked_set();

template <class T>
const MaskedKernels<T>& masked_table() {
  if constexpr (std::is_same_v<T, double>)
    return masked_set().f64;
  else if constexpr (std::is_same_v<T, float>)
    return masked_set().f32;
  else if constexpr (std::is_same_v<T, bf16>)
    return masked_set().bf;
  else
    return masked_set().hf;
}

}  // namespace truenorm
