// The operators of an eager call on a CPU: all of a layer's step in one call of the dispatcher,
// which is most of a small input's time. They take only what is in order, and refuse the rest
// before anything is changed; _ops/eager.py then goes the long way, where errors are worded.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "tensors.h"

namespace truenorm {
namespace {

// Which values share a statistic, and what is wanted, in one number: each scalar's way through
// the dispatcher takes time. _ops/eager.py has the same bits, above those
// of NEEDS_INPUT, NEEDS_WEIGHT and NEEDS_BIAS.
struct Form {
  int64_t bits;

  bool saves() const { return bits & (kInput | kWeight | kBias); }
  bool fixed() const { return bits & 8; }
  bool centred() const { return !(bits & 16); }
  bool group_per_channel() const { return bits & 32; }
  int64_t feature_dims() const { return bits >> 8 & 0xff; }
  int64_t num_groups() const { return bits >> 16; }
};

// What the backward needs besides x and weight, in one tensor: per statistic the means, then the
// variances, then eps and the form.
struct Record {
  static int64_t size(const Geometry& g) { return 2 * g.num_statistics() + 2; }
  static Tensor of(const Geometry& g) { return empty(size(g), ScalarType::Double); }
  static void close(double* values, const Geometry& g, double eps, Form form) {
    values[size(g) - 2] = eps;
    values[size(g) - 1] = double(form.bits);
  }
};

void expect(bool in_order) { STD_TORCH_CHECK(in_order, "truenorm: no call for the short way"); }

bool is_floating(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::BFloat16 ||
         type == ScalarType::Half;
}

// The axes of x, which has values, and more than one to a statistic where one has no variance.
Axes axes_of(const Tensor& x, Form form) {
  const auto sizes = x.sizes();
  const int64_t dim = int64_t(sizes.size());
  expect(is_floating(x.scalar_type()) && x.numel() > 0);
  if (form.feature_dims() > 0) {
    expect(form.feature_dims() <= dim);
    return {form.num_groups(), form.feature_dims(), form.centred()};
  }
  expect(dim >= 2);
  const int64_t groups = form.group_per_channel() ? sizes[1] : form.num_groups();
  expect(groups == 0 || sizes[1] % groups == 0);
  int64_t values = 1;
  for (int64_t d = 2; d < dim; ++d) values *= sizes[d];
  if (groups == 0)
    values *= sizes[0];
  else if (!form.group_per_channel())  // as torch: fails only where the whole batch has one value
    values *= sizes[0] * (sizes[1] / groups);
  expect(form.fixed() || values != 1);
  return {groups, 0, true};
}

// A weight or bias: shaped like the channels.
void expect_parameter(const Tensor& p, const Geometry& g, int64_t feature_dims) {
  const auto sizes = p.sizes();
  expect(is_floating(p.scalar_type()));
  if (feature_dims == 0) {
    expect(sizes.size() == 1 && sizes[0] == g.c);
    return;
  }
  expect(int64_t(sizes.size()) == feature_dims &&
         std::equal(sizes.begin(), sizes.end(), g.sizes.end() - feature_dims));
}

void expect_parameter(const std::optional<Tensor>& p, const Geometry& g, int64_t feature_dims) {
  if (p) expect_parameter(*p, g, feature_dims);
}

struct Running {
  const Tensor &mean, &var;
  const std::optional<Tensor>& num_batches_tracked;
  double momentum;
};

std::tuple<Tensor, Tensor> normalize(const Tensor& x, const std::optional<Tensor>& weight,
                                     const std::optional<Tensor>& bias, Form form, double eps,
                                     const Running* running) {
  const Geometry g = geometry_of(x, axes_of(x, form));
  expect_parameter(weight, g, form.feature_dims());
  expect_parameter(bias, g, form.feature_dims());
  if (running) {
    expect_parameter(running->mean, g, 0);
    expect_parameter(running->var, g, 0);
    const auto& batches = running->num_batches_tracked;
    expect(batches ? batches->scalar_type() == ScalarType::Long && batches->numel() == 1
                   : !std::isnan(running->momentum));
  }
  const Tensor y = new_result(g, x.scalar_type());
  const int64_t count = g.num_statistics();
  const Tensor record = form.saves() ? Record::of(g) : Tensor();
  Room<double> unsaved;
  double* const mean = form.saves() ? doubles(record) : unsaved.of(2 * count);
  if (form.saves()) Record::close(mean, g, eps, form);
  forward_into(x, weight, bias, g, eps, y, mean, mean + count, false);
  if (running)
    move_both(running->mean, running->var, running->num_batches_tracked, mean, mean + count,
              count / g.c, g.values_per_statistic(), running->momentum);
  return {y, record};
}

std::tuple<Tensor, Tensor> forward(const Tensor& x, std::optional<Tensor> weight,
                                   std::optional<Tensor> bias, int64_t form, double eps) {
  return normalize(x, weight, bias, {form}, eps, nullptr);
}

std::tuple<Tensor, Tensor> forward_running(const Tensor& x, std::optional<Tensor> weight,
                                           std::optional<Tensor> bias, const Tensor& running_mean,
                                           const Tensor& running_var,
                                           std::optional<Tensor> num_batches_tracked,
                                           double momentum, int64_t form, double eps) {
  const Running running{running_mean, running_var, num_batches_tracked, momentum};
  return normalize(x, weight, bias, {form}, eps, &running);
}

std::tuple<Tensor, Tensor> apply(const Tensor& x, std::optional<Tensor> weight,
                                 std::optional<Tensor> bias, const Tensor& mean, const Tensor& var,
                                 int64_t bits, double eps) {
  const Form form{bits};
  const Geometry g = geometry_of(x, axes_of(x, form));
  expect_parameter(weight, g, 0);
  expect_parameter(bias, g, 0);
  expect_parameter(mean, g, 0);
  expect_parameter(var, g, 0);
  const Tensor y = new_result(g, x.scalar_type());
  const Values<double> m(mean), v(var);
  Tensor record;
  if (form.saves()) {
    // running statistics change in place at the next training step: keep today's values
    record = Record::of(g);
    double* const values = doubles(record);
    std::copy(m.get(), m.get() + g.c, values);
    std::copy(v.get(), v.get() + g.c, values + g.c);
    Record::close(values, g, eps, form);
  }
  forward_into(x, weight, bias, g, eps, y, const_cast<double*>(m.get()),
               const_cast<double*>(v.get()), true);
  return {y, record};
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad, const Tensor& x,
                                            const Tensor& record, std::optional<Tensor> weight) {
  expect(record.scalar_type() == ScalarType::Double && record.numel() > 2);
  const double* const mean = doubles(record);
  const double* const end = mean + record.numel();
  const Form form{int64_t(end[-1])};
  const Geometry g = geometry_of(x, axes_of(x, form));
  expect(record.numel() == Record::size(g));
  expect_parameter(weight, g, form.feature_dims());
  const Params params(x, weight, g, form.feature_dims());
  std::optional<Tensor> of_x, of_weight, of_bias;
  if (form.bits & kInput) of_x = new_result(g, x.scalar_type());
  if (form.bits & kWeight) of_weight = params.gradient();
  if (form.bits & kBias) of_bias = params.gradient();
  backward_into(grad, x, mean, mean + g.num_statistics(), weight, g, end[-2], form.fixed(), of_x,
                of_weight, of_bias);
  const auto found = [](const std::optional<Tensor>& t) { return t ? *t : Tensor(); };
  return {found(of_x), found(of_weight), found(of_bias)};
}

}  // namespace
}  // namespace truenorm

STABLE_TORCH_LIBRARY_IMPL(truenorm, CPU, m) {
  m.impl("eager_forward", TORCH_BOX(&truenorm::forward));
  m.impl("eager_forward_running", TORCH_BOX(&truenorm::forward_running));
  m.impl("eager_apply", TORCH_BOX(&truenorm::apply));
  m.impl("eager_backward", TORCH_BOX(&truenorm::backward));
}
