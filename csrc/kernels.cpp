// The table of kernels.h, for one instruction set.
#include "kernels.h"

#include "kernel_elementwise.h"
#include "kernel_gradients.h"
#include "kernel_moments.h"
#include "simd.h"

#if !defined(TRUENORM_ISA)
#error "compile once per instruction set, with TRUENORM_ISA naming it"
#endif

namespace truenorm {
namespace {

template <class T>
void widen(const T* in, double* out, int64_t len) {
  int64_t i = 0;
  for (; i + D <= len; i += D) store_raw(out + i, Lane<T>::load_double(in + i));
  for (; i < len; ++i) out[i] = to_double(in[i]);
}

template <class T>
void narrow(const double* in, T* out, int64_t len) {
  int64_t i = 0;
  for (; i + D <= len; i += D) Lane<T>::store_double(out + i, load_raw<vd>(in + i));
  if (i == len) return;
  Padded<double> padded;
  Padded<T> result;
  Padded<double>::fill(padded, in + i, len - i, 0.0);
  for (int r = 0; r < R; ++r) {
    Lane<T>::store_double(result.values + r * D, load_raw<vd>(padded.values + r * D));
  }
  std::memcpy(out + i, result.values, size_t(len - i) * sizeof(T));
}

template <class T>
constexpr Kernels<T> kernels_of() {
  return {
      moments<T>,         column_moments<T>,   apply<T>,         apply_each<T>,      apply_row<T>,
      grad_sums<T>,       column_grad_sums<T>, row_grad_sums<T>, row_param_sums<T>,  grad_apply<T>,
      grad_apply_each<T>, grad_apply_row<T>,   grad_scale<T>,    grad_scale_each<T>, widen<T>,
      narrow<T>};
}

}  // namespace

#define TN_STRING_(x) #x
#define TN_STRING(x) TN_STRING_(x)

namespace TRUENORM_ISA {
extern const InstructionSet instruction_set;
const InstructionSet instruction_set = {TN_STRING(TRUENORM_ISA), kernels_of<double>(),
                                        kernels_of<float>(), kernels_of<bf16>(), kernels_of<f16>()};
}  // namespace TRUENORM_ISA

}  // namespace truenorm
