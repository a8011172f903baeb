// LocalResponseNorm's operators, and the memory that all operators write their results to. The
// schemas stand in src/truenorm/_core/operators.py.
#include <torch/csrc/stable/library.h>

#include "pages.h"
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
  m.impl("response", TORCH_BOX(&truenorm::local_response));
  m.impl("response_backward", TORCH_BOX(&truenorm::local_response_backward));
}
