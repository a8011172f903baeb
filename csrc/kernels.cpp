// The inner loops of kernels.h, for one instruction set.
#include "kernels.h"

#include "simd.h"

#if !defined(TRUENORM_ISA)
#error "compile once per instruction set, with TRUENORM_ISA naming it"
#endif

namespace truenorm {
namespace {

// A block of up to 16 values: in place where it is whole, else a copy padded with `with`.
template <class T>
TN_INLINE const T* block(const T* from, int64_t count, T with, Padded<T>& padded) {
  return count >= kLanes ? from : Padded<T>::fill(padded, from, count, with);
}

// ------------------------------------------------------------------- moments

template <class T>
Moments moments(const T* x, int64_t runs, int64_t len, int64_t stride, bool centred) {
  // About the first value, in float64: even an outlier there is at most sqrt(n) standard
  // deviations from the mean, which costs a relative error of some n · 1e-16.
  const T origin = centred ? x[0] : T{};
  const double shift = centred ? to_double(origin) : 0.0;
  const vd shifts = splat<vd>(shift);
  Sum sum, square;
  Padded<T> padded;
  for (int64_t run = 0; run < runs; ++run) {
    const T* p = x + run * stride;
    for (int64_t i = 0; i < len; i += kLanes) {
      const T* from = block(p + i, len - i, origin, padded);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const vd d = Lane<T>::load_double(from + r * D) - shifts;
        sum.r[r] += d;
        square.r[r] += d * d;
      }
    }
  }
  const double n = double(runs * len);
  const double s = Sum::total(sum), q = Sum::total(square);
  if (!centred) return {n, 0.0, q};
  const double m2 = q - s * s / n;
  return {n, shift + s / n, m2 < 0.0 ? 0.0 : m2};
}

template <class T, int B>
TN_INLINE void column_block(const T* x, int64_t rows, int64_t cols, int64_t ld, double* mean,
                            double* m2) {
  constexpr int V = B * R;
  vd shift[V], sum[V] = {}, square[V] = {};
  Padded<T> padded;
  const T* first = B > 1 ? x : block(x, cols, T{}, padded);
#pragma GCC unroll 64
  for (int v = 0; v < V; ++v) shift[v] = Lane<T>::load_double(first + v * D);
  for (int64_t row = 1; row < rows; ++row) {
    const T* from = B > 1 ? x + row * ld : block(x + row * ld, cols, T{}, padded);
#pragma GCC unroll 64
    for (int v = 0; v < V; ++v) {
      const vd d = Lane<T>::load_double(from + v * D) - shift[v];
      sum[v] += d;
      square[v] += d * d;
    }
  }
  const double n = double(rows);
  double out_mean[V * D], out_m2[V * D];
  for (int v = 0; v < V; ++v) {
    const vd centre = sum[v] / n;
    const vd spread = square[v] - sum[v] * centre;
    store_raw(out_mean + v * D, shift[v] + centre);
    store_raw(out_m2 + v * D, spread);
  }
  for (int64_t c = 0; c < (B > 1 ? B * kLanes : (cols < kLanes ? cols : kLanes)); ++c) {
    mean[c] = out_mean[c];
    m2[c] = out_m2[c] < 0.0 ? 0.0 : out_m2[c];
  }
}

constexpr int kWide = 4;  // blocks of 16 columns that are kept in registers together

template <class T>
void column_moments(const T* x, int64_t rows, int64_t cols, int64_t ld, double* mean, double* m2) {
  int64_t c = 0;
  for (; c + kWide * kLanes <= cols; c += kWide * kLanes)
    column_block<T, kWide>(x + c, rows, kWide * kLanes, ld, mean + c, m2 + c);
  for (; c < cols; c += kLanes) column_block<T, 1>(x + c, rows, cols - c, ld, mean + c, m2 + c);
}

// ------------------------------------------------------------------- element by element

// out[i] = f(in[0][i], …, coef[0][i], …), 16 values at a time; the last few through padded copies.
template <class L, int In, int Coefs, class T, class A, class Fn>
TN_INLINE void map(const T* const (&in)[In], const A* const (&coef)[Coefs], int used, T* out,
                   int64_t len, Fn f) {
  using V = typename L::V;
  constexpr int lanes = L::lanes;
  Padded<T> in_copy[In], out_copy;
  Padded<A> coef_copy[Coefs];
  for (int64_t i = 0; i < len; i += kLanes) {
    const int64_t count = len - i < kLanes ? len - i : kLanes;
    const T* from[In];
    const A* with[Coefs];
    for (int k = 0; k < In; ++k) from[k] = block(in[k] + i, count, T{}, in_copy[k]);
    for (int k = 0; k < used; ++k) with[k] = block(coef[k] + i, count, A{}, coef_copy[k]);
    T* to = count == kLanes ? out + i : out_copy.values;
#pragma GCC unroll 8
    for (int j = 0; j < kLanes; j += lanes) {
      V values[In], coefs[Coefs];
      for (int k = 0; k < In; ++k) values[k] = L::load(from[k] + j);
      for (int k = 0; k < used; ++k) coefs[k] = load_raw<V>(with[k] + j);
      L::store(to + j, f(values, coefs));
    }
    if (count < kLanes) std::memcpy(out + i, out_copy.values, size_t(count) * sizeof(T));
  }
}

// the vectors of outputs and of gradients
template <class T>
using Out = std::conditional_t<std::is_same_v<T, float>, Lane<T>, Wide<T>>;
template <class T>
using Grad = Lane<T>;

template <class A>
constexpr const A* kNone[1] = {nullptr};

template <class T>
void apply(const T* x, T* y, int64_t len, output_t<T> hi, output_t<T> scale, output_t<T> shift) {
  using V = typename Out<T>::V;
  const V h = splat<V>(hi), sc = splat<V>(scale), sh = splat<V>(shift);
  map<Out<T>, 1, 1>({x}, kNone<output_t<T>>, 0, y, len,
                    [&](const V* v, const V*) { return (v[0] - h) * sc + sh; });
}

template <class T>
void apply_each(const T* x, T* y, int64_t len, const output_t<T>* hi, const output_t<T>* scale,
                const output_t<T>* shift) {
  using V = typename Out<T>::V;
  map<Out<T>, 1, 3>({x}, {hi, scale, shift}, 3, y, len,
                    [](const V* v, const V* c) { return (v[0] - c[0]) * c[1] + c[2]; });
}

template <class T>
void apply_row(const T* x, T* y, int64_t len, output_t<T> hi, output_t<T> lo, output_t<T> rstd,
               const output_t<T>* weight, const output_t<T>* bias) {
  using V = typename Out<T>::V;
  const V h = splat<V>(hi), l = splat<V>(lo), r = splat<V>(rstd);
  if (weight && bias)
    map<Out<T>, 1, 2>({x}, {weight, bias}, 2, y, len,
                      [&](const V* v, const V* c) { return ((v[0] - h) - l) * r * c[0] + c[1]; });
  else if (weight)
    map<Out<T>, 1, 1>({x}, {weight}, 1, y, len,
                      [&](const V* v, const V* c) { return ((v[0] - h) - l) * r * c[0]; });
  else if (bias)
    map<Out<T>, 1, 1>({x}, {bias}, 1, y, len,
                      [&](const V* v, const V* c) { return ((v[0] - h) - l) * r + c[0]; });
  else
    map<Out<T>, 1, 1>({x}, kNone<output_t<T>>, 0, y, len,
                      [&](const V* v, const V*) { return ((v[0] - h) - l) * r; });
}

template <class T>
void grad_apply(const T* grad, const T* x, T* grad_x, int64_t len, compute_t<T> scale,
                compute_t<T> hi, compute_t<T> rstd, compute_t<T> slope, compute_t<T> shift) {
  using V = typename Grad<T>::V;
  const V sc = splat<V>(scale), h = splat<V>(hi), r = splat<V>(rstd), sl = splat<V>(slope),
          sh = splat<V>(shift);
  map<Grad<T>, 2, 1>({grad, x}, kNone<compute_t<T>>, 0, grad_x, len,
                     [&](const V* v, const V*) { return v[0] * sc + ((v[1] - h) * r * sl + sh); });
}

template <class T>
void grad_apply_each(const T* grad, const T* x, T* grad_x, int64_t len, const compute_t<T>* scale,
                     const compute_t<T>* hi, const compute_t<T>* rstd, const compute_t<T>* slope,
                     const compute_t<T>* shift) {
  using V = typename Grad<T>::V;
  map<Grad<T>, 2, 5>(
      {grad, x}, {scale, hi, rstd, slope, shift}, 5, grad_x, len,
      [](const V* v, const V* c) { return v[0] * c[0] + ((v[1] - c[1]) * c[2] * c[3] + c[4]); });
}

template <class T>
void grad_apply_row(const T* grad, const T* x, T* grad_x, int64_t len, const compute_t<T>* weight,
                    compute_t<T> hi, compute_t<T> rstd, compute_t<T> slope, compute_t<T> shift) {
  using V = typename Grad<T>::V;
  const V h = splat<V>(hi), r = splat<V>(rstd), sl = splat<V>(slope), sh = splat<V>(shift);
  if (weight)
    map<Grad<T>, 2, 1>({grad, x}, {weight}, 1, grad_x, len, [&](const V* v, const V* c) {
      return v[0] * c[0] * r + ((v[1] - h) * r * sl + sh);
    });
  else
    map<Grad<T>, 2, 1>({grad, x}, kNone<compute_t<T>>, 0, grad_x, len,
                       [&](const V* v, const V*) { return v[0] * r + ((v[1] - h) * r * sl + sh); });
}

template <class T>
void grad_scale(const T* grad, T* grad_x, int64_t len, compute_t<T> scale) {
  using V = typename Grad<T>::V;
  const V sc = splat<V>(scale);
  map<Grad<T>, 1, 1>({grad}, kNone<compute_t<T>>, 0, grad_x, len,
                     [&](const V* v, const V*) { return v[0] * sc; });
}

template <class T>
void grad_scale_each(const T* grad, T* grad_x, int64_t len, const compute_t<T>* scale) {
  using V = typename Grad<T>::V;
  map<Grad<T>, 1, 1>({grad}, {scale}, 1, grad_x, len,
                     [](const V* v, const V* c) { return v[0] * c[0]; });
}

// ------------------------------------------------------------------- gradient sums

template <class T>
GradSums grad_sums(const T* grad, const T* x, int64_t runs, int64_t len, int64_t stride,
                   double mean) {
  const vd means = splat<vd>(mean);
  Sum sum_grad, sum_grad_x;
  Padded<T> grad_copy, x_copy;
  for (int64_t run = 0; run < runs; ++run) {
    const int64_t start = run * stride;
    for (int64_t i = 0; i < len; i += kLanes) {
      const T* g_from = block(grad + start + i, len - i, T{}, grad_copy);
      const T* x_from = block(x + start + i, len - i, x[start + i], x_copy);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const vd g = Lane<T>::load_double(g_from + r * D);
        sum_grad.r[r] += g;
        sum_grad_x.r[r] += g * (Lane<T>::load_double(x_from + r * D) - means);
      }
    }
  }
  return {Sum::total(sum_grad), Sum::total(sum_grad_x)};
}

