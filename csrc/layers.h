// What rows_*.cpp and channels_*.cpp offer to library.cpp: forward and backward of a whole tensor.
#pragma once

#include <cmath>
#include <cstdint>

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

template <class T>
struct Forward {
  const Geometry& geometry;
  const Kernels<T>& kernels;
  double eps;
  const T* x;
  T* y;                        // null: only the statistics are wanted, of a batch
  const compute_t<T>* weight;  // per channel, or null
  const compute_t<T>* bias;
  double* mean;  // per statistic; written, or read where `fixed`
  double* var;
  bool fixed;
  bool stream;                  // see kStreamFrom
  const T* residual = nullptr;  // y = act(norm(x) + residual)
  Activation act = {};

  bool acts() const { return residual || act.kind != Act::none; }
  ActInputs<T> inputs(int64_t offset) const {
    return ActInputs<T>{nullptr, x, residual}.from(offset);
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
  double* grad_weight;  // per channel, or null
  double* grad_bias;
  bool fixed;
  bool stream;  // see kStreamFrom
  // Of y = act(norm(x) + residual) the gradient of the sum is made piece by piece, before it is
  // first read, in `inner`: the residual's gradient, or grad_x, which then is overwritten.
  T* inner = nullptr;  // null where there is neither activation nor residual
  const compute_t<T>* bias = nullptr;
  const T* residual = nullptr;
  Activation act = {};

  const T* norm_grad() const { return inner ? inner : grad; }
  ActInputs<T> inputs(int64_t offset) const { return ActInputs<T>{grad, x, residual}.from(offset); }
};

template <class T>
void forward_rows(const Forward<T>& f);
template <class T>
void backward_rows(const Backward<T>& b);
template <class T>
void forward_channels(const Forward<T>& f);
template <class T>
void backward_channels(const Backward<T>& b);

// Means of weight · grad and of weight · grad · x̂ over all that a channel's statistics span, of
// which the tensor may be a part.
struct MeanGrads {
  const double* grad;
  const double* grad_x_hat;
};
// grad_x of batch statistics
template <class T>
void backward_given(const Backward<T>& b, const MeanGrads& means);

// `alpha` is the layer's own: the sum over a window is weighted by alpha / size.
template <class T>
void local_response_norm(const Geometry& g, const Kernels<T>& kernels, const T* x, T* y,
                         int64_t size, double alpha, double beta, double k);
template <class T>
void local_response_norm_backward(const Geometry& g, const Kernels<T>& kernels, const T* grad,
                                  const T* x, T* grad_x, int64_t size, double alpha, double beta,
                                  double k);

}  // namespace truenorm
