// From tensors to what the kernels take: memory, layouts, parameters in the type they are computed
// in. Everything has internal linkage but new_result and
// turn_into.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>

#include "checks.h"
#include "layers.h"
#include "parallel.h"

namespace truenorm {

// its name up to torch 2.11
#if !defined(STABLE_TORCH_ERROR_CODE_CHECK)
#define STABLE_TORCH_ERROR_CODE_CHECK(call) TORCH_ERROR_CODE_CHECK(call)
#endif

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Memory for a result of this geometry.
Tensor new_result(const Geometry& g, ScalarType type);

// Copies between channels inside and outside of the positions, in less time than torch takes; false
// where it is another copy that is asked for.
bool turn_into(const Tensor& to, const Tensor& from);

using Maybe = std::optional<Tensor>;

namespace {

[[maybe_unused]] Tensor empty_strided(const Dims& sizes, const Dims& strides, ScalarType type) {
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      sizes.size(), sizes.begin(), strides.begin(),
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)),
      aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

[[maybe_unused]] Tensor empty(int64_t size, ScalarType type) {
  constexpr int64_t one = 1;
  return empty_strided(Dims(&size, &size + 1), Dims(&one, &one + 1), type);
}

// x with the geometry's strides: itself, or the one copy that is allowed.
[[maybe_unused]] Tensor laid_out(const Tensor& x, const Geometry& g) {
  bool same = true;
  const auto strides = x.strides();
  for (int64_t d = 0; d < g.sizes.size(); ++d)
    same = same && (g.sizes[d] == 1 || strides[d] == g.strides[d]);
  if (same) return x;
  Tensor copy = new_result(g, x.scalar_type());
  if (!turn_into(copy, x)) torch::stable::copy_(copy, x);
  return copy;
}

// The output's gradient, as x is laid out and in its type.
[[maybe_unused]] Tensor laid_out_like(const Tensor& x, const Tensor& grad, const Geometry& g) {
  const ScalarType type = x.scalar_type();
  return laid_out(grad.scalar_type() == type ? grad : torch::stable::to(grad, type), g);
}

[[maybe_unused]] const InstructionSet& kernels() {
  const InstructionSet* set = instruction_set();
  STD_TORCH_CHECK(set != nullptr, "TRUENORM_ISA names no instruction set of this machine");
  return *set;
}

[[maybe_unused]] Geometry geometry_of(const Tensor& x, const Axes& axes) {
  check::input(x, axes);
  return geometry(x.sizes().data(), x.strides().data(), x.dim(), axes);
}

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

// Memory for `count` values: in place where they are few.
template <class A>
class Room {
 public:
  A* of(int64_t count) {
    if (count <= kInline) return near_;
    far_ = scratch<A>(count);
    return far_.get();
  }

 private:
  static constexpr int64_t kInline = 64;

  A near_[kInline];
  std::unique_ptr<A[]> far_;
};

// A parameter's values in the type they are computed in, read in place where they have it already.
// Converted here, not by torch: a call of torch takes longer than the rest of a small input's.
template <class A>
class Values {
 public:
  explicit Values(const Tensor& p) { read(p); }
  // one_plus: 1 + each of them
  explicit Values(const Tensor* p, bool one_plus = false) : one_plus_(one_plus) {
    if (p) read(*p);
  }
  Values(const Values&) = delete;
  Values& operator=(const Values&) = delete;
  const A* get() const { return data_; }

 private:
  void read(const Tensor& p) {
    constexpr ScalarType type = std::is_same_v<A, double> ? ScalarType::Double : ScalarType::Float;
    held_ = p.is_contiguous() ? p : torch::stable::contiguous(p);
    if (p.scalar_type() == type && !one_plus_) {
      data_ = static_cast<const A*>(held_->const_data_ptr());
      return;
    }
    const int64_t count = held_->numel();
    A* const to = converted_.of(count);
    with_type(*held_, [&]<class T>(T) {
      const T* const from = static_cast<const T*>(held_->const_data_ptr());
      constexpr int64_t kBlock = 64;
      double wide[kBlock];
      for (int64_t i = 0; i < count; i += kBlock) {
        const int64_t some = std::min(kBlock, count - i);
        table<T>(kernels()).widen(from + i, wide, some);
        for (int64_t j = 0; j < some; ++j) to[i + j] = A(wide[j]) + A(one_plus_);
      }
    });
    data_ = to;
  }

  bool one_plus_ = false;
  std::optional<Tensor> held_;
  Room<A> converted_;
  const A* data_ = nullptr;
};

[[maybe_unused]] double* doubles(const Tensor& t) {
  return static_cast<double*>(t.mutable_data_ptr());
}

template <class T>
[[maybe_unused]] bool streams(const Geometry& g) {
  return g.numel() * int64_t(sizeof(T)) >= kStreamFrom;
}

[[maybe_unused]] void store(const double* values, const Tensor& to) {
  with_type(to, [&]<class T>(T) {
    table<T>(kernels()).narrow(values, static_cast<T*>(to.mutable_data_ptr()), to.numel());
  });
}

}  // namespace
}  // namespace truenorm
