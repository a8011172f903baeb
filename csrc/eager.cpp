// The operators of an eager call on a CPU: all of a layer's step in one call of the dispatcher,
// which is most of a small input's time. They take only what is in order, and refuse the rest
// before anything is changed; _ops/eager.py then goes the long way, where errors are worded.
#include <torch/csrc/stable/library.h>

#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

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
  // Read before what it says of x is known.
  static Form form(const Tensor& record) {
    const bool whole = check::type_of(record) == ScalarType::Double && record.numel() > 2 &&
                       record.is_contiguous();
    if (whole) check::memory("record", record);
    const double bits = whole ? doubles(record)[record.numel() - 1] : -1.0;
    if (!(bits >= 0.0 && bits < 0x1p53))
      check::wrong_record(record, "as eager_forward or eager_apply has made it");
    return {int64_t(bits)};
  }
  static void expect_of(const Tensor& record, const Geometry& g) {
    if (record.numel() != size(g)) check::wrong_record(record, "of an x of this shape");
  }
};

// What is not in order, in the words of checks.h.
template <class Body>
auto in_order(const Body& body) {
  try {
    return body();
  } catch (const std::runtime_error& error) {
    throw std::runtime_error(std::string("truenorm: no call for the short way: ") + error.what());
  }
}

void expect(bool held, const char* words) {
  if (!held) throw std::runtime_error(words);
}

// The axes of x, which has values, and more than one to a statistic where one has no variance.
Axes axes_of(const Tensor& x, Form form) {
  expect(form.bits >= 0, "`form` must be a sum of the flags of _ops/eager.py, and is negative");
  expect(x.numel() > 0, "`x` is empty: it has no moments; pass a tensor that holds values");
  if (form.feature_dims() > 0) return {form.num_groups(), form.feature_dims(), form.centred()};
  const auto sizes = x.sizes();
  const int64_t dim = int64_t(sizes.size());
  if (dim < 2) return {0, 0, true};  // which geometry_of refuses
  const int64_t groups = form.group_per_channel() ? sizes[1] : form.num_groups();
  int64_t values = 1;
  for (int64_t d = 2; d < dim; ++d) values *= sizes[d];
  if (groups == 0)
    values *= sizes[0];
  else if (!form.group_per_channel())  // as torch: fails only where the whole batch has one value
    values *= sizes[0] * (sizes[1] / groups);
  if (!form.fixed() && values == 1) check::one_value(x);
  return {groups, 0, true};
}

struct Running {
  const Tensor &mean, &var;
  const std::optional<Tensor>& num_batches_tracked;
  double momentum;
};

std::tuple<Tensor, Tensor> normalize(const Tensor& x, const std::optional<Tensor>& weight,
                                     const std::optional<Tensor>& bias, Form form, double eps,
                                     const Running* running) {
  const Geometry g = in_order([&] {
    Geometry found = geometry_of(x, axes_of(x, form));
    check::parameter("weight", weight, x, found, form.feature_dims());
    check::parameter("bias", bias, x, found, form.feature_dims());
    if (running) {
      expect(found.num_statistics() % found.c == 0 && form.feature_dims() == 0 &&
                 found.groups() == found.c,
             "`form` must be one value per channel, or per sample and channel, where there are "
             "running statistics: BATCH or INSTANCE of _ops/eager.py");
      check::running(running->mean, running->var, running->num_batches_tracked,
                     std::isnan(running->momentum), found.c);
    }
    return found;
  });
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
  const Geometry g = in_order([&] {
    Geometry found = geometry_of(x, axes_of(x, form));
    expect(found.over_batch() && form.feature_dims() == 0,
           "`form` must be one value per channel where the statistics are given: BATCH of "
           "_ops/eager.py");
    check::statistic("mean", mean, x, found);
    check::statistic("var", var, x, found);
    check::parameter("weight", weight, x, found, 0);
    check::parameter("bias", bias, x, found, 0);
    return found;
  });
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
  const auto [form, g] = in_order([&] {
    const Form kept = Record::form(record);
    Geometry found = geometry_of(x, axes_of(x, kept));
    Record::expect_of(record, found);
    check::gradient(grad, x, found);
    check::parameter("weight", weight, x, found, kept.feature_dims());
    return std::pair{kept, std::move(found)};
  });
  const double* const mean = doubles(record);
  const Params params(x, weight, g, form.feature_dims());
  std::optional<Tensor> of_x, of_weight, of_bias;
  if (form.bits & kInput) of_x = new_result(g, x.scalar_type());
  if (form.bits & kWeight) of_weight = params.gradient();
  if (form.bits & kBias) of_bias = params.gradient();
  backward_into(grad, x, mean, mean + g.num_statistics(), weight, g, mean[Record::size(g) - 2],
                form.fixed(), of_x, of_weight, of_bias);
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
