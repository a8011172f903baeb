// Gradients of the input for mean gradients that are given: those of a batch that is spread over
// several processes, where this tensor is only a part of what its statistics span.
#include "channels.h"
#include "rows.h"

namespace truenorm {
namespace {

template <class T>
GradAffine<compute_t<T>> affine_of(const Backward<T>& b, const MeanGrads& means, int64_t c) {
  return {b.mean[c], inverse_std(b.var[c], b.eps), b.weight ? double(b.weight[c]) : 1.0,
          means.grad[c], means.grad_x_hat[c]};
}

template <class T>
void given_rows(const Backward<T>& b, const MeanGrads& means) {
  const Geometry& g = b.geometry;
  const auto affine = scratch<GradAffine<compute_t<T>>>(g.c);
  for (int64_t c = 0; c < g.c; ++c) affine[c] = affine_of(b, means, c);
  over_runs(g, [&](int64_t channel, int64_t offset, int64_t runs, int64_t len) {
    b.kernels.grad_apply(b.grad + offset, b.x + offset, b.grad_x + offset, runs, len,
                         affine.get() + channel, b.stream);
    fence(b.stream);
  });
}

template <class T>
void given_channels(const Backward<T>& b, const MeanGrads& means) {
  using A = compute_t<T>;
  const Cut cut(b.geometry);
  const Arrays<A> of(5, cut.cols);
  for (int64_t c = 0; c < cut.channels; ++c) {
    const GradAffine<A> a = affine_of(b, means, c);
    for (int64_t to = c; to < cut.cols; to += cut.channels) {
      of[0][to] = a.scale;
      of[1][to] = a.hi;
      of[2][to] = a.rstd;
      of[3][to] = a.slope;
      of[4][to] = a.shift;
    }
  }
  const GradAffines<A> all = {of[0], of[1], of[2], of[3], of[4]};
  over_rows(cut, b.stream, [&](int64_t, int64_t offset, int64_t rows, int64_t len) {
    b.kernels.grad_apply_each(b.grad + offset, b.x + offset, b.grad_x + offset, rows, len, all,
                              b.stream);
  });
}

}  // namespace

template <class T>
void backward_given(const Backward<T>& b, const MeanGrads& means) {
  if (b.geometry.memory == Memory::rows)
    given_rows(b, means);
  else
    given_channels(b, means);
}

template void backward_given<double>(const Backward<double>&, const MeanGrads&);
template void backward_given<float>(const Backward<float>&, const MeanGrads&);
template void backward_given<bf16>(const Backward<bf16>&, const MeanGrads&);
template void backward_given<f16>(const Backward<f16>&, const MeanGrads&);

}  // namespace truenorm
