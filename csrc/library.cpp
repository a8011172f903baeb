// The operators' CPU kernels: tensors in, tensors out. The schemas stand in
// src/truenorm/_ops/operators.py.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "pool.h"
#include "tensors.h"

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

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& x, std::optional<Tensor> weight,
                                           std::optional<Tensor> bias, int64_t num_groups,
                                           int64_t feature_dims, bool centred, double eps) {
  const Geometry g = geometry_of(x, {num_groups, feature_dims, centred});
  check::has_values("forward", x, g);
  check::parameter("weight", weight, x, g, feature_dims);
  check::parameter("bias", bias, x, g, feature_dims);
  const Tensor y = new_result(g, x.scalar_type());
  const Tensor mean = empty(g.num_statistics(), ScalarType::Double);
  const Tensor var = empty(g.num_statistics(), ScalarType::Double);
  forward_into(x, weight, bias, g, eps, y, doubles(mean), doubles(var), false);
  return {y, mean, var};
}

Tensor apply(const Tensor& x, const Tensor& mean, const Tensor& var, std::optional<Tensor> weight,
             std::optional<Tensor> bias, double eps) {
  const Geometry g = geometry_of(x, {0, 0, true});
  check::statistic("mean", mean, x, g);
  check::statistic("var", var, x, g);
  check::parameter("weight", weight, x, g, 0);
  check::parameter("bias", bias, x, g, 0);
  const Tensor y = new_result(g, x.scalar_type());
  if (g.numel() == 0) return y;
  const Values<double> m(mean), v(var);
  forward_into(x, weight, bias, g, eps, y, const_cast<double*>(m.get()),
               const_cast<double*>(v.get()), true);
  return y;
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad, const Tensor& x, const Tensor& mean,
                                            const Tensor& var, std::optional<Tensor> weight,
                                            int64_t num_groups, int64_t feature_dims, bool centred,
                                            double eps, bool fixed, int64_t needs) {
  const Geometry g = geometry_of(x, {num_groups, feature_dims, centred});
  check::gradient(grad, x, g);
  check::statistic("mean", mean, x, g);
  check::statistic("var", var, x, g);
  check::parameter("weight", weight, x, g, feature_dims);
  check::needs(needs, kInput | kWeight | kBias);
  const Params params(x, weight, g, feature_dims);
  std::optional<Tensor> of_x, of_weight, of_bias;
  if (needs & kInput) of_x = new_result(g, x.scalar_type());
  if (needs & kWeight) of_weight = params.gradient();
  if (needs & kBias) of_bias = params.gradient();
  if (g.numel() > 0) {
    const Values<double> m(mean), v(var);
    backward_into(grad, x, m.get(), v.get(), weight, g, eps, fixed, of_x, of_weight, of_bias);
  } else {
    if (of_weight) torch::stable::zero_(*of_weight);
    if (of_bias) torch::stable::zero_(*of_bias);
  }
  return {of_x ? *of_x : empty(0, x.scalar_type()), of_weight ? *of_weight : empty(0, params.type),
          of_bias ? *of_bias : empty(0, params.type)};
}

// Mean and biased variance per channel of (N, C, *), and no output.
std::tuple<Tensor, Tensor> moments(const Tensor& x) {
  const Geometry g = geometry_of(x, {0, 0, true});
  check::has_values("moments", x, g);
  const Tensor mean = empty(g.c, ScalarType::Double), var = empty(g.c, ScalarType::Double);
  const Tensor dense = laid_out(x, g);
  with_type(x, [&]<class T>(T) {
    run(Forward<T>{g, table<T>(kernels()), 0.0, static_cast<const T*>(dense.const_data_ptr()),
                   nullptr, nullptr, nullptr, doubles(mean), doubles(var), false, false});
  });
  return {mean, var};
}

