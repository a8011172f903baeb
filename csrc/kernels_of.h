// The table of kernels.h for one element type and one instruction set. A file for each type
// includes it, so that the types are compiled side by side.
#pragma once

#include "kernel_activation.h"
#include "kernel_elementwise.h"
#include "kernel_gate.h"
#include "kernel_gradients.h"
#include "kernel_input_gradients.h"
#include "kernel_local_response.h"
#include "kernel_local_response_exact.h"
#include "kernel_masked.h"
#include "kernel_moments.h"
#include "kernel_turn.h"
#include "kernels.h"
#include "simd.h"

#if !defined(TRUENORM_ISA)
#error "compile once per instruction set, with TRUENORM_ISA naming it"
#endif

namespace truenorm {
namespace {

template <class T>
constexpr Kernels<T> kernels_of() {
  return {moments<T>,
          row_moments<T>,
          column_moments<T>,
          apply<T>,
          apply_each<T>,
          apply_rows<T>,
          act<T>,
          act_each<T>,
          act_row<T>,
          add<T>,
          grad_sums<T>,
          column_grad_sums<T>,
          row_grad_sums<T, true>,
          row_grad_sums<T, false>,
          grad_apply<T>,
          grad_apply_runs<T>,
          grad_apply_each<T>,
          grad_apply_rows<T>,
          grad_apply_rows_about_zero<T>,
          grad_scale<T>,
          grad_scale_each<T>,
          pack<T>,
          apply_valid<T>,
          grad_apply_valid<T>,
          clear_runs<T>,
          moments_of_valid<T>,
          grad_sums_of_valid<T>,
          widen<T>,
          narrow<T>,
          turn<T>,
          gate<T>,
          gated<T>,
          gate_grads<T>,
          response<T>,
          response_exact<T>};
}

}  // namespace
}  // namespace truenorm