template <class T, int B>
TN_INLINE void column_grad_block(const T* grad, const T* x, int64_t rows, int64_t cols, int64_t ld,
                                 const double* mean, double* sum_grad, double* sum_grad_x) {
  constexpr int V = B * R;
  vd means[V], sum_g[V] = {}, sum_gx[V] = {};
  Padded<double> mean_copy;
  Padded<T> grad_copy, x_copy;
  const double* mean_from = B > 1 ? mean : block(mean, cols, 0.0, mean_copy);
  for (int v = 0; v < V; ++v) means[v] = load_raw<vd>(mean_from + v * D);
  for (int64_t row = 0; row < rows; ++row) {
    const T* g_from = B > 1 ? grad + row * ld : block(grad + row * ld, cols, T{}, grad_copy);
    const T* x_from = B > 1 ? x + row * ld : block(x + row * ld, cols, T{}, x_copy);
#pragma GCC unroll 64
    for (int v = 0; v < V; ++v) {
      const vd g = Lane<T>::load_double(g_from + v * D);
      sum_g[v] += g;
      sum_gx[v] += g * (Lane<T>::load_double(x_from + v * D) - means[v]);
    }
  }
  const size_t bytes =
      size_t(B > 1 || cols >= kLanes ? int64_t(B) * kLanes : cols) * sizeof(double);
  std::memcpy(sum_grad, sum_g, bytes);
  std::memcpy(sum_grad_x, sum_gx, bytes);
}

