// What the drivers (rows_*.cpp, channels_*.cpp, masked_*.cpp) offer to call.cpp: forward and
// backward of a whole tensor.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(TRUENORM_X86)
#include <xmmintrin.h>
#endif

#include "geometry.h"
#include "kernels.h"

namespace truenorm {

// Reductions are cut into pieces of about this many values, by shape alone and never by thread, so
// that the bits do not depend on the number of threads. A piece and its result fit in L2.
constexpr int64_t kPiece = int64_t{1} << 15;

// What one thread reads twice stays in its core's L2 up to about this many bytes.
constexpr int64_t kInCache = int64_t{2} << 20;

// Results from this size on are written past the caches: they would not stay there, and a line need
// not be read before it is overwritten.
constexpr int64_t kStreamFrom = int64_t{32} << 20;

// Before another thread may read what was written past the caches.
inline void fence(bool stream) {
#if defined(TRUENORM_X86)
  if (stream) _mm_sfence();
#else
  (void)stream;
#endif
}

inline double inverse_std(double var, double eps) { return 1.0 / std::sqrt(var + eps); }

class Valid;  // masked.h

template <class P>
P* past(P* p, int64_t by) {
  return p ? p + by : nullptr;
}

// y = select(mask, act(norm(x) · weight + bias + residual), padding) of a whole tensor.
template <class T>
struct Forward {
  const Geometry& geometry;
  const Kernels<T>& kernels;
  double eps;
  const T* x;
  T* y;                        // null: only the statistics are wanted; may be x
  const compute_t<T>* weight;  // per channel, or null
  const compute_t<T>* bias;
  double* mean;  // per statistic; written, or read where `fixed`
  double* var;
  bool fixed;
  bool stream;  // see kStreamFrom
  const T* residual = nullptr;
  Activation act = {};
  // What counts, where not all does: positions, or, where a row is all that a sample has, rows.
  const Valid* valid = nullptr;
  const bool* rows = nullptr;
  T padding = {};
  bool rounds = false;  // see RowAffine; of one value per channel alone

  bool acts() const { return residual || act.kind != Act::none; }
  bool skips(int64_t statistic) const { return rows && !rows[statistic / geometry.groups()]; }
  ActInputs<T> inputs(int64_t offset) const {
    return ActInputs<T>{nullptr, x, residual}.from(offset);
  }
  double rstd(int64_t statistic) const { return inverse_std(var[statistic], eps); }
  // Part `k` of the samples, which has parameters of its own; of: its geometry.
  Forward part(int64_t k, const Geometry& of, const Valid* counts) const {
    const int64_t sample = k * of.n, value = sample * of.c * of.s;
    const int64_t statistic = of.over_batch() ? 0 : sample * of.groups();
    return {of,
            kernels,
            eps,
            x + value,
            past(y, value),
            past(weight, k * of.c),
            past(bias, k * of.c),
            mean + statistic,
            var + statistic,
            fixed,
            stream,
            past(residual, value),
            act,
            counts,
            past(rows, sample),
            padding,
            rounds};
  }
  void set(int64_t statistic, const Moments& m) const {
    mean[statistic] = geometry.centred ? m.mean : 0.0;
    const double of_mean = geometry.centred ? 0.0 : m.count * m.mean * m.mean;
    var[statistic] = m.count > 0.0 ? (m.m2 + of_mean) / m.count : 0.0;
  }
};

template <class T>
struct Backward {
  const Geometry& geometry;
  const Kernels<T>& kernels;
  double eps;
  const T* grad;
  const T* x;
  T* grad_x;  // or null
  const compute_t<T>* weight;
  const double* mean;
  const double* var;
  bool fixed;
  bool stream;  // see kStreamFrom
  // Per channel, and of each sample if the statistics are a sample's own and either these span
  // several positions or `each_sample`; zero before, or null.
  GradSums* sums = nullptr;
  bool each_sample = false;
  // Means of weight · grad and of weight · grad · x̂ over all that a statistic spans, of which the
  // tensor may be a part; null: over the tensor.
  const double* mean_grad = nullptr;
  const double* mean_grad_x_hat = nullptr;
  // Of y = act(norm(x) + residual) the gradient of the sum is made piece by piece, before it is
  // first read, in `inner`: the residual's gradient, or grad_x, which then is overwritten.
  T* inner = nullptr;  // null where there is neither activation nor residual
  const compute_t<T>* bias = nullptr;
  const T* residual = nullptr;
  Activation act = {};
  const Valid* valid = nullptr;  // as in Forward
  const bool* rows = nullptr;
  bool rounds = false;
  bool of_bias = true;            // whether a bias's gradient is wanted of `sums`
  const double* rstds = nullptr;  // of each statistic, where they are made beforehand

