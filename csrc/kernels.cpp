// The inner loops of kernels.h, for one instruction set.
#include "kernels.h"

#include "simd.h"

#if !defined(TRUENORM_ISA)
#error "compile once per instruction set, with TRUENORM_ISA naming it"
#endif

namespace truenorm {
namespace {

constexpr int kWide = 4;  // blocks of 16 columns that are kept in registers together

// How a run of `len` values is read, N at a time: body(first, keep) for whole blocks with keep 0,
// then for the last few with the block that ends where the run does, whose first `keep` values have
// been read before. A run of fewer than N is the caller's to pad.
template <int N = kLanes, class Body>
TN_INLINE void blocks(int64_t len, const Body& body) {
  int64_t i = 0;
  for (; i + N <= len; i += N) body(i, 0);
  if (i < len) body(len - N, int(i + N - len));
}

// v, with the lanes that were read before as zero.
TN_INLINE vd unread(vd v, int r, int keep) {
  vl lane;
  for (int i = 0; i < D; ++i) lane[i] = r * D + i;
  return (vd)((vl)v & (lane >= keep));
}
TN_INLINE vf unread(vf v, int r, int keep) {
  vi lane;
  for (int i = 0; i < F; ++i) lane[i] = r * F + i;
  return (vf)((vi)v & (lane >= keep));
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

// x̂ of a channel: the mean as two numbers, the larger subtracted first.
template <class T>
struct XHat {
  using V = typename Lane<T>::V;
  V hi, lo, rstd;

  TN_INLINE XHat of(double mean, double rstd) {
    using A = compute_t<T>;
    const A hi = A(mean);
    return {splat<V>(hi), splat<V>(A(mean - double(hi))), splat<V>(A(rstd))};
  }
  TN_INLINE V at(const XHat& s, V x) { return ((x - s.hi) - s.lo) * s.rstd; }
};

constexpr int kStep = 32;  // values that a step adds, side by side
constexpr int kSteps = 8;  // steps after which the sums go on in float64

// to[i] += from[i], vector by vector
TN_INLINE void add_doubles(double* to, vd from) { store_raw(to, load_raw<vd>(to) + from); }
TN_INLINE void flush(double* to, vd from) { add_doubles(to, from); }
TN_INLINE void flush(double* to, vf from) {
  vf_half half[2];
  std::memcpy(half, &from, sizeof(from));
  add_doubles(to, widen_half(half[0]));
  add_doubles(to + D, widen_half(half[1]));
}

// lane i + lane i + 16, then + 8, + 4, + 2, + 1: the same order for every width of a vector
TN_INLINE double total(double (&lanes)[kStep]) {
  for (int width = kStep / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}

// Sums of g and of g · x̂ along runs, g being the gradient times `weight` where there is one.
template <class T>
TN_INLINE GradSums sum_gradients(const T* grad, const T* x, int64_t runs, int64_t len,
                                 int64_t stride, double mean, double rstd,
                                 const compute_t<T>* weight) {
  using A = compute_t<T>;
  using V = typename Lane<T>::V;
  constexpr int L = Lane<T>::lanes, N = kStep / L;
  const XHat<T> x_hat = XHat<T>::of(mean, rstd);
  double sum_g[kStep] = {}, sum_gx[kStep] = {};
  V part_g[N] = {}, part_gx[N] = {};
  int steps = 0;
  const auto flush_all = [&]() TN_FLAT {
    for (int n = 0; n < N; ++n) {
      flush(sum_g + n * L, part_g[n]);
      flush(sum_gx + n * L, part_gx[n]);
      part_g[n] = part_gx[n] = V{};
    }
    steps = 0;
  };
  const auto add = [&](const T* g_from, const T* x_from, const A* w_from, int keep) TN_FLAT {
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) {
      V g = Lane<T>::load(g_from + n * L);
      if (weight) g *= load_raw<V>(w_from + n * L);
      V gx = g * XHat<T>::at(x_hat, Lane<T>::load(x_from + n * L));
      if (keep) g = unread(g, n, keep), gx = unread(gx, n, keep);
      part_g[n] += g;
      part_gx[n] += gx;
    }
    if (++steps == kSteps) flush_all();
  };
  Padded<T, kStep> grad_copy, x_copy;
  Padded<A, kStep> weight_copy;
  for (int64_t run = 0; run < runs; ++run) {
    const T *g = grad + run * stride, *v = x + run * stride;
    if (len < kStep)
      add(Padded<T, kStep>::fill(grad_copy, g, len, T{}),
          Padded<T, kStep>::fill(x_copy, v, len, v[0]),
          weight ? Padded<A, kStep>::fill(weight_copy, weight, len, A{}) : nullptr, 0);
    else
      blocks<kStep>(len, [&](int64_t i, int keep)
                             TN_FLAT { add(g + i, v + i, weight ? weight + i : nullptr, keep); });
  }
  flush_all();
  return {total(sum_g), total(sum_gx)};
}

template <class T>
GradSums grad_sums(const T* grad, const T* x, int64_t runs, int64_t len, int64_t stride,
                   double mean, double rstd) {
  return sum_gradients<T>(grad, x, runs, len, stride, mean, rstd, nullptr);
}

template <class T>
GradSums row_grad_sums(const T* grad, const T* x, int64_t len, double mean, double rstd,
                       const compute_t<T>* weight) {
  return weight ? sum_gradients<T>(grad, x, 1, len, 0, mean, rstd, weight)
                : sum_gradients<T>(grad, x, 1, len, 0, mean, rstd, nullptr);
}

// Sums down B · 16 neighbouring columns; at(row, n) is what makes x̂ of vector n in that row.
template <class T, int B, class At>
TN_INLINE void sum_columns(const T* grad, const T* x, int64_t rows, int64_t ld, const At& at,
                           double* sum_grad, double* sum_grad_x_hat) {
  using V = typename Lane<T>::V;
  constexpr int L = Lane<T>::lanes, N = B * kLanes / L;
  std::memset(sum_grad, 0, B * kLanes * sizeof(double));
  std::memset(sum_grad_x_hat, 0, B * kLanes * sizeof(double));
  for (int64_t first = 0; first < rows; first += kSteps) {
    const int64_t last = first + kSteps < rows ? first + kSteps : rows;
    V part_g[N] = {}, part_gx[N] = {};
    for (int64_t row = first; row < last; ++row) {
      const auto& x_hat = at(row);
#pragma GCC unroll 64
      for (int n = 0; n < N; ++n) {
        const V g = Lane<T>::load(grad + row * ld + n * L);
        part_g[n] += g;
        part_gx[n] += g * XHat<T>::at(x_hat[n], Lane<T>::load(x + row * ld + n * L));
      }
    }
    for (int n = 0; n < N; ++n) {
      flush(sum_grad + n * L, part_g[n]);
      flush(sum_grad_x_hat + n * L, part_gx[n]);
    }
  }
}

// One x̂ for every vector of a row.
template <class T>
struct SameXHat {
  XHat<T> x_hat;
  const XHat<T>& operator[](int) const { return x_hat; }
};

template <class T, int B>
TN_INLINE void column_grad_block(const T* grad, const T* x, int64_t rows, int64_t ld,
                                 const double* mean, const double* rstd, double* sum_grad,
                                 double* sum_grad_x_hat) {
  using A = compute_t<T>;
  using V = typename Lane<T>::V;
  constexpr int L = Lane<T>::lanes, N = B * kLanes / L;
  XHat<T> x_hat[N];
  for (int n = 0; n < N; ++n) {
    A hi[L], lo[L], r[L];
    for (int i = 0; i < L; ++i) {
      hi[i] = A(mean[n * L + i]);
      lo[i] = A(mean[n * L + i] - double(hi[i]));
      r[i] = A(rstd[n * L + i]);
    }
    x_hat[n] = {load_raw<V>(hi), load_raw<V>(lo), load_raw<V>(r)};
  }
  sum_columns<T, B>(
      grad, x, rows, ld, [&](int64_t) TN_FLAT -> const XHat<T>(&)[N] { return x_hat; }, sum_grad,
      sum_grad_x_hat);
}

template <class T>
void column_grad_sums(const T* grad, const T* x, int64_t rows, int64_t cols, int64_t ld,
                      const double* mean, const double* rstd, double* sum_grad,
                      double* sum_grad_x_hat) {
  if (cols < kLanes) {
    for (int64_t c = 0; c < cols; ++c) {
      const GradSums s = grad_sums(grad + c, x + c, rows, 1, ld, mean[c], rstd[c]);
      sum_grad[c] = s.grad;
      sum_grad_x_hat[c] = s.grad_x_hat;
    }
    return;
  }
  const auto block = [&]<int B>(int64_t c, std::integral_constant<int, B>) TN_FLAT {
    column_grad_block<T, B>(grad + c, x + c, rows, ld, mean + c, rstd + c, sum_grad + c,
                            sum_grad_x_hat + c);
  };
  column_blocks(
      cols, [&](int64_t c) { block(c, std::integral_constant<int, kWide>{}); },
      [&](int64_t c) { block(c, std::integral_constant<int, 1>{}); });
}

template <class T>
void row_param_sums(const T* grad, const T* x, int64_t rows, int64_t cols, int64_t ld,
                    const double* mean, const double* rstd, double* sum_grad,
                    double* sum_grad_x_hat) {
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
  const auto block = [&]<int B>(int64_t c, std::integral_constant<int, B>) TN_FLAT {
    sum_columns<T, B>(
        grad + c, x + c, rows, ld,
        [&](int64_t row) TN_FLAT { return SameXHat<T>{XHat<T>::of(mean[row], rstd[row])}; },
        sum_grad + c, sum_grad_x_hat + c);
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
