// Normalization over valid positions alone: the operators.
#include "masked.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "tensors.h"

namespace truenorm {

const MaskedSet& masked_set() { return *kernels().masked; }

namespace {

// In memory [N, S, C] batch statistics see the samples as one.
Valid valid_of(const Tensor& mask, const Geometry& g) {
  const bool channels = g.memory == Memory::channels, one = channels && g.over_batch();
  return Valid(static_cast<const bool*>(mask.const_data_ptr()), one ? 1 : g.n,
               one ? g.n * g.s : g.s, channels);
}

template <class T>
T element(double value) {
  T narrow;
  table<T>(kernels()).narrow(&value, &narrow, 1);
  return narrow;
}

// y and three statistics of x, as forward_into() of tensors.h.
void masked_forward_into(const Tensor& x, const Valid& valid, const std::optional<Tensor>& weight,
                         const std::optional<Tensor>& bias, const Geometry& g, double eps,
                         double padding_value, const Tensor& y, double* mean, double* var,
                         double* count) {
  if (needs_double(x, weight, bias)) {
    Tensor wide = empty_strided(g.sizes, g.strides, ScalarType::Double), rounded = y;
    const Tensor result = empty_strided(g.sizes, g.strides, ScalarType::Double);
    torch::stable::copy_(wide, x);
    masked_forward_into(wide, valid, weight, bias, g, eps, padding_value, result, mean, var, count);
    torch::stable::copy_(rounded, result);
    return;
  }
  const Tensor dense = laid_out(x, g);
  with_type(x, [&]<class T>(T) {
    const Values<compute_t<T>> w(weight), b(bias);
    const MaskedForward<T> f{g,
                             valid,
                             table<T>(kernels()),
                             masked_table<T>(),
                             eps,
                             static_cast<const T*>(dense.const_data_ptr()),
                             static_cast<T*>(y.mutable_data_ptr()),
                             w.get(),
                             b.get(),
                             mean,
                             var,
                             count,
                             element<T>(padding_value)};
    g.memory == Memory::rows ? masked_forward_rows(f) : masked_forward_channels(f);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const Tensor& x, const Tensor& mask,
                                                   std::optional<Tensor> weight,
                                                   std::optional<Tensor> bias, int64_t num_groups,
                                                   double eps, double padding_value) {
  const Geometry g = geometry_of(x, {num_groups, 0, true});
  check::has_values("masked_forward", x, g);
  check::mask(mask, x, g);
  check::parameter("weight", weight, x, g, 0);
  check::parameter("bias", bias, x, g, 0);
  const Tensor y = new_result(g, x.scalar_type());
  const int64_t statistics = g.num_statistics();
  const Tensor mean = empty(statistics, ScalarType::Double),
               var = empty(statistics, ScalarType::Double),
               count = empty(statistics, ScalarType::Double);
  masked_forward_into(x, valid_of(mask, g), weight, bias, g, eps, padding_value, y, doubles(mean),
                      doubles(var), doubles(count));
  return {y, mean, var, count};
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad, const Tensor& x, const Tensor& mask,
                                            const Tensor& mean, const Tensor& var,
                                            std::optional<Tensor> weight, int64_t num_groups,
                                            double eps, int64_t needs) {
  const Geometry g = geometry_of(x, {num_groups, 0, true});
  check::has_values("masked_backward", x, g);
  check::gradient(grad, x, g);
  check::mask(mask, x, g);
  check::statistic("mean", mean, x, g);
  check::statistic("var", var, x, g);
  check::parameter("weight", weight, x, g, 0);
  check::needs(needs, kInput | kWeight | kBias);
  const Valid valid = valid_of(mask, g);
  const Tensor dense_x = laid_out(x, g), dense_grad = laid_out_like(x, grad, g);
  const Params params(x, weight, g, 0);
  const Tensor grad_x = needs & kInput ? new_result(g, x.scalar_type()) : empty(0, x.scalar_type());
  const Tensor of_weight = needs & kWeight ? params.gradient() : empty(0, params.type);
  const Tensor of_bias = needs & kBias ? params.gradient() : empty(0, params.type);
  const Values<double> m(mean), v(var);
  const auto weights = scratch<double>(g.c), biases = scratch<double>(g.c);
  with_type(x, [&]<class T>(T) {
    const Values<compute_t<T>> w(weight);
    const MaskedBackward<T> b{g,
                              valid,
                              table<T>(kernels()),
                              masked_table<T>(),
                              eps,
                              static_cast<const T*>(dense_grad.const_data_ptr()),
                              static_cast<const T*>(dense_x.const_data_ptr()),
                              needs & kInput ? static_cast<T*>(grad_x.mutable_data_ptr()) : nullptr,
                              w.get(),
                              m.get(),
                              v.get(),
                              weights.get(),
                              biases.get()};
    g.memory == Memory::rows ? masked_backward_rows(b) : masked_backward_channels(b);
  });
  const auto store = [&](const Tensor& to, const double* sums) {
    with_type(to, [&]<class T>(T) {
      table<T>(kernels()).narrow(sums, static_cast<T*>(to.mutable_data_ptr()), g.c);
    });
  };
  if (needs & kWeight) store(of_weight, weights.get());
  if (needs & kBias) store(of_bias, biases.get());
  return {grad_x, of_weight, of_bias};
}

}  // namespace
}  // namespace truenorm

STABLE_TORCH_LIBRARY_IMPL(truenorm, CPU, m) {
  m.impl("masked_forward", TORCH_BOX(&truenorm::forward));
  m.impl("masked_backward", TORCH_BOX(&truenorm::backward));
}
