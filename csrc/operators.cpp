// The operators of one layer call: tensors in, tensors out. The schemas stand in
// src/truenorm/_core/operators.py.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "call.h"

namespace truenorm {
namespace {

// Mean, biased variance and count of every statistic.
Tensor new_record(int64_t statistics) {
  const int64_t shape[] = {3, statistics};
  const Dims sizes(shape, shape + 2);
  return empty_strided(sizes, contiguous_strides(sizes), ScalarType::Double);
}

// y, where there is one, and the record, where `form` keeps it.
Tensor forward_to(const Call& call, Form form, const Tensor* y) {
  const int64_t statistics = call.g.num_statistics();
  const Tensor record = form.keeps() ? new_record(statistics) : empty(0, ScalarType::Double);
  Room<double> unkept;
  double* const mean = form.keeps() ? doubles(record) : unkept.of(2 * statistics);
  double* const var = mean + statistics;
  if (call.mean) {
    const Values<double> given_mean(call.mean), given_var(call.var);
    std::copy_n(given_mean.get(), statistics, mean);
    std::copy_n(given_var.get(), statistics, var);
  }
  if (form.keeps()) count_into(call, var + statistics);
  if (call.g.numel() > 0)
    forward_into(call, y, mean, var, call.mean != nullptr);
  else if (!call.mean)
    std::fill_n(mean, 2 * statistics, 0.0);
  return record;
}

std::tuple<Tensor, Tensor> normalize(const Tensor& x, const Maybe& weight, const Maybe& bias,
                                     const Maybe& mask, const Maybe& residual, const Maybe& mean,
                                     const Maybe& var, Form form, double eps, double parameter,
                                     double padding, bool over) {
  Call call{.x = x,
            .axes = form.axes(x),
            .eps = eps,
            .weight = given(weight),
            .bias = given(bias),
            .mask = given(mask),
            .residual = given(residual),
            .mean = given(mean),
            .var = given(var),
            .act = form.activation(parameter),
            .padding = padding,
            .rounds = form.steps(),
            .one_plus = form.one_plus()};
  call.read(!mean, over);
  const Tensor y = result_of(call, over);
  const Tensor record = forward_to(call, form, &y);
  close(call, y, over);
  return {y, record};
}

std::tuple<Tensor, Tensor> norm(const Tensor& x, Maybe weight, Maybe bias, Maybe mask,
                                Maybe residual, Maybe mean, Maybe var, int64_t form, double eps,
                                double parameter, double padding) {
  return normalize(x, weight, bias, mask, residual, mean, var, {form}, eps, parameter, padding,
                   false);
}

Tensor norm_over(const Tensor& x, Maybe weight, Maybe bias, Maybe mask, Maybe residual, Maybe mean,
                 Maybe var, int64_t form, double eps, double parameter, double padding) {
  return std::get<1>(
      normalize(x, weight, bias, mask, residual, mean, var, {form}, eps, parameter, padding, true));
}

Tensor statistics(const Tensor& x, Maybe mask, int64_t bits) {
  const Form form{bits | 256};
  Call call{.x = x, .axes = form.axes(x), .mask = given(mask)};
  call.read();
  return forward_to(call, form, nullptr);
}

Call backward_call(const Tensor& grad, const Tensor& x, const Tensor& record, const Maybe& weight,
                   const Maybe& bias, const Maybe& mask, const Maybe& residual, const Tensor* sums,
                   Form form, double eps, double parameter) {
  Call call{.x = x,
            .axes = form.axes(x),
            .eps = eps,
            .weight = given(weight),
            .bias = given(bias),
            .mask = given(mask),
            .residual = given(residual),
            .act = form.activation(parameter),
            .grad = &grad,
            .sums = sums,
            .needs = form.needs(),
            .constant = form.constant(),
            .rounds = form.steps(),
            .one_plus = form.one_plus()};
  call.read();
  check::record(record, call.g.num_statistics());
  return call;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> norm_backward(const Tensor& grad, const Tensor& x,
                                                         const Tensor& record, Maybe weight,
                                                         Maybe bias, Maybe mask, Maybe residual,
                                                         Maybe sums, int64_t form, double eps,
                                                         double parameter) {
  const Call call = backward_call(grad, x, record, weight, bias, mask, residual, given(sums),
                                  {form}, eps, parameter);
  const Gradients made(call);
  const double* const mean = doubles(record);
  backward_into(call, mean, mean + call.g.num_statistics(), made);
  return made.all();
}

Tensor sums_of(const Tensor& grad, const Tensor& x, const Tensor& record, Maybe weight, Maybe bias,
               Maybe mask, Maybe residual, int64_t bits, double eps, double parameter) {
  const Form form{bits};
  const Call call =
      backward_call(grad, x, record, weight, bias, mask, residual, nullptr, form, eps, parameter);
  if (form.feature_dims() > 0)
    check::wrong_form(bits, "has `feature_dims`, whose statistics lie in one process: pass 0");
  if (call.by_part) check::wrong_parameter("weight", *call.weight, x, 0, false);
  const double* const mean = doubles(record);
  return gradient_sums(call, mean, mean + call.g.num_statistics());
}

}  // namespace
}  // namespace truenorm

STABLE_TORCH_LIBRARY_IMPL(truenorm, CPU, m) {
  m.impl("norm", TORCH_BOX(&truenorm::norm));
  m.impl("norm_", TORCH_BOX(&truenorm::norm_over));
  m.impl("norm_backward", TORCH_BOX(&truenorm::norm_backward));
  m.impl("norm_below", TORCH_BOX(&truenorm::norm));
  m.impl("norm_backward_below", TORCH_BOX(&truenorm::norm_backward));
  m.impl("statistics", TORCH_BOX(&truenorm::statistics));
  m.impl("gradient_sums", TORCH_BOX(&truenorm::sums_of));
}
