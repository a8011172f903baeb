// The operators' CPU kernels: tensors in, tensors out. The schemas stand in src/truenorm/_ops.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "layers.h"
#include "parallel.h"
#include "pool.h"

namespace truenorm {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Tensor empty_strided(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides,
                     ScalarType type) {
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      int64_t(sizes.size()), sizes.data(), strides.data(),
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)),
      aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

Tensor empty(int64_t size, ScalarType type) { return empty_strided({size}, {1}, type); }

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
      buffer.data, int64_t(g.sizes.size()), g.sizes.data(), g.strides.data(), 0,
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)),
      aoti_torch_device_type_cpu(), -1, &handle, aoti_torch_layout_strided(), nullptr, 0,
      [](void* data, void* capacity) { give_back({data, size_t(capacity)}); },
      reinterpret_cast<void*>(buffer.capacity));
  if (handle == nullptr) give_back(buffer);
  STABLE_TORCH_ERROR_CODE_CHECK(error);
  return Tensor(handle);
}

Tensor empty_result(const Geometry& g, ScalarType type) {
  const size_t bytes = size_t(g.numel()) * element_size(type);
  if (bytes >= kPoolFrom) {
    const Buffer buffer = take(bytes);
    if (buffer.data != nullptr) return over(buffer, g, type);
  }
  Tensor result = empty_strided(g.sizes, g.strides, type);
  ask_for_huge_pages(result.mutable_data_ptr(), bytes);
  return result;
}

Geometry geometry_of(const Tensor& x, const Axes& axes) {
  return geometry(x.sizes().data(), x.strides().data(), x.dim(), axes);
}

// x with the geometry's strides: itself, or the one copy that is allowed.
Tensor laid_out(const Tensor& x, const Geometry& g) {
  bool same = true;
  const auto strides = x.strides();
  for (size_t d = 0; d < g.sizes.size(); ++d)
    same = same && (g.sizes[d] == 1 || strides[d] == g.strides[d]);
  if (same) return x;
  Tensor copy = empty_strided(g.sizes, g.strides, x.scalar_type());
  torch::stable::copy_(copy, x);
  return copy;
}

// A parameter's values in the type they are computed in, read in place where they have it already.
template <class A>
class Values {
 public:
  explicit Values(const std::optional<Tensor>& p) {
    if (!p) return;
    constexpr ScalarType type = std::is_same_v<A, double> ? ScalarType::Double : ScalarType::Float;
    tensor_ = p->scalar_type() == type ? *p : torch::stable::to(*p, type);
    // nearly always so: no call then
    if (!tensor_->is_contiguous()) tensor_ = torch::stable::contiguous(*tensor_);
    data_ = static_cast<const A*>(tensor_->const_data_ptr());
  }
  const A* get() const { return data_; }

 private:
  std::optional<Tensor> tensor_;
  const A* data_ = nullptr;
};

template <class Body>
void with_type(const Tensor& x, const Body& body) {
  switch (x.scalar_type()) {
    case ScalarType::Double:
      return body(double{});
    case ScalarType::Float:
      return body(float{});
    case ScalarType::BFloat16:
      return body(bf16{});
    case ScalarType::Half:
      return body(f16{});
    default:
      STD_TORCH_CHECK(false, "truenorm has no kernel for this dtype");
  }
}

double* doubles(const Tensor& t) { return static_cast<double*>(t.mutable_data_ptr()); }

const InstructionSet& kernels() {
  const InstructionSet* set = instruction_set();
  STD_TORCH_CHECK(set != nullptr, "TRUENORM_ISA names no instruction set of this machine");
  return *set;
}

bool streams(const Tensor& result) {
  return result.numel() * int64_t(result.element_size()) >= kStreamFrom;
}

template <class T>
void run(const Forward<T>& f) {
  if (f.geometry.memory == Memory::rows)
    forward_rows(f);
  else
    forward_channels(f);
}

template <class T>
void run(const Backward<T>& b) {
  if (b.geometry.memory == Memory::rows)
    backward_rows(b);
  else
    backward_channels(b);
}