  // as of Forward; of_part: sums of a part
  Backward part(int64_t k, const Geometry& of, const Valid* counts, int64_t of_part) const {
    const int64_t sample = k * of.n, value = sample * of.c * of.s;
    const int64_t statistic = of.over_batch() ? 0 : sample * of.groups();
    return {of,
            kernels,
            eps,
            grad + value,
            x + value,
            past(grad_x, value),
            past(weight, k * of.c),
            mean + statistic,
            var + statistic,
            fixed,
            stream,
            past(sums, k * of_part),
            each_sample,
            past(mean_grad, statistic),
            past(mean_grad_x_hat, statistic),
            past(inner, value),
            past(bias, k * of.c),
            past(residual, value),
            act,
            counts,
            past(rows, sample),
            rounds,
            of_bias};
  }
  const T* norm_grad() const { return inner ? inner : grad; }
  ActInputs<T> inputs(int64_t offset) const { return ActInputs<T>{grad, x, residual}.from(offset); }
  bool skips(int64_t statistic) const { return rows && !rows[statistic / geometry.groups()]; }
  double rstd(int64_t statistic) const {
    return rstds ? rstds[statistic] : inverse_std(var[statistic], eps);
  }
  double weight_of(int64_t channel) const { return weight ? double(weight[channel]) : 1.0; }
  // whether grad_x takes the tensor's own sums
  bool by_sums() const { return grad_x && !fixed && !mean_grad; }
  bool summing() const { return sums || by_sums(); }
  // whether the means are zero, and those of weight · grad are not asked for
  bool about_zero() const { return !geometry.centred && !fixed && !mean_grad; }
  // one value is its own mean: its gradient is zero, not the rounding of what cancels
  bool alone(double count) const {
    return count == 1.0 && geometry.centred && !fixed && !mean_grad;
  }
  // what grad_x takes, by the sums of weight · grad over `count` values of a statistic
  GradSums mean_grads(int64_t statistic, const GradSums& of, double count) const {
    if (fixed) return {};
    const GradSums mean = mean_grad ? GradSums{mean_grad[statistic], mean_grad_x_hat[statistic]}
                                    : GradSums{of.grad / count, of.grad_x_hat / count};
    return {geometry.centred ? mean.grad : 0.0, mean.grad_x_hat};
  }
  GradAffine<compute_t<T>> affine(int64_t statistic, double weight, const GradSums& means) const {
    return {mean[statistic], rstd(statistic), weight, means.grad, means.grad_x_hat};
  }
};

// A channel's runs over a batch that are shorter than a step of the inner loops: those of many
// samples are columns, side by side with other channels', those of few are gathered into rows.
inline bool has_short_runs(const Geometry& g) {
  constexpr int64_t kShort = 32;
  return g.over_batch() && g.s < kShort;
}
inline bool gathers(const Geometry& g) {
  // a gathered run's cost is that of its copy, a column's that of its coefficients
  constexpr int64_t kTiny = 12, kFew = 8, kMore = 24;
  return has_short_runs(g) && g.n < (g.s < kTiny ? kFew : kMore);
}

template <class T>
void forward_rows(const Forward<T>& f);
template <class T>
void backward_rows(const Backward<T>& b);
template <class T>
void forward_channels(const Forward<T>& f);
template <class T>
void backward_channels(const Backward<T>& b);

template <class T>
void masked_forward_rows(const Forward<T>& f);
template <class T>
void masked_backward_rows(const Backward<T>& b);
template <class T>
void masked_forward_channels(const Forward<T>& f);
template <class T>
void masked_backward_channels(const Backward<T>& b);

// A driver, for every element type; what else it takes comes last.
#define TN_EVERY_TYPE(driver, Of, ...)                                        \
  template void driver<double>(const Of<double>& __VA_OPT__(, ) __VA_ARGS__); \
  template void driver<float>(const Of<float>& __VA_OPT__(, ) __VA_ARGS__);   \
  template void driver<bf16>(const Of<bf16>& __VA_OPT__(, ) __VA_ARGS__);     \
  template void driver<f16>(const Of<f16>& __VA_OPT__(, ) __VA_ARGS__);

template <class T>
inline void fill_values(T* to, int64_t count, T fill) {
  static constexpr T zero{};
  if (std::memcmp(&fill, &zero, sizeof(T)) == 0)
    std::memset(to, 0, size_t(count) * sizeof(T));
  else
    std::fill_n(to, count, fill);
}

// `alpha` is the layer's own: the sum over a window is weighted by alpha / size.
template <class T>
void local_response_norm(const Geometry& g, const Kernels<T>& kernels, const T* x, T* y,
                         int64_t size, double alpha, double beta, double k);
template <class T>
void local_response_norm_backward(const Geometry& g, const Kernels<T>& kernels, const T* grad,
                                  const T* x, T* grad_x, int64_t size, double alpha, double beta,
                                  double k);

}  // namespace truenorm