template <class T>
void column_grad_sums(const T* grad, const T* x, int64_t rows, int64_t cols, int64_t ld,
                      const double* mean, double* sum_grad, double* sum_grad_x) {
  int64_t c = 0;
  for (; c + kWide * kLanes <= cols; c += kWide * kLanes)
    column_grad_block<T, kWide>(grad + c, x + c, rows, kWide * kLanes, ld, mean + c, sum_grad + c,
                                sum_grad_x + c);
  for (; c < cols; c += kLanes)
    column_grad_block<T, 1>(grad + c, x + c, rows, cols - c, ld, mean + c, sum_grad + c,
                            sum_grad_x + c);
}

template <class T>
GradSums row_grad_sums(const T* grad, const T* x, int64_t len, double mean,
                       const compute_t<T>* weight) {
  using A = compute_t<T>;
  const vd means = splat<vd>(mean);
  Sum sum_grad, sum_grad_x;
  Padded<T> grad_copy, x_copy;
  Padded<A> weight_copy;
  for (int64_t i = 0; i < len; i += kLanes) {
    const T* g_from = block(grad + i, len - i, T{}, grad_copy);
    const T* x_from = block(x + i, len - i, x[i], x_copy);
    const A* w_from = weight ? block(weight + i, len - i, A{}, weight_copy) : nullptr;
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      vd g = Lane<T>::load_double(g_from + r * D);
      if (weight) g *= Lane<A>::load_double(w_from + r * D);
      sum_grad.r[r] += g;
      sum_grad_x.r[r] += g * (Lane<T>::load_double(x_from + r * D) - means);
    }
  }
  return {Sum::total(sum_grad), Sum::total(sum_grad_x)};
}

