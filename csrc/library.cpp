// The operators' CPU kernels: tensors in, tensors out. The schemas stand in
// src/truenorm/_ops/operators.py.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "call.h"
#include "pool.h"
#include "running.h"

namespace truenorm {
namespace {

size_t element_size(ScalarType type) {
  switch (type) {
    case ScalarType::Double:
      return 8;
    case ScalarType::Float:
      return 4;
    case ScalarType::BFloat16:
    case ScalarType::Half:
      return 2;
    default:
      return 0;  // there is no kernel, and with_type says so
  }
}

// A tensor over a recycled buffer, which goes back to the pool when the tensor's storage dies.
Tensor over(const Buffer& buffer, const Geometry& g, ScalarType type) {
  AtenTensorHandle handle = nullptr;
  const AOTITorchError error = torch_from_blob(
      buffer.data, g.sizes.size(), g.sizes.begin(), g.strides.begin(), 0,
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)),
      aoti_torch_device_type_cpu(), -1, &handle, aoti_torch_layout_strided(), nullptr, 0,
      [](void* data, void* capacity) { give_back({data, size_t(capacity)}); },
      reinterpret_cast<void*>(buffer.capacity));
  if (handle == nullptr) give_back(buffer);
  STABLE_TORCH_ERROR_CODE_CHECK(error);
  return Tensor(handle);
}

std::tuple<Tensor, Tensor> forward_to(const Call& call, const Tensor* y) {
  const int64_t statistics = call.g.num_statistics();
  const Tensor mean = empty(statistics, ScalarType::Double),
               var = empty(statistics, ScalarType::Double);
  forward_into(call, y, doubles(mean), doubles(var), false);
  return {mean, var};
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& x, Maybe weight, Maybe bias,
                                           int64_t num_groups, int64_t feature_dims, bool centred,
                                           double eps) {
  Call call{.x = x,
            .axes = {num_groups, feature_dims, centred},
            .eps = eps,
            .weight = given(weight),
            .bias = given(bias)};
  call.read("forward");
  const Tensor y = result_of(call, false);
  const auto [mean, var] = forward_to(call, &y);
  return {y, mean, var};
}

Tensor apply(const Tensor& x, const Tensor& mean, const Tensor& var, Maybe weight, Maybe bias,
             double eps) {
  Call call{.x = x,
            .axes = {0, 0, true},
            .eps = eps,
            .weight = given(weight),
            .bias = given(bias),
            .mean = &mean,
            .var = &var};
  call.read();
  const Tensor y = result_of(call, false);
  apply_into(call, y);
  return y;
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad, const Tensor& x, const Tensor& mean,
                                            const Tensor& var, Maybe weight, int64_t num_groups,
                                            int64_t feature_dims, bool centred, double eps,
                                            bool fixed, int64_t needs) {
  Call call{.x = x,
            .axes = {num_groups, feature_dims, centred},
            .eps = eps,
            .weight = given(weight),
            .mean = &mean,
            .var = &var,
            .grad = &grad,
            .needs = needs,
            .constant = fixed};
  call.read(nullptr, false, kInput | kWeight | kBias);
  const auto [of_x, of_weight, of_bias, none] = gradients_of(call);
  return {of_x, of_weight, of_bias};
}

// Mean and biased variance per channel of (N, C, *), and no output.
std::tuple<Tensor, Tensor> moments(const Tensor& x) {
  Call call{.x = x, .axes = {0, 0, true}};
  call.read("moments");
  return forward_to(call, nullptr);
}

