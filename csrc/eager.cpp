// The operators of an eager call on a CPU: all of a layer's step in one call of the dispatcher,
// which is most of a small input's time. They take only what is in order, and refuse the rest
// before anything is changed; _core/eager.py then goes the long way, where errors are worded.
#include <torch/csrc/stable/library.h>

#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

#include "call.h"
#include "running.h"

namespace truenorm {
namespace {

// Which values share a statistic, and what is wanted, in one number: each scalar's way through
// the dispatcher takes time. _core/eager.py has the same bits, above those
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
void in_order(const Body& body) {
  try {
    body();
  } catch (const std::runtime_error& error) {
    throw std::runtime_error(std::string("truenorm: no call for the short way: ") + error.what());
  }
}

void expect(bool held, const char* words) {
  if (!held) throw std::runtime_error(words);
}

// The axes of x, which has values, and more than one to a statistic where one has no variance.
Axes axes_of(const Tensor& x, Form form) {
  expect(form.bits >= 0, "`form` must be a sum of the flags of _core/eager.py, and is negative");
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

std::tuple<Tensor, Tensor> normalize(const Tensor& x, const Maybe& weight, const Maybe& bias,
                                     Form form, double eps, const Running* running) {
  Call call{.x = x, .axes = {}, .eps = eps, .weight = given(weight), .bias = given(bias)};
  const Geometry& g = call.g;
  in_order([&] {
    call.axes = axes_of(x, form);
    call.read();
    if (!running) return;
    expect(g.num_statistics() % g.c == 0 && form.feature_dims() == 0 && g.groups() == g.c,
           "`form` must be one value per channel, or per sample and channel, where there are "
           "running statistics: BATCH or INSTANCE of _core/eager.py");
    check::running(running->mean, running->var, running->num_batches_tracked,
                   std::isnan(running->momentum), g.c);
  });
  const Tensor y = result_of(call, false);
  const int64_t count = g.num_statistics();
  const Tensor record = form.saves() ? Record::of(g) : Tensor();
  Room<double> unsaved;
  double* const mean = form.saves() ? doubles(record) : unsaved.of(2 * count);
  if (form.saves()) Record::close(mean, g, eps, form);
  forward_into(call, &y, mean, mean + count, false);
  if (running)
    move(*running, {mean, mean + count, count / g.c, nullptr, double(g.values_per_statistic())});
  return {y, record};
}

std::tuple<Tensor, Tensor> forward(const Tensor& x, Maybe weight, Maybe bias, int64_t form,
                                   double eps) {
  return normalize(x, weight, bias, {form}, eps, nullptr);
}

std::tuple<Tensor, Tensor> forward_running(const Tensor& x, Maybe weight, Maybe bias,
                                           const Tensor& running_mean, const Tensor& running_var,
                                           Maybe num_batches_tracked, double momentum, int64_t form,
                                           double eps) {
  const Running running{running_mean, running_var, given(num_batches_tracked), momentum};
  return normalize(x, weight, bias, {form}, eps, &running);
}

std::tuple<Tensor, Tensor> apply(const Tensor& x, Maybe weight, Maybe bias, const Tensor& mean,
                                 const Tensor& var, int64_t bits, double eps) {
  const Form form{bits};
  Call call{.x = x,
            .axes = {},
            .eps = eps,
            .weight = given(weight),
            .bias = given(bias),
            .mean = &mean,
            .var = &var};
  const Geometry& g = call.g;
  in_order([&] {
    call.axes = axes_of(x, form);
    expect(call.axes.num_groups == 0 && form.feature_dims() == 0,
           "`form` must be one value per channel where the statistics are given: BATCH of "
           "_core/eager.py");
    call.read();
  });
  const Tensor y = result_of(call, false);
  if (!form.saves()) {
    apply_into(call, y);
    return {y, Tensor()};
  }
  // running statistics change in place at the next training step: keep today's values
  const Tensor record = Record::of(g);
  double* const values = doubles(record);
  const Values<double> m(mean), v(var);
  std::copy_n(m.get(), g.c, values);
  std::copy_n(v.get(), g.c, values + g.c);
  Record::close(values, g, eps, form);
  forward_into(call, &y, values, values + g.c, true);
  return {y, record};
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad, const Tensor& x,
                                            const Tensor& record, Maybe weight) {
  Call call{.x = x, .axes = {}, .weight = given(weight), .grad = &grad};
  in_order([&] {
    const Form kept = Record::form(record);
    call.axes = axes_of(x, kept);
    call.constant = kept.fixed();
    call.read();
    Record::expect_of(record, call.g);
    call.needs = kept.bits & (kInput | kWeight | kBias);
  });
  const double* const mean = doubles(record);
  call.eps = mean[Record::size(call.g) - 2];
  const Gradients made(call);
  backward_into(call, mean, mean + call.g.num_statistics(), made);
  const auto found = [](const Maybe& t) { return t ? *t : Tensor(); };
  return {found(made.x), found(made.weight), found(made.bias)};
}

}  // namespace
}  // namespace truenorm

STABLE_TORCH_LIBRARY_IMPL(truenorm, CPU, m) {
  m.impl("eager_forward", TORCH_BOX(&truenorm::forward));
  m.impl("eager_forward_running", TORCH_BOX(&truenorm::forward_running));
  m.impl("eager_apply", TORCH_BOX(&truenorm::apply));
  m.impl("eager_backward", TORCH_BOX(&truenorm::backward));
}
