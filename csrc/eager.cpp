// The operators of an eager call on a CPU: all of a layer's step in one call of the dispatcher,
// which is most of a small input's time. They take only what is in order, and refuse the rest
// before anything is changed; _ops/eager.py then goes the long way, where errors are worded.
#include <torch/csrc/stable/library.h>

#include <limits>
#include <tuple>

#include "tensors.h"

namespace truenorm {
namespace {

constexpr int64_t kInstance = -1;  // num_groups: as many as there are channels

void expect(bool in_order) {
  STD_TORCH_CHECK(in_order, "truenorm: no call for the short way");
}

bool is_floating(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::BFloat16 ||
         type == ScalarType::Half;
}

// The axes of x, which has values, and more than one to a statistic where one has no variance.
Axes axes_of(const Tensor& x, int64_t num_groups, int64_t feature_dims, bool centred, bool fixed) {
  const auto sizes = x.sizes();
  const int64_t dim = int64_t(sizes.size());
  expect(is_floating(x.scalar_type()) && x.numel() > 0);
  if (feature_dims > 0) {
    expect(feature_dims <= dim);
    return {num_groups, feature_dims, centred};
  }
  expect(dim >= 2);
  if (num_groups == kInstance) num_groups = sizes[1];
  expect(num_groups == 0 || sizes[1] % num_groups == 0);
  int64_t values = 1;
  for (int64_t d = 2; d < dim; ++d) values *= sizes[d];
  // as torch: GroupNorm fails only where the whole batch has one value per group
  if (num_groups == 0)
    values *= sizes[0];
  else if (num_groups != sizes[1])
    values *= sizes[0] * (sizes[1] / num_groups);
  expect(fixed || values != 1);
  return {num_groups, feature_dims, centred};
}

// A weight or bias: shaped like the channels.
void expect_parameter(const std::optional<Tensor>& p, const Geometry& g, int64_t feature_dims) {
  if (!p) return;
  const auto sizes = p->sizes();
  expect(is_floating(p->scalar_type()));
  if (feature_dims == 0) {
    expect(sizes.size() == 1 && sizes[0] == g.c);
    return;
  }
  expect(int64_t(sizes.size()) == feature_dims &&
         std::equal(sizes.begin(), sizes.end(), g.sizes.end() - feature_dims));
}

std::tuple<Tensor, Tensor> forward(const Tensor& x, std::optional<Tensor> weight,
                                   std::optional<Tensor> bias, int64_t num_groups,
                                   int64_t feature_dims, bool centred, double eps,
                                   std::optional<Tensor> running_mean,
                                   std::optional<Tensor> running_var,
                                   std::optional<Tensor> num_batches_tracked, double momentum,
                                   bool save) {
  const Axes axes = axes_of(x, num_groups, feature_dims, centred, false);
  const Geometry g = geometry_of(x, axes);
  expect_parameter(weight, g, feature_dims);
  expect_parameter(bias, g, feature_dims);
  expect(running_mean.has_value() == running_var.has_value());
  expect_parameter(running_mean, g, 0);
  expect_parameter(running_var, g, 0);
  if (num_batches_tracked)
    expect(num_batches_tracked->scalar_type() == ScalarType::Long &&
           num_batches_tracked->numel() == 1);
  else
    expect(!running_mean || !std::isnan(momentum));
  const Tensor y = new_result(g, x.scalar_type());
  const int64_t count = g.num_statistics();
  const Tensor statistics = save ? empty(2 * count, ScalarType::Double) : Tensor();
  Room<double> unsaved;
  double* const mean = save ? doubles(statistics) : unsaved.of(2 * count);
  forward_into(x, weight, bias, g, eps, y, mean, mean + count, false);
  if (running_mean)
    move_both(*running_mean, *running_var, num_batches_tracked, mean, mean + count, count / g.c,
              g.values_per_statistic(), momentum);
  return {y, statistics};
}

std::tuple<Tensor, Tensor> apply(const Tensor& x, const Tensor& mean, const Tensor& var,
                                 std::optional<Tensor> weight, std::optional<Tensor> bias,
                                 double eps, bool save) {
  const Geometry g = geometry_of(x, axes_of(x, 0, 0, true, true));
  expect_parameter(weight, g, 0);
  expect_parameter(bias, g, 0);
  expect_parameter(mean, g, 0);
  expect_parameter(var, g, 0);
  const Tensor y = new_result(g, x.scalar_type());
  const Values<double> m(mean), v(var);
  Tensor statistics;
  if (save) {
    // running statistics change in place at the next training step: keep today's values
    statistics = empty(2 * g.c, ScalarType::Double);
    std::copy(m.get(), m.get() + g.c, doubles(statistics));
    std::copy(v.get(), v.get() + g.c, doubles(statistics) + g.c);
  }
  forward_into(x, weight, bias, g, eps, y, const_cast<double*>(m.get()),
               const_cast<double*>(v.get()), true);
  return {y, statistics};
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad, const Tensor& x,
                                            const Tensor& statistics, std::optional<Tensor> weight,
                                            int64_t num_groups, int64_t feature_dims, bool centred,
                                            double eps, bool fixed, int64_t needs) {
  const Geometry g = geometry_of(x, axes_of(x, num_groups, feature_dims, centred, fixed));
  const Params params(x, weight, g, feature_dims);
  std::optional<Tensor> of_x, of_weight, of_bias;
  if (needs & kInput) of_x = new_result(g, x.scalar_type());
  if (needs & kWeight) of_weight = params.gradient();
  if (needs & kBias) of_bias = params.gradient();
  const double* const mean = doubles(statistics);
  backward_into(grad, x, mean, mean + g.num_statistics(), weight, g, eps, fixed, of_x, of_weight,
                of_bias);
  const auto found = [](const std::optional<Tensor>& t) { return t ? *t : Tensor(); };
  return {found(of_x), found(of_weight), found(of_bias)};
}

}  // namespace
}  // namespace truenorm

STABLE_TORCH_LIBRARY_IMPL(truenorm, CPU, m) {
  m.impl("eager_forward", TORCH_BOX(&truenorm::forward));
  m.impl("eager_apply", TORCH_BOX(&truenorm::apply));
  m.impl("eager_backward", TORCH_BOX(&truenorm::backward));
}
