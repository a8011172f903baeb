// The inner loops, one table of function pointers per element type; kernels_*.cpp fill them once
// for each instruction set, and kernels.cpp puts them together. Nothing here knows of tensors,
// threads or layers.
//
// Promises, kept by every function: moments are summed in float64; sums of gradients in the type
// they are computed in, for eight steps at most (of a row a cache line each, whose lanes are added
// in it too), and then in float64; both over fixed lanes, so a result depends on the values and
// their number alone, never on alignment or threads; tails run the same vector code on a padded
// copy, so a value's result does not depend on its place; and nothing is contracted to a fused
// multiply-add but squares that are exact, nor fused where it is asked for
// (`fused` in simd.h) with other bits, so that every instruction set gives the same.
#pragma once

#include <cstdint>
#include <type_traits>

#include "activation.h"
#include "coefficients.h"
#include "moments.h"

namespace truenorm {

// Sums over one channel: of the gradient, and of gradient · x̂, x̂ = (x − mean) · rstd.
struct GradSums {
  double grad = 0.0;
  double grad_x_hat = 0.0;

  void add(const GradSums& o) {
    grad += o.grad;
    grad_x_hat += o.grad_x_hat;
  }
};

// GradSums of each of several rows, kind by kind: coefficients of rows are made side by side.
struct RowSums {
  double *grad, *grad_x_hat;

  RowSums from(int64_t row) const { return {grad + row, grad_x_hat + row}; }
};

// What grad_x takes of each of several runs, kind by kind.
struct RunTerms {
  const double *mean, *rstd, *weight;
  RowSums means;  // of grad · weight and of that by x̂, over the run's statistic
};

// LocalResponseNorm of a tile: every channel of a few neighbouring positions of one sample.
struct ResponseTile {
  int64_t channels, positions;
  int64_t stride;  // from channel to channel; 0 where a position's channels are side by side
  int64_t size;    // channels of a window, size / 2 of them before its own
  double alpha;    // the layer's over size
  double beta, k;
};
constexpr int64_t kResponseSizes = 8;  // the largest window that is summed in float

constexpr int64_t kPastPacked = 16;

// What is rounded to half precision before a gate's product, as operators of that dtype would.
struct GateRounding {
  bool x_hat, product;
};

// Rows that are summed together, and whose columns are summed before these go on in float64.
constexpr int kRowsTogether = 8;
// Short runs whose coefficients are made together.
constexpr int64_t kRunsTogether = 64;

template <class T>
struct Kernels {
  using A = compute_t<T>;

  // Moments of `runs` runs of `len` values that start `stride` apart; about zero unless centred.
  Moments (*moments)(const T* x, int64_t runs, int64_t len, int64_t stride, bool centred);

  // The same of each of up to kRowsTogether runs that follow one another. `readable` values from
  // the first on may be read.
  void (*row_moments)(const T* x, int64_t rows, int64_t len, int64_t readable, bool centred,
                      Moments* of_rows);

  // Moments of each of `cols` neighbouring columns over `rows` rows that start `ld` apart.
  void (*column_moments)(const T* x, int64_t rows, int64_t cols, int64_t ld, double* mean,
                         double* m2);

  // Outputs and gradients of the input. `stream` writes past the caches, where a result is too
  // large to stay in them; the caller fences.
  // `runs` that follow one another in memory, each with coefficients of its own
  void (*apply)(const T* x, T* y, int64_t runs, int64_t len, const Affine<T>* by, bool stream);
  // `each`: rows that follow one another, coefficients by element
  void (*apply_each)(const T* x, T* y, int64_t rows, int64_t len, const Affines<T>& by,
                     bool stream);
  // up to kRowsTogether rows that follow one another, all with weight and bias or all without
  void (*apply_rows)(const T* x, T* y, int64_t rows, int64_t len, const RowAffine<T>* by,
                     bool stream);
  // The same three with an activation and a residual, or the gradient of what these are applied to;
  // `each`: rows that start `ld` apart. `out` may be one of the inputs.
  void (*act)(const ActInputs<T>& in, T* out, int64_t runs, int64_t len, const Affine<T>* by,
              Activation act, bool stream);
  void (*act_each)(const ActInputs<T>& in, T* out, int64_t rows, int64_t cols, int64_t ld,
                   const Affines<T>& by, Activation act, bool stream);
  void (*act_row)(const ActInputs<T>& in, T* out, int64_t len, const RowAffine<T>& by,
                  Activation act, bool stream);

  // one + other; `to` may be one of them
  void (*add)(const T* one, const T* other, T* to, int64_t len, bool stream);

  GradSums (*grad_sums)(const T* grad, const T* x, int64_t runs, int64_t len, int64_t stride,
                        double mean, double rstd);
  void (*column_grad_sums)(const T* grad, const T* x, int64_t rows, int64_t cols, int64_t ld,
                           const double* mean, const double* rstd, double* sum_grad,
                           double* sum_grad_x_hat);
  // The same sums of grad · weight along each of up to kRowsTogether rows that start `ld` apart,
  // with a mean and rstd of their own; and, unless these are null, the sums of grad and grad · x̂
  // down their columns, added to what is there. weight may be null. `readable` values from the
  // first on may be read.
  using RowGradSums = void(const T* grad, const T* x, int64_t rows, int64_t len, int64_t ld,
                           int64_t readable, const double* mean, const double* rstd,
                           const A* weight, const RowSums& of_rows, double* sum_grad,
                           double* sum_grad_x_hat);
  RowGradSums* row_grad_sums;
  // Where the means are zero, without the sums of grad alone: those of rows are 0, those down
  // columns stay as they are.
  RowGradSums* row_grad_sums_about_zero;