// Half precision takes its parameters in float, which holds all but float64's: with those, x is
// computed in float64.
bool needs_double(const Tensor& x, const std::optional<Tensor>& weight,
                  const std::optional<Tensor>& bias) {
  const auto is_double = [](const std::optional<Tensor>& p) {
    return p && p->scalar_type() == ScalarType::Double;
  };
  return x.element_size() == 2 && (is_double(weight) || is_double(bias));
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& x, std::optional<Tensor> weight,
                                           std::optional<Tensor> bias, int64_t num_groups,
                                           int64_t feature_dims, bool centred, double eps) {
  if (needs_double(x, weight, bias)) {
    auto [y, mean, var] = forward(torch::stable::to(x, ScalarType::Double), weight, bias,
                                  num_groups, feature_dims, centred, eps);
    return {torch::stable::to(y, x.scalar_type()), mean, var};
  }
  const Geometry g = geometry_of(x, {num_groups, feature_dims, centred});
  Tensor y = empty_result(g, x.scalar_type());
  Tensor mean = empty(g.num_statistics(), ScalarType::Double);
  Tensor var = empty(g.num_statistics(), ScalarType::Double);
  STD_TORCH_CHECK(g.numel() > 0, "truenorm::forward takes no empty tensor: it has no moments");
  const Tensor dense = laid_out(x, g);
  with_type(x, [&]<class T>(T) {
    const Values<compute_t<T>> w(weight), b(bias);
    run(Forward<T>{g, table<T>(kernels()), eps, static_cast<const T*>(dense.const_data_ptr()),
                   static_cast<T*>(y.mutable_data_ptr()), w.get(), b.get(), doubles(mean),
                   doubles(var), false, streams(y)});
  });
  return {y, mean, var};
}

Tensor apply(const Tensor& x, const Tensor& mean, const Tensor& var, std::optional<Tensor> weight,
             std::optional<Tensor> bias, double eps) {
  if (needs_double(x, weight, bias)) {
    const Tensor wide = torch::stable::to(x, ScalarType::Double);
    return torch::stable::to(apply(wide, mean, var, weight, bias, eps), x.scalar_type());
  }
  const Geometry g = geometry_of(x, {0, 0, true});
  Tensor y = empty_result(g, x.scalar_type());
  if (g.numel() == 0) return y;
  const Tensor dense = laid_out(x, g);
  const Values<double> m(mean), v(var);
  with_type(x, [&]<class T>(T) {
    const Values<compute_t<T>> w(weight), b(bias);
    run(Forward<T>{g, table<T>(kernels()), eps, static_cast<const T*>(dense.const_data_ptr()),
                   static_cast<T*>(y.mutable_data_ptr()), w.get(), b.get(),
                   const_cast<double*>(m.get()), const_cast<double*>(v.get()), true, streams(y)});
  });
  return y;
}

// Gradients of weight and bias: shaped like the channels of x, in weight's dtype, or where there is
// none in the one that x is computed in. _ops/operators.py states the same rule.
struct Params {
  std::vector<int64_t> sizes;
  ScalarType type;

  Params(const Tensor& x, const std::optional<Tensor>& weight, const Geometry& g,
         int64_t feature_dims)
      : type(weight                                  ? weight->scalar_type()
             : x.scalar_type() == ScalarType::Double ? ScalarType::Double
                                                     : ScalarType::Float) {
    if (feature_dims > 0)
      sizes.assign(g.sizes.end() - feature_dims, g.sizes.end());
    else
      sizes = {g.c};
  }

  Tensor gradient(bool wanted) const {
    if (!wanted) return empty(0, type);
    std::vector<int64_t> strides(sizes.size());
    int64_t step = 1;
    for (size_t d = sizes.size(); d-- > 0; step *= sizes[d]) strides[d] = step;
    return empty_strided(sizes, strides, type);
  }
};

void store(const double* values, Tensor& to) {
  with_type(to, [&]<class T>(T) {
    table<T>(kernels()).narrow(values, static_cast<T*>(to.mutable_data_ptr()), to.numel());
  });
}