// grad_x of batch statistics for mean gradients that are given.
Tensor backward_of_part(const Tensor& grad, const Tensor& x, const Tensor& mean, const Tensor& var,
                        Maybe weight, const Tensor& mean_grad, const Tensor& mean_grad_x_hat,
                        double eps) {
  Call call{.x = x,
            .axes = {0, 0, true},
            .eps = eps,
            .weight = given(weight),
            .mean = &mean,
            .var = &var,
            .grad = &grad,
            .needs = kInput};
  call.read();
  check::statistic("mean_grad", mean_grad, x, call.g);
  check::statistic("mean_grad_x_hat", mean_grad_x_hat, x, call.g);
  const Tensor sums = empty(2 * call.g.c, ScalarType::Double);
  const Values<double> of_x_hat(mean_grad_x_hat), of_grad(mean_grad);
  std::copy_n(of_x_hat.get(), call.g.c, doubles(sums));
  std::copy_n(of_grad.get(), call.g.c, doubles(sums) + call.g.c);
  call.sums = &sums;
  return std::get<0>(gradients_of(call));
}

void update_running(const Tensor& running_mean, const Tensor& running_var, Maybe batches,
                    const Tensor& x, const Tensor& mean, const Tensor& var,
                    std::optional<double> momentum) {
  const int64_t channels = running_mean.numel();
  check::running(running_mean, running_var, batches ? &*batches : nullptr, !momentum, channels);
  check::observed(mean, var, channels, x);
  if (mean.numel() == 0) return;
  const Values<double> means(mean), vars(var);
  // of x only the shape counts: how many values each new statistic spans
  move({running_mean, running_var, given(batches), momentum.value_or(std::nan(""))},
       {means.get(), vars.get(), mean.numel() / channels, nullptr,
        double(x.numel() / mean.numel())});
}

Tensor local_response(const Tensor& x, int64_t size, double alpha, double beta, double k) {
  const Geometry g = geometry_of(x, {0, 0, true});
  check::window(size);
  Tensor y = new_result(g, x.scalar_type());
  if (g.numel() == 0) return y;
  const Tensor dense = laid_out(x, g);
  with_type(x, [&]<class T>(T) {
    local_response_norm<T>(g, table<T>(kernels()), static_cast<const T*>(dense.const_data_ptr()),
                           static_cast<T*>(y.mutable_data_ptr()), size, alpha, beta, k);
  });
  return y;
}

Tensor local_response_backward(const Tensor& grad, const Tensor& x, int64_t size, double alpha,
                               double beta, double k) {
  const Geometry g = geometry_of(x, {0, 0, true});
  check::window(size);
  check::gradient(grad, x, g);
  Tensor grad_x = new_result(g, x.scalar_type());
  if (g.numel() == 0) return grad_x;
  const Tensor dense_x = laid_out(x, g);
  const Tensor dense_grad = laid_out_like(x, grad, g);
  with_type(x, [&]<class T>(T) {
    local_response_norm_backward<T>(
        g, table<T>(kernels()), static_cast<const T*>(dense_grad.const_data_ptr()),
        static_cast<const T*>(dense_x.const_data_ptr()), static_cast<T*>(grad_x.mutable_data_ptr()),
        size, alpha, beta, k);
  });
  return grad_x;
}

}  // namespace

Tensor new_result(const Geometry& g, ScalarType type) {
  const size_t bytes = size_t(g.numel()) * element_size(type);
  if (bytes >= kPoolFrom) {
    const Buffer buffer = take(bytes);
    if (buffer.data != nullptr) return over(buffer, g, type);
  }
  Tensor result = empty_strided(g.sizes, g.strides, type);
  ask_for_huge_pages(result.mutable_data_ptr(), bytes);
  return result;
}

}  // namespace truenorm

STABLE_TORCH_LIBRARY_IMPL(truenorm, CPU, m) {
  m.impl("forward", TORCH_BOX(&truenorm::forward));
  m.impl("apply", TORCH_BOX(&truenorm::apply));
  m.impl("backward", TORCH_BOX(&truenorm::backward));
  m.impl("moments", TORCH_BOX(&truenorm::moments));
  m.impl("backward_of_part", TORCH_BOX(&truenorm::backward_of_part));
  m.impl("update_running_", TORCH_BOX(&truenorm::update_running));
  m.impl("local_response_norm", TORCH_BOX(&truenorm::local_response));
  m.impl("local_response_norm_backward", TORCH_BOX(&truenorm::local_response_backward));
}
