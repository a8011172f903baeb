// Normalization over valid positions alone: the operators.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "call.h"

namespace truenorm {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const Tensor& x, const Tensor& mask,
                                                   Maybe weight, Maybe bias, int64_t num_groups,
                                                   double eps, double padding_value) {
  Call call{.x = x,
            .axes = {num_groups, 0, true},
            .eps = eps,
            .weight = given(weight),
            .bias = given(bias),
            .mask = &mask,
            .padding = padding_value};
  call.read("masked_forward");
  const Tensor y = result_of(call, false);
  const int64_t statistics = call.g.num_statistics();
  const Tensor mean = empty(statistics, ScalarType::Double),
               var = empty(statistics, ScalarType::Double),
               count = empty(statistics, ScalarType::Double);
  forward_into(call, &y, doubles(mean), doubles(var), false);
  count_into(call, doubles(count));
  return {y, mean, var, count};
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad, const Tensor& x, const Tensor& mask,
                                            const Tensor& mean, const Tensor& var, Maybe weight,
                                            int64_t num_groups, double eps, int64_t needs) {
  Call call{.x = x,
            .axes = {num_groups, 0, true},
            .eps = eps,
            .weight = given(weight),
            .mask = &mask,
            .mean = &mean,
            .var = &var,
            .grad = &grad,
            .needs = needs};
  call.read("masked_backward", false, kInput | kWeight | kBias);
  const auto [of_x, of_weight, of_bias, none] = gradients_of(call);
  return {of_x, of_weight, of_bias};
}

}  // namespace
}  // namespace truenorm

STABLE_TORCH_LIBRARY_IMPL(truenorm, CPU, m) {
  m.impl("masked_forward", TORCH_BOX(&truenorm::forward));
  m.impl("masked_backward", TORCH_BOX(&truenorm::backward));
}