template <class T, int B>
TN_INLINE void row_param_block(const T* grad, const T* x, int64_t rows, int64_t cols, int64_t ld,
                               const double* mean, const double* rstd, double* sum_grad_x_hat,
                               double* sum_grad) {
  constexpr int V = B * R;
  vd sum_g[V] = {}, sum_gx[V] = {};
  Padded<T> grad_copy, x_copy;
  for (int64_t row = 0; row < rows; ++row) {
    const T* g_from = B > 1 ? grad + row * ld : block(grad + row * ld, cols, T{}, grad_copy);
    const T* x_from = B > 1 ? x + row * ld : block(x + row * ld, cols, T{}, x_copy);
    const vd m = splat<vd>(mean[row]), r = splat<vd>(rstd[row]);
#pragma GCC unroll 64
    for (int v = 0; v < V; ++v) {
      const vd g = Lane<T>::load_double(g_from + v * D);
      sum_g[v] += g;
      sum_gx[v] += g * ((Lane<T>::load_double(x_from + v * D) - m) * r);
    }
  }
  const size_t bytes =
      size_t(B > 1 || cols >= kLanes ? int64_t(B) * kLanes : cols) * sizeof(double);
  std::memcpy(sum_grad, sum_g, bytes);
  std::memcpy(sum_grad_x_hat, sum_gx, bytes);
}

template <class T>
void row_param_sums(const T* grad, const T* x, int64_t rows, int64_t cols, int64_t ld,
                    const double* mean, const double* rstd, double* sum_grad_x_hat,
                    double* sum_grad) {
  int64_t c = 0;
  for (; c + kWide * kLanes <= cols; c += kWide * kLanes)
    row_param_block<T, kWide>(grad + c, x + c, rows, kWide * kLanes, ld, mean, rstd,
                              sum_grad_x_hat + c, sum_grad + c);
  for (; c < cols; c += kLanes)
    row_param_block<T, 1>(grad + c, x + c, rows, cols - c, ld, mean, rstd, sum_grad_x_hat + c,
                          sum_grad + c);
}

// ------------------------------------------------------------------- conversions

template <class T>
void widen(const T* in, double* out, int64_t len) {
  Padded<T> padded;
  Padded<double> result;
  for (int64_t i = 0; i < len; i += kLanes) {
    const T* from = block(in + i, len - i, T{}, padded);
    double* to = len - i >= kLanes ? out + i : result.values;
    for (int r = 0; r < R; ++r) store_raw(to + r * D, Lane<T>::load_double(from + r * D));
    if (len - i < kLanes) std::memcpy(out + i, to, size_t(len - i) * sizeof(double));
  }
}

template <class T>
void narrow(const double* in, T* out, int64_t len) {
  Padded<double> padded;
  Padded<T> result;
  for (int64_t i = 0; i < len; i += kLanes) {
    const double* from = block(in + i, len - i, 0.0, padded);
    T* to = len - i >= kLanes ? out + i : result.values;
    for (int r = 0; r < R; ++r) Lane<T>::store_double(to + r * D, load_raw<vd>(from + r * D));
    if (len - i < kLanes) std::memcpy(out + i, to, size_t(len - i) * sizeof(T));
  }
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
