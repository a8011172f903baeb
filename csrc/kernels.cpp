// The inner loops of kernels.h, for one instruction set.
#include "kernels.h"

#include "simd.h"

#if !defined(TRUENORM_ISA)
#error "compile once per instruction set, with TRUENORM_ISA naming it"
#endif

namespace truenorm {
namespace {

constexpr int kWide = 4;  // blocks of 16 columns that are kept in registers together

// How a run of `len` values is read, 16 at a time: body(first, keep) for whole blocks with keep 0,
// then for the last few with the block that ends where the run does, whose first `keep` values have
// been read before. A run of fewer than 16 is the caller's to pad.
template <class Body>
TN_INLINE void blocks(int64_t len, const Body& body) {
  int64_t i = 0;
  for (; i + kLanes <= len; i += kLanes) body(i, 0);
  if (i < len) body(len - kLanes, int(i + kLanes - len));
}

// v, with the lanes that were read before as zero.
TN_INLINE vd unread(vd v, int r, int keep) {
  vl lane;
  for (int i = 0; i < D; ++i) lane[i] = r * D + i;
  return (vd)((vl)v & (lane >= keep));
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
  const auto add = [&](const T* from, int keep) TN_FLAT {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      vd d = Lane<T>::load_double(from + r * D) - shifts;
      if (keep) d = unread(d, r, keep);
      sum.r[r] += d;
      square.r[r] += d * d;
    }
  };
  Padded<T> padded;
  for (int64_t run = 0; run < runs; ++run) {
    const T* p = x + run * stride;
    if (len < kLanes)
      add(Padded<T>::fill(padded, p, len, origin), 0);
    else
      blocks(len, [&](int64_t i, int keep) TN_FLAT { add(p + i, keep); });
  }
  const double n = double(runs * len);
  const double s = Sum::total(sum), q = Sum::total(square);
  if (!centred) return {n, 0.0, q};
  const double m2 = q - s * s / n;
  return {n, shift + s / n, m2 < 0.0 ? 0.0 : m2};
}

// Calls body<B>(column) for blocks of 64 and then of 16 columns; the last one ends with the
// columns.
template <class Wide4, class One>
TN_INLINE void column_blocks(int64_t cols, const Wide4& wide, const One& one) {
  int64_t c = 0;
  for (; c + kWide * kLanes <= cols; c += kWide * kLanes) wide(c);
  for (; c + kLanes <= cols; c += kLanes) one(c);
  if (c < cols) one(cols - kLanes);
}

template <class T, int B>
TN_INLINE void column_block(const T* x, int64_t rows, int64_t ld, double* mean, double* m2) {
  constexpr int V = B * R;
  vd shift[V], sum[V] = {}, square[V] = {};
#pragma GCC unroll 64
  for (int v = 0; v < V; ++v) shift[v] = Lane<T>::load_double(x + v * D);
  for (int64_t row = 1; row < rows; ++row) {
#pragma GCC unroll 64
    for (int v = 0; v < V; ++v) {
      const vd d = Lane<T>::load_double(x + row * ld + v * D) - shift[v];
      sum[v] += d;
      square[v] += d * d;
    }
  }
  const double n = double(rows);
  for (int v = 0; v < V; ++v) {
    const vd centre = sum[v] / n;
    const vd spread = square[v] - sum[v] * centre;
    store_raw(mean + v * D, shift[v] + centre);
    store_raw(m2 + v * D, spread < 0.0 ? vd{} : spread);
  }
}

template <class T>
void column_moments(const T* x, int64_t rows, int64_t cols, int64_t ld, double* mean, double* m2) {
  if (cols < kLanes) {
    // too few for a vector: one row at a time through a padded copy of the whole matrix's width
    for (int64_t c = 0; c < cols; ++c) {
      const Moments m = moments(x + c, rows, 1, ld, true);
      mean[c] = m.mean;
      m2[c] = m.m2;
    }
    return;
  }
  column_blocks(
      cols, [&](int64_t c) { column_block<T, kWide>(x + c, rows, ld, mean + c, m2 + c); },
      [&](int64_t c) { column_block<T, 1>(x + c, rows, ld, mean + c, m2 + c); });
}

// ------------------------------------------------------------------- element by element

// out[i] = f(in[0][i], …, coef[0][i], …), 16 values at a time. The last block ends where the run
// does and writes some values a second time, the same; a short run goes through padded copies.
template <class L, int In, int Coefs, class T, class A, class Fn>
TN_INLINE void map(const T* const (&in)[In], const A* const (&coef)[Coefs], int used, T* out,
                   int64_t len, Fn f) {
  using V = typename L::V;
  const auto one = [&](const T* const* from, const A* const* with, T* to) TN_FLAT {
#pragma GCC unroll 8
    for (int j = 0; j < kLanes; j += L::lanes) {
      V values[In], coefs[Coefs] = {};
      for (int k = 0; k < In; ++k) values[k] = L::load(from[k] + j);
      for (int k = 0; k < used; ++k) coefs[k] = load_raw<V>(with[k] + j);
      L::store(to + j, f(values, coefs));
    }
  };
  const T* from[In];
  const A* with[Coefs];
  if (len < kLanes) {
    Padded<T> in_copy[In], out_copy;
    Padded<A> coef_copy[Coefs];
    for (int k = 0; k < In; ++k) from[k] = Padded<T>::fill(in_copy[k], in[k], len, T{});
    for (int k = 0; k < used; ++k) with[k] = Padded<A>::fill(coef_copy[k], coef[k], len, A{});
    one(from, with, out_copy.values);
    std::memcpy(out, out_copy.values, size_t(len) * sizeof(T));
    return;
  }
  blocks(len, [&](int64_t i, int) TN_FLAT {
    for (int k = 0; k < In; ++k) from[k] = in[k] + i;
    for (int k = 0; k < used; ++k) with[k] = coef[k] + i;
    one(from, with, out + i);
  });
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

// Sums of g and of g · (x − mean) along runs, g being the gradient times `weight` where there is
// one.
template <class T>
TN_INLINE GradSums sum_gradients(const T* grad, const T* x, int64_t runs, int64_t len,
                                 int64_t stride, double mean, const compute_t<T>* weight) {
  using A = compute_t<T>;
  const vd means = splat<vd>(mean);
  Sum sum_grad, sum_grad_x;
  const auto add = [&](const T* g_from, const T* x_from, const A* w_from, int keep) TN_FLAT {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      vd g = Lane<T>::load_double(g_from + r * D);
      if (weight) g *= Lane<A>::load_double(w_from + r * D);
      vd gx = g * (Lane<T>::load_double(x_from + r * D) - means);
      if (keep) g = unread(g, r, keep), gx = unread(gx, r, keep);
      sum_grad.r[r] += g;
      sum_grad_x.r[r] += gx;
    }
  };
  Padded<T> grad_copy, x_copy;
  Padded<A> weight_copy;
  for (int64_t run = 0; run < runs; ++run) {
    const T *g = grad + run * stride, *v = x + run * stride;
    if (len < kLanes)
      add(Padded<T>::fill(grad_copy, g, len, T{}), Padded<T>::fill(x_copy, v, len, v[0]),
          weight ? Padded<A>::fill(weight_copy, weight, len, A{}) : nullptr, 0);
    else
      blocks(len,
             [&](int64_t i, int keep) { add(g + i, v + i, weight ? weight + i : nullptr, keep); });
  }
  return {Sum::total(sum_grad), Sum::total(sum_grad_x)};
}

template <class T>
GradSums grad_sums(const T* grad, const T* x, int64_t runs, int64_t len, int64_t stride,
                   double mean) {
  return sum_gradients<T>(grad, x, runs, len, stride, mean, nullptr);
}

template <class T>
GradSums row_grad_sums(const T* grad, const T* x, int64_t len, double mean,
                       const compute_t<T>* weight) {
  return weight ? sum_gradients<T>(grad, x, 1, len, 0, mean, weight)
                : sum_gradients<T>(grad, x, 1, len, 0, mean, nullptr);
}

template <class T, int B>
TN_INLINE void column_grad_block(const T* grad, const T* x, int64_t rows, int64_t ld,
                                 const double* mean, double* sum_grad, double* sum_grad_x) {
  constexpr int V = B * R;
  vd means[V], sum_g[V] = {}, sum_gx[V] = {};
  for (int v = 0; v < V; ++v) means[v] = load_raw<vd>(mean + v * D);
  for (int64_t row = 0; row < rows; ++row) {
#pragma GCC unroll 64
    for (int v = 0; v < V; ++v) {
      const vd g = Lane<T>::load_double(grad + row * ld + v * D);
      sum_g[v] += g;
      sum_gx[v] += g * (Lane<T>::load_double(x + row * ld + v * D) - means[v]);
    }
  }
  std::memcpy(sum_grad, sum_g, sizeof(sum_g));
  std::memcpy(sum_grad_x, sum_gx, sizeof(sum_gx));
}

template <class T>
void column_grad_sums(const T* grad, const T* x, int64_t rows, int64_t cols, int64_t ld,
                      const double* mean, double* sum_grad, double* sum_grad_x) {
  if (cols < kLanes) {
    for (int64_t c = 0; c < cols; ++c) {
      const GradSums s = grad_sums(grad + c, x + c, rows, 1, ld, mean[c]);
      sum_grad[c] = s.grad;
      sum_grad_x[c] = s.grad_x;
    }
    return;
  }
  const auto block = [&]<int B>(int64_t c, std::integral_constant<int, B>) {
    column_grad_block<T, B>(grad + c, x + c, rows, ld, mean + c, sum_grad + c, sum_grad_x + c);
  };
  column_blocks(
      cols, [&](int64_t c) { block(c, std::integral_constant<int, kWide>{}); },
      [&](int64_t c) { block(c, std::integral_constant<int, 1>{}); });
}

template <class T, int B>
TN_INLINE void row_param_block(const T* grad, const T* x, int64_t rows, int64_t ld,
                               const double* mean, const double* rstd, double* sum_grad_x_hat,
                               double* sum_grad) {
  constexpr int V = B * R;
  vd sum_g[V] = {}, sum_gx[V] = {};
  for (int64_t row = 0; row < rows; ++row) {
    const vd m = splat<vd>(mean[row]), r = splat<vd>(rstd[row]);
#pragma GCC unroll 64
    for (int v = 0; v < V; ++v) {
      const vd g = Lane<T>::load_double(grad + row * ld + v * D);
      sum_g[v] += g;
      sum_gx[v] += g * ((Lane<T>::load_double(x + row * ld + v * D) - m) * r);
    }
  }
  std::memcpy(sum_grad, sum_g, sizeof(sum_g));
  std::memcpy(sum_grad_x_hat, sum_gx, sizeof(sum_gx));
}

template <class T>
void row_param_sums(const T* grad, const T* x, int64_t rows, int64_t cols, int64_t ld,
                    const double* mean, const double* rstd, double* sum_grad_x_hat,
                    double* sum_grad) {
  if (cols < kLanes) {
    for (int64_t c = 0; c < cols; ++c) {
      double g_sum = 0.0, gx_sum = 0.0;
      for (int64_t row = 0; row < rows; ++row) {
        const double g = to_double(grad[row * ld + c]);
        g_sum += g;
        gx_sum += g * ((to_double(x[row * ld + c]) - mean[row]) * rstd[row]);
      }
      sum_grad[c] = g_sum;
      sum_grad_x_hat[c] = gx_sum;
    }
    return;
  }
  const auto block = [&]<int B>(int64_t c, std::integral_constant<int, B>) {
    row_param_block<T, B>(grad + c, x + c, rows, ld, mean, rstd, sum_grad_x_hat + c, sum_grad + c);
  };
  column_blocks(
      cols, [&](int64_t c) { block(c, std::integral_constant<int, kWide>{}); },
      [&](int64_t c) { block(c, std::integral_constant<int, 1>{}); });
}

// ------------------------------------------------------------------- conversions

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
