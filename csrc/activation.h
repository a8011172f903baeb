// What is applied after the affine step: y = act(norm(x) + residual).
#pragma once

#include <cstdint>

namespace truenorm {

// _core/activation.py has the same numbers.
enum class Act : int64_t { none, relu, leaky_relu, hardswish, elu, silu, gelu, gelu_tanh, relu6 };

struct Activation {
  Act kind = Act::none;
  double parameter = 0.0;  // leaky_relu: the slope below zero; elu: alpha
  bool by_output = false;  // in the backward: the residual is y, whose sign is that of z
  // whether norm(x), and its sum with the residual, are rounded to x's dtype first
  bool rounds = false;
};

// Forward where grad is null: out = act(z). Else out = grad · act'(z). z = norm(x) + residual,
// residual null for none.
template <class T>
struct ActInputs {
  const T *grad, *x, *residual;

  ActInputs from(int64_t offset) const {
    return {grad ? grad + offset : nullptr, x + offset, residual ? residual + offset : nullptr};
  }
};

}  // namespace truenorm