// which gradients are wanted: NEEDS_INPUT, NEEDS_WEIGHT, NEEDS_BIAS of _ops.py
constexpr int64_t kInput = 1, kWeight = 2, kBias = 4;

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad, const Tensor& x, const Tensor& mean,
                                            const Tensor& var, std::optional<Tensor> weight,
                                            int64_t num_groups, int64_t feature_dims, bool centred,
                                            double eps, bool fixed, int64_t needs) {
  const Geometry g = geometry_of(x, {num_groups, feature_dims, centred});
  Tensor grad_x = needs & kInput ? empty_result(g, x.scalar_type()) : empty(0, x.scalar_type());
  const Params params(x, weight, g, feature_dims);
  Tensor grad_weight = params.gradient(needs & kWeight);
  Tensor grad_bias = params.gradient(needs & kBias);
  if (g.numel() == 0) {
    torch::stable::zero_(grad_weight);
    torch::stable::zero_(grad_bias);
    return {grad_x, grad_weight, grad_bias};
  }
  if (g.values_per_statistic() == 1 && g.centred && !fixed && (needs & kInput)) {
    // one value is its own mean: its gradient is zero, not the rounding of what cancels
    torch::stable::zero_(grad_x);
    needs &= ~kInput;
  }
  const Tensor dense_x = laid_out(x, g);
  const Tensor same_type =
      grad.scalar_type() == x.scalar_type() ? grad : torch::stable::to(grad, x.scalar_type());
  const Tensor dense_grad = laid_out(same_type, g);
  const Values<double> m(mean), v(var);
  const auto sums = scratch<double>(2 * g.c);
  double* const of_weight = needs & kWeight ? sums.get() : nullptr;
  double* const of_bias = needs & kBias ? sums.get() + g.c : nullptr;
  with_type(x, [&]<class T>(T) {
    const Values<compute_t<T>> w(weight);
    run(Backward<T>{g, table<T>(kernels()), eps, static_cast<const T*>(dense_grad.const_data_ptr()),
                    static_cast<const T*>(dense_x.const_data_ptr()),
                    needs & kInput ? static_cast<T*>(grad_x.mutable_data_ptr()) : nullptr, w.get(),
                    m.get(), v.get(), of_weight, of_bias, fixed, streams(grad_x)});
  });
  if (of_weight) store(of_weight, grad_weight);
  if (of_bias) store(of_bias, grad_bias);
  return {grad_x, grad_weight, grad_bias};
}

// running = (1 − momentum) · running + momentum · observed, the variance unbiased, both averaged
// over samples where each sample has its own.
void update_running(Tensor running_mean, Tensor running_var,
                    std::optional<Tensor> num_batches_tracked, const Tensor& x, const Tensor& mean,
                    const Tensor& var, std::optional<double> momentum) {
  if (mean.numel() == 0) return;
  const int64_t channels = running_mean.numel(), samples = mean.numel() / channels;
  // of x only the shape counts: how many values each new statistic spans
  const int64_t count = x.numel() / mean.numel();
  double factor = momentum.value_or(0.0);
  if (num_batches_tracked) {
    auto* batches = static_cast<int64_t*>(num_batches_tracked->mutable_data_ptr());
    *batches += 1;
    if (!momentum) factor = 1.0 / double(*batches);
  }
  const double unbiased = double(count) / double(count - 1);
  const Values<double> means(mean), vars(var);
  const auto move = [&](Tensor& running, const double* observed, double scale) {
    const int64_t stride = running.dim() > 0 ? running.stride(0) : 1;
    with_type(running, [&]<class T>(T) {
      const Kernels<T>& k = table<T>(kernels());
      T* values = static_cast<T*>(running.mutable_data_ptr());
      for (int64_t c = 0; c < channels; ++c) {
        double seen = 0.0, before;
        for (int64_t n = 0; n < samples; ++n) seen += observed[n * channels + c];
        seen = seen / double(samples) * scale;
        k.widen(values + c * stride, &before, 1);
        const double after = (1.0 - factor) * before + factor * seen;
        k.narrow(&after, values + c * stride, 1);
      }
    });
  };
  move(running_mean, means.get(), 1.0);
  move(running_var, vars.get(), unbiased);
}

Tensor local_response(const Tensor& x, int64_t size, double alpha, double beta, double k) {
  const Geometry g = geometry_of(x, {0, 0, true});
  Tensor y = empty_result(g, x.scalar_type());
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
  Tensor grad_x = empty_result(g, x.scalar_type());
  if (g.numel() == 0) return grad_x;
  const Tensor dense_x = laid_out(x, g);
  const Tensor dense_grad = laid_out(
      grad.scalar_type() == x.scalar_type() ? grad : torch::stable::to(grad, x.scalar_type()), g);
  with_type(x, [&]<class T>(T) {
    local_response_norm_backward<T>(
        g, table<T>(kernels()), static_cast<const T*>(dense_grad.const_data_ptr()),
        static_cast<const T*>(dense_x.const_data_ptr()), static_cast<T*>(grad_x.mutable_data_ptr()),
        size, alpha, beta, k);
  });
  return grad_x;
}

}  // namespace
}  // namespace truenorm

STABLE_TORCH_LIBRARY_IMPL(truenorm, CPU, m) {
  m.impl("forward", TORCH_BOX(&truenorm::forward));
  m.impl("apply", TORCH_BOX(&truenorm::apply));
  m.impl("backward", TORCH_BOX(&truenorm::backward));
  m.impl("update_running_", TORCH_BOX(&truenorm::update_running));
  m.impl("local_response_norm", TORCH_BOX(&truenorm::local_response));
  m.impl("local_response_norm_backward", TORCH_BOX(&truenorm::local_response_backward));
}