  // grad_x = grad · scale + (x − hi) · rstd · slope + shift
  void (*grad_apply)(const T* grad, const T* x, T* grad_x, int64_t runs, int64_t len,
                     const GradAffine<A>* by, bool stream);
  // the same of up to kRunsTogether short runs
  void (*grad_apply_runs)(const T* grad, const T* x, T* grad_x, int64_t runs, int64_t len,
                          const RunTerms& of, bool stream);
  void (*grad_apply_each)(const T* grad, const T* x, T* grad_x, int64_t rows, int64_t len,
                          const GradAffines<A>& by, bool stream);
  // grad_x = grad · weight · rstd + (x − hi) · rstd · slope + shift; weight may be null
  // of up to kRowsTogether rows that start `ld` apart; `means` of grad · weight and of that by x̂
  using GradApplyRows = void(const T* grad, const T* x, T* grad_x, int64_t rows, int64_t len,
                             int64_t ld, const A* weight, const double* mean, const double* rstd,
                             const RowSums& means, bool stream);
  GradApplyRows* grad_apply_rows;
  // where `mean` and the means of grad · weight are zero
  GradApplyRows* grad_apply_rows_about_zero;
  // grad_x = grad · scale: the statistics do not depend on x
  void (*grad_scale)(const T* grad, T* grad_x, int64_t runs, int64_t len, const GradAffine<A>* by,
                     bool stream);
  void (*grad_scale_each)(const T* grad, T* grad_x, int64_t rows, int64_t len, const A* scale,
                          bool stream);

  // Where `valid` says so. What counts, side by side; up to kPastPacked more may be written.
  // Returns how many.
  int64_t (*pack)(const T* from, const bool* valid, int64_t len, T* to);
  // `apply` and `grad_apply` on runs that follow one another and share a mask; `fill`, or zero, for
  // what is not valid. `clear`: that alone.
  void (*apply_valid)(const T* x, T* y, const bool* valid, int64_t runs, int64_t len,
                      const Affine<T>* by, T fill);
  void (*grad_apply_valid)(const T* grad, const T* x, T* grad_x, const bool* valid, int64_t runs,
                           int64_t len, const GradAffine<A>* by);
  void (*clear)(T* values, const bool* valid, int64_t runs, int64_t len, T fill);
  // Mean and m2 of what is valid of `runs` runs, whose masks follow one another, of which count is
  // known. False where sums about zero do not serve: then they are to be packed.
  bool (*moments_of_valid)(const T* x, const bool* valid, int64_t runs, int64_t len, int64_t stride,
                           Moments* found);
  GradSums (*grad_sums_of_valid)(const T* grad, const T* x, const bool* valid, int64_t runs,
                                 int64_t len, int64_t stride, double mean, double rstd);

  // out = double(in) and in = T(out), for what is computed value by value in float64
  void (*widen)(const T* in, double* out, int64_t len);
  void (*narrow)(const double* in, T* out, int64_t len);

  // to[c · to_ld + r] = from[r · ld + c]; along the columns of `from`, which are rows of `to`, or
  // along its rows
  void (*turn)(const T* from, int64_t rows, int64_t cols, int64_t ld, T* to, int64_t to_ld,
               bool along_columns);

  // A gate's act(g) is g · σ(g) where it is a `swish`, and else σ(g).
  // to = from · act(gate) and, unless it is null, slopes = from · act'(gate); where gate is null,
  // to = from
  void (*gate)(const T* from, const T* gate, A* to, A* slopes, int64_t len, bool swish);
  // to = from · weight · act(gate), each of which may be null; `to` may be `from`
  void (*gated)(const A* from, const A* weight, const T* gate, T* to, int64_t len, bool swish,
                GateRounding rounds);
  // of_other = grad · act(gate) and of_gate = grad · other · act'(gate)
  void (*gate_grads)(const A* grad, const T* other, const T* gate, T* of_other, T* of_gate,
                     int64_t len, bool swish);

  // The outputs of a tile, or, where grad is not null, the gradients of its inputs, in float. Where
  // float is not enough they come out as NaN or Inf, and the result is false.
  bool (*response)(const ResponseTile& tile, const T* grad, const T* x, T* out, float* scratch);
  // The same in double; where `repairing`, only of those that are not finite.
  void (*response_exact)(const ResponseTile& tile, const T* grad, const T* x, T* out,
                         double* scratch, bool repairing);
};

struct InstructionSet {
  const char* name;
  const Kernels<double>* f64;
  const Kernels<float>* f32;
  const Kernels<bf16>* bf;
  const Kernels<f16>* hf;
};

template <class T>
const Kernels<T>& table(const InstructionSet& set) {
  if constexpr (std::is_same_v<T, double>)
    return *set.f64;
  else if constexpr (std::is_same_v<T, float>)
    return *set.f32;
  else if constexpr (std::is_same_v<T, bf16>)
    return *set.bf;
  else
    return *set.hf;
}

// The one in use: the best of this machine, or the one that TRUENORM_ISA names; null if it names
// one that is not here.
const InstructionSet* instruction_set();

}  // namespace truenorm
