// The operators with an activation and a residual, y = act(norm(x) + residual): tensors in, tensors
// out. The schemas stand in src/truenorm/_ops/activation.py.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "tensors.h"

namespace truenorm {
namespace {

// NEEDS_RESIDUAL and BY_OUTPUT of _ops/activation.py
constexpr int64_t kResidual = 8, kByOutput = 16;

using Maybe = std::optional<Tensor>;

Epilogue epilogue(const Tensor& x, const Geometry& g, const Maybe& residual, int64_t act,
                  double parameter) {
  check::activation(act);
  check::residual(residual, x, g);
  return {residual, {Act(act), parameter}};
}

void expect_parameters(const Tensor& x, const Geometry& g, const Maybe& weight, const Maybe& bias,
                       int64_t feature_dims) {
  check::parameter("weight", weight, x, g, feature_dims);
  check::parameter("bias", bias, x, g, feature_dims);
}

// Memory for y where it is written over x: x itself, if that is laid out for the kernels.
Tensor over_input(const Tensor& x, const Geometry& g) {
  return g.dense ? x : new_result(g, x.scalar_type());
}

void finish(const Tensor& x, const Tensor& y, const Geometry& g) {
  if (g.dense) return;
  Tensor to = x;
  torch::stable::copy_(to, y);
}

std::tuple<Tensor, Tensor> forward_to(const Tensor& x, const Tensor& y, const Geometry& g,
                                      const Maybe& weight, const Maybe& bias, double eps,
                                      const Epilogue& after) {
  const Tensor mean = empty(g.num_statistics(), ScalarType::Double);
  const Tensor var = empty(g.num_statistics(), ScalarType::Double);
  forward_into(x, weight, bias, g, eps, y, doubles(mean), doubles(var), false, after);
  return {mean, var};
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& x, Maybe weight, Maybe bias,
                                           Maybe residual, int64_t num_groups, int64_t feature_dims,
                                           bool centred, double eps, int64_t act,
                                           double parameter) {
  const Geometry g = geometry_of(x, {num_groups, feature_dims, centred});
  check::has_values("forward", x, g);
  expect_parameters(x, g, weight, bias, feature_dims);
  const Epilogue after = epilogue(x, g, residual, act, parameter);
  const Tensor y = new_result(g, x.scalar_type());
  const auto [mean, var] = forward_to(x, y, g, weight, bias, eps, after);
  return {y, mean, var};
}

std::tuple<Tensor, Tensor> forward_over(const Tensor& x, Maybe weight, Maybe bias, Maybe residual,
                                        int64_t num_groups, int64_t feature_dims, bool centred,
                                        double eps, int64_t act, double parameter) {
  const Geometry g = geometry_of(x, {num_groups, feature_dims, centred});
  check::has_values("forward", x, g);
  check::written("x", x);
  expect_parameters(x, g, weight, bias, feature_dims);
  const Epilogue after = epilogue(x, g, residual, act, parameter);
  const Tensor y = over_input(x, g);
  const auto statistics = forward_to(x, y, g, weight, bias, eps, after);
  finish(x, y, g);
  return statistics;
}

void apply_to(const Tensor& x, const Tensor& y, const Geometry& g, const Tensor& mean,
              const Tensor& var, const Maybe& weight, const Maybe& bias, double eps,
              const Epilogue& after) {
  if (g.numel() == 0) return;
  const Values<double> m(mean), v(var);
  forward_into(x, weight, bias, g, eps, y, const_cast<double*>(m.get()),
               const_cast<double*>(v.get()), true, after);
}

Tensor apply(const Tensor& x, const Tensor& mean, const Tensor& var, Maybe weight, Maybe bias,
             Maybe residual, double eps, int64_t act, double parameter) {
  const Geometry g = geometry_of(x, {0, 0, true});
  check::statistic("mean", mean, x, g);
  check::statistic("var", var, x, g);
  expect_parameters(x, g, weight, bias, 0);
  const Epilogue after = epilogue(x, g, residual, act, parameter);
  const Tensor y = new_result(g, x.scalar_type());
  apply_to(x, y, g, mean, var, weight, bias, eps, after);
  return y;
}

void apply_over(const Tensor& x, const Tensor& mean, const Tensor& var, Maybe weight, Maybe bias,
                Maybe residual, double eps, int64_t act, double parameter) {
  const Geometry g = geometry_of(x, {0, 0, true});
  check::written("x", x);
  check::statistic("mean", mean, x, g);
  check::statistic("var", var, x, g);
  expect_parameters(x, g, weight, bias, 0);
  const Epilogue after = epilogue(x, g, residual, act, parameter);
  const Tensor y = over_input(x, g);
  apply_to(x, y, g, mean, var, weight, bias, eps, after);
  finish(x, y, g);
}

// The gradient of norm(x) + residual goes to the residual's gradient, else to where grad_x will be,
// unless that is not written, or written before the last pass over it.
Tensor inner_of(const Tensor& x, const Geometry& g, const Maybe& grad_residual, const Maybe& grad_x,
                bool alone) {
  if (grad_residual) return *grad_residual;
  const bool by_row = g.memory == Memory::rows && !g.over_batch() && g.s == 1;
  if (grad_x && !alone && !by_row) return *grad_x;
  return new_result(g, x.scalar_type());
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& grad, const Tensor& x,
                                                    const Tensor& mean, const Tensor& var,
                                                    Maybe weight, Maybe bias, Maybe residual,
                                                    int64_t num_groups, int64_t feature_dims,
                                                    bool centred, double eps, bool fixed,
                                                    int64_t act, double parameter, int64_t needs) {
  const Geometry g = geometry_of(x, {num_groups, feature_dims, centred});
  check::gradient(grad, x, g);
  check::statistic("mean", mean, x, g);
  check::statistic("var", var, x, g);
  expect_parameters(x, g, weight, bias, feature_dims);
  check::needs(needs, kInput | kWeight | kBias | kResidual | kByOutput);
  Epilogue after = epilogue(x, g, residual, act, parameter);
  check::holds_output(needs & kByOutput, residual);
  after.act.by_output = needs & kByOutput;
  const Params params(x, weight, g, feature_dims);
  Maybe of_x, of_weight, of_bias, of_residual;
  if (needs & kInput) of_x = new_result(g, x.scalar_type());
  if (needs & kWeight) of_weight = params.gradient();
  if (needs & kBias) of_bias = params.gradient();
  if (needs & kResidual) of_residual = new_result(g, x.scalar_type());
  const auto made = [&] {
    return std::tuple{of_x ? *of_x : empty(0, x.scalar_type()),
                      of_weight ? *of_weight : empty(0, params.type),
                      of_bias ? *of_bias : empty(0, params.type),
                      of_residual ? *of_residual : empty(0, x.scalar_type())};
  };
  if (g.numel() == 0) {
    if (of_weight) torch::stable::zero_(*of_weight);
    if (of_bias) torch::stable::zero_(*of_bias);
    return made();
  }
  // one value is its own mean: its gradient is zero, not the rounding of what cancels
  const bool alone = g.values_per_statistic() == 1 && g.centred && !fixed;
  if (of_x && alone) torch::stable::zero_(*of_x);
  const Tensor inner = inner_of(x, g, of_residual, of_x, alone);
  const Tensor dense_x = laid_out(x, g), dense_grad = laid_out_like(x, grad, g);
  Maybe dense_residual;
  if (residual) dense_residual = laid_out(*residual, g);
  const Values<double> m(mean), v(var);
  Room<double> room;
  double* const sums = room.of(2 * g.c);
  with_type(x, [&]<class T>(T) {
    const Values<compute_t<T>> w(weight), b(bias);
    const auto values = [](const Tensor& t) { return static_cast<const T*>(t.const_data_ptr()); };
    run(Backward<T>{g, table<T>(kernels()), eps, values(dense_grad), values(dense_x),
                    of_x && !alone ? static_cast<T*>(of_x->mutable_data_ptr()) : nullptr, w.get(),
                    m.get(), v.get(), of_weight ? sums : nullptr, of_bias ? sums + g.c : nullptr,
                    fixed, streams<T>(g), static_cast<T*>(inner.mutable_data_ptr()), b.get(),
                    dense_residual ? values(*dense_residual) : nullptr, after.act});
  });
  if (of_weight) store(sums, *of_weight);
  if (of_bias) store(sums + g.c, *of_bias);
  return made();
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