// grad_x of batch statistics for mean gradients that are given.
Tensor backward_of_part(const Tensor& grad, const Tensor& x, const Tensor& mean, const Tensor& var,
                        std::optional<Tensor> weight, const Tensor& mean_grad,
                        const Tensor& mean_grad_x_hat, double eps) {
  const Geometry g = geometry_of(x, {0, 0, true});
  check::gradient(grad, x, g);
  check::statistic("mean", mean, x, g);
  check::statistic("var", var, x, g);
  check::parameter("weight", weight, x, g, 0);
  check::statistic("mean_grad", mean_grad, x, g);
  check::statistic("mean_grad_x_hat", mean_grad_x_hat, x, g);
  const Tensor grad_x = new_result(g, x.scalar_type());
  if (g.numel() == 0) return grad_x;
  const Tensor dense_x = laid_out(x, g);
  const Tensor dense_grad = laid_out_like(x, grad, g);
  const Values<double> m(mean), v(var), of_grad(mean_grad), of_x_hat(mean_grad_x_hat);
  with_type(x, [&]<class T>(T) {
    const Values<compute_t<T>> w(weight);
    const Backward<T> b{g,
                        table<T>(kernels()),
                        eps,
                        static_cast<const T*>(dense_grad.const_data_ptr()),
                        static_cast<const T*>(dense_x.const_data_ptr()),
                        static_cast<T*>(grad_x.mutable_data_ptr()),
                        w.get(),
                        m.get(),
                        v.get(),
                        nullptr,
                        nullptr,
                        false,
                        streams<T>(g)};
    backward_given(b, {of_grad.get(), of_x_hat.get()});
  });
  return grad_x;
}

void update_running(const Tensor& running_mean, const Tensor& running_var,
                    std::optional<Tensor> num_batches_tracked, const Tensor& x, const Tensor& mean,
                    const Tensor& var, std::optional<double> momentum) {
  const int64_t channels = running_mean.numel();
  check::running(running_mean, running_var, num_batches_tracked, !momentum, channels);
  check::observed(mean, var, channels, x);
  if (mean.numel() == 0) return;
  const Values<double> means(mean), vars(var);
  // of x only the shape counts: how many values each new statistic spans
  move_both(running_mean, running_var, num_batches_tracked, means.get(), vars.get(),
            mean.numel() / channels, x.numel() / mean.numel(), momentum.value_or(std::nan("")));
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

void forward_into(const Tensor& x, const std::optional<Tensor>& weight,
                  const std::optional<Tensor>& bias, const Geometry& g, double eps, const Tensor& y,
                  double* mean, double* var, bool fixed, const Epilogue& after) {
  if (needs_double(x, weight, bias)) {
    Tensor wide = empty_strided(g.sizes, g.strides, ScalarType::Double), rounded = y;
    const Tensor result = empty_strided(g.sizes, g.strides, ScalarType::Double);
    torch::stable::copy_(wide, x);
    Epilogue wide_after{std::nullopt, after.act};
    if (after.residual) {
      wide_after.residual = empty_strided(g.sizes, g.strides, ScalarType::Double);
      torch::stable::copy_(*wide_after.residual, *after.residual);
    }
    forward_into(wide, weight, bias, g, eps, result, mean, var, fixed, wide_after);
    torch::stable::copy_(rounded, result);
    return;
  }
  const Tensor dense = laid_out(x, g);
  std::optional<Tensor> residual;
  if (after.residual) residual = laid_out(*after.residual, g);
  with_type(x, [&]<class T>(T) {
    const Values<compute_t<T>> w(weight), b(bias);
    run(Forward<T>{
        g, table<T>(kernels()), eps, static_cast<const T*>(dense.const_data_ptr()),
        static_cast<T*>(y.mutable_data_ptr()), w.get(), b.get(), mean, var, fixed, streams<T>(g),
        residual ? static_cast<const T*>(residual->const_data_ptr()) : nullptr, after.act});
  });
}

void backward_into(const Tensor& grad, const Tensor& x, const double* mean, const double* var,
                   const std::optional<Tensor>& weight, const Geometry& g, double eps, bool fixed,
                   const std::optional<Tensor>& grad_x, const std::optional<Tensor>& grad_weight,
                   const std::optional<Tensor>& grad_bias) {
  // one value is its own mean: its gradient is zero, not the rounding of what cancels
  const bool alone = g.values_per_statistic() == 1 && g.centred && !fixed;
  if (grad_x && alone) {
    Tensor zero = *grad_x;
    torch::stable::zero_(zero);
  }
  const Tensor dense_x = laid_out(x, g);
  const Tensor dense_grad = laid_out_like(x, grad, g);
  Room<double> room;
  double* const sums = room.of(2 * g.c);
  with_type(x, [&]<class T>(T) {
    const Values<compute_t<T>> w(weight);
    run(Backward<T>{g, table<T>(kernels()), eps, static_cast<const T*>(dense_grad.const_data_ptr()),
                    static_cast<const T*>(dense_x.const_data_ptr()),
                    grad_x && !alone ? static_cast<T*>(grad_x->mutable_data_ptr()) : nullptr,
                    w.get(), mean, var, grad_weight ? sums : nullptr,
                    grad_bias ? sums + g.c : nullptr, fixed, streams<T>(g)});
  });
  if (grad_weight) store(sums, *grad_weight);
  if (grad_bias) store(sums + g.c, *grad_bias);
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
