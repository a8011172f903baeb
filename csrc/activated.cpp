// The operators with an activation and a residual, y = act(norm(x) + residual): tensors in, tensors
// out. The schemas stand in src/truenorm/_ops/activation.py.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "call.h"

namespace truenorm {
namespace {

std::tuple<Tensor, Tensor, Tensor> forward_to(const Tensor& x, const Maybe& weight,
                                              const Maybe& bias, const Maybe& residual, Axes axes,
                                              double eps, Activation act, bool over) {
  Call call{.x = x,
            .axes = axes,
            .eps = eps,
            .weight = given(weight),
            .bias = given(bias),
            .residual = given(residual),
            .act = act};
  call.read("forward", over);
  const Tensor y = result_of(call, over);
  const Tensor mean = empty(call.g.num_statistics(), ScalarType::Double);
  const Tensor var = empty(call.g.num_statistics(), ScalarType::Double);
  forward_into(call, &y, doubles(mean), doubles(var), false);
  close(call, y, over);
  return {y, mean, var};
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& x, Maybe weight, Maybe bias,
                                           Maybe residual, int64_t num_groups, int64_t feature_dims,
                                           bool centred, double eps, int64_t act,
                                           double parameter) {
  return forward_to(x, weight, bias, residual, {num_groups, feature_dims, centred}, eps,
                    {Act(act), parameter}, false);
}

std::tuple<Tensor, Tensor> forward_over(const Tensor& x, Maybe weight, Maybe bias, Maybe residual,
                                        int64_t num_groups, int64_t feature_dims, bool centred,
                                        double eps, int64_t act, double parameter) {
  const auto [y, mean, var] =
      forward_to(x, weight, bias, residual, {num_groups, feature_dims, centred}, eps,
                 {Act(act), parameter}, true);
  return {mean, var};
}

Tensor apply_to(const Tensor& x, const Tensor& mean, const Tensor& var, const Maybe& weight,
                const Maybe& bias, const Maybe& residual, double eps, Activation act, bool over) {
  Call call{.x = x,
            .axes = {0, 0, true},
            .eps = eps,
            .weight = given(weight),
            .bias = given(bias),
            .residual = given(residual),
            .mean = &mean,
            .var = &var,
            .act = act};
  call.read(nullptr, over);
  const Tensor y = result_of(call, over);
  apply_into(call, y);
  close(call, y, over);
  return y;
}

Tensor apply(const Tensor& x, const Tensor& mean, const Tensor& var, Maybe weight, Maybe bias,
             Maybe residual, double eps, int64_t act, double parameter) {
  return apply_to(x, mean, var, weight, bias, residual, eps, {Act(act), parameter}, false);
}

void apply_over(const Tensor& x, const Tensor& mean, const Tensor& var, Maybe weight, Maybe bias,
                Maybe residual, double eps, int64_t act, double parameter) {
  apply_to(x, mean, var, weight, bias, residual, eps, {Act(act), parameter}, true);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& grad, const Tensor& x,
                                                    const Tensor& mean, const Tensor& var,
                                                    Maybe weight, Maybe bias, Maybe residual,
                                                    int64_t num_groups, int64_t feature_dims,
                                                    bool centred, double eps, bool fixed,
                                                    int64_t act, double parameter, int64_t needs) {
  Call call{.x = x,
            .axes = {num_groups, feature_dims, centred},
            .eps = eps,
            .weight = given(weight),
            .bias = given(bias),
            .residual = given(residual),
            .mean = &mean,
            .var = &var,
            .act = {Act(act), parameter},
            .grad = &grad,
            .needs = needs,
            .constant = fixed};
  call.read();
  return gradients_of(call);
}

}  // namespace
}  // namespace truenorm

STABLE_TORCH_LIBRARY_IMPL(truenorm, CPU, m) {
  m.impl("forward_act", TORCH_BOX(&truenorm::forward));
  m.impl("forward_act_", TORCH_BOX(&truenorm::forward_over));
  m.impl("apply_act", TORCH_BOX(&truenorm::apply));
  m.impl("apply_act_", TORCH_BOX(&truenorm::apply_over));
  m.impl("backward_act", TORCH_BOX(&truenorm::backward));
}
