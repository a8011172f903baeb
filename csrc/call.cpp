// From a Call to the drivers: the arguments' checks, their memory, and the sums of the parameters.
#include "call.h"

#include "masked.h"
#include "pool.h"

namespace truenorm {
namespace {

template <class T>
const T* values(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

template <class T>
const T* values(const Maybe& t) {
  return t ? values<T>(*t) : nullptr;
}

template <class T>
T* target(const Tensor* t) {
  return t ? static_cast<T*>(t->mutable_data_ptr()) : nullptr;
}

// Half precision takes its parameters in float, which holds all but float64's: with those, x is
// computed in float64.
bool needs_double(const Call& c) {
  const auto is_double = [](const Tensor* p) {
    return p && p->scalar_type() == ScalarType::Double;
  };
  return c.x.element_size() == 2 && (is_double(c.weight) || is_double(c.bias));
}

// Gradients of weight and bias: shaped like the channels of x, in weight's dtype, or where there is
// none in the one that x is computed in. _core/operators.py states the same rule.
ScalarType param_type_of(const Call& c) {
  if (c.weight) return c.weight->scalar_type();
  return c.x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}
Tensor param_gradient(const Call& c, ScalarType type) {
  const Geometry& g = c.g;
  const Dims sizes = c.axes.feature_dims > 0
                         ? Dims(g.sizes.end() - c.axes.feature_dims, g.sizes.end())
                         : Dims(&g.c, &g.c + 1);
  return empty_strided(sizes, contiguous_strides(sizes), type);
}

const bool* flags(const Call& c) { return c.mask ? values<bool>(*c.mask) : nullptr; }
const bool* rows_of(const Call& c) { return c.by_row() ? flags(c) : nullptr; }

// In memory [N, S, C] batch statistics see the samples as one.
std::optional<Valid> valid_of(const Call& c) {
  const Geometry& g = c.g;
  if (!c.mask || c.by_row()) return std::nullopt;
  const bool channels = g.memory == Memory::channels, one = channels && g.over_batch();
  return std::optional<Valid>(std::in_place, flags(c), one ? 1 : g.n, one ? g.n * g.s : g.s,
                              channels);
}

template <class T>
T element(double value) {
  T narrow;
  table<T>(kernels()).narrow(&value, &narrow, 1);
  return narrow;
}

Tensor widened(const Tensor& t, const Geometry& g) {
  Tensor wide = empty_strided(g.sizes, g.strides, ScalarType::Double);
  torch::stable::copy_(wide, t);
  return wide;
}

template <class T>
void run(const Forward<T>& f) {
  const bool rows = f.geometry.memory == Memory::rows;
  if (f.valid)
    rows ? masked_forward_rows(f) : masked_forward_channels(f);
  else
    rows ? forward_rows(f) : forward_channels(f);
}

template <class T>
void run(const Backward<T>& b) {
  const bool rows = b.geometry.memory == Memory::rows;
  if (b.valid)
    rows ? masked_backward_rows(b) : masked_backward_channels(b);
  else
    rows ? backward_rows(b) : backward_channels(b);
}

void forward_as(const Call& c, const Tensor& x, const Maybe& residual, const Tensor* y,
                double* mean, double* var, bool fixed) {
  const std::optional<Valid> valid = valid_of(c);
  with_type(x, [&]<class T>(T) {
    const Values<compute_t<T>> weight(c.weight, c.one_plus), bias(c.bias);
    run(Forward<T>{c.g, table<T>(kernels()), c.eps, values<T>(x), target<T>(y), weight.get(),
                   bias.get(), mean, var, fixed, !valid && streams<T>(c.g), values<T>(residual),
                   c.act, valid ? &*valid : nullptr, rows_of(c), element<T>(c.padding), c.rounds});
  });
}

// The gradient of norm(x) + residual goes to the residual's gradient, else to where grad_x will be,
// unless that is not written, or written before the last pass over it.
Tensor inner_of(const Call& c, const Gradients& made, bool alone) {
  if (made.residual) return *made.residual;
  if (made.x && !alone && !c.by_row()) return *made.x;
  return new_result(c.g, c.x.scalar_type());
}

void backward_as(const Call& c, const double* mean, const double* var, const Maybe& grad_x,
                 const Maybe& inner, GradSums* sums, bool each_sample) {
  const Geometry& g = c.g;
  const std::optional<Valid> valid = valid_of(c);
  const Tensor x = laid_out(c.x, g), grad = laid_out_like(c.x, *c.grad, g);
  Maybe residual;
  if (c.residual) residual = laid_out(*c.residual, g);
  const Values<double> means(c.sums);
  const double* const of_x_hat = means.get();
  with_type(x, [&]<class T>(T) {
    const Values<compute_t<T>> weight(c.weight, c.one_plus), bias(c.bias);
    run(Backward<T>{g,
                    table<T>(kernels()),
                    c.eps,
                    values<T>(grad),
                    values<T>(x),
                    target<T>(given(grad_x)),
                    weight.get(),
                    mean,
                    var,
                    c.constant,
                    streams<T>(g),
                    sums,
                    each_sample,
                    of_x_hat ? of_x_hat + g.num_statistics() : nullptr,
                    of_x_hat,
                    target<T>(given(inner)),
                    bias.get(),
                    values<T>(residual),
                    c.act,
                    valid ? &*valid : nullptr,
                    rows_of(c),
                    c.rounds});
  });
}

}  // namespace

const Call& Call::read(bool of_values, bool over) {
  g = geometry_of(x, axes);
  if (of_values) check::has_values("norm", x, g);
  if (over) check::written("x", x);
  if (grad) check::gradient(*grad, x, g);
  if (mask) check::mask(*mask, x, g);
  if (mean || var) check::given(mean, var);
  if (mean) check::statistic("mean", *mean, x, g);
  if (var) check::statistic("var", *var, x, g);
  check::parameter("weight", weight, x, g, axes.feature_dims);
  check::parameter("bias", bias, x, g, axes.feature_dims);
  check::needs(needs, 31);
  check::activation(int64_t(act.kind));
  check::residual(residual, x, g);
  if (rounds && needs_double(*this)) check::rounds_wide();
  act.by_output = needs & kByOutput;
  check::holds_output(act.by_output, residual);
  if (sums) check::sums(*sums, x, g);
  return *this;
}

Tensor result_of(const Call& call, bool over) {
  return over && call.g.dense ? call.x : new_result(call.g, call.x.scalar_type());
}

void close(const Call& call, const Tensor& y, bool over) {
  if (!over || call.g.dense) return;
  Tensor to = call.x;
  torch::stable::copy_(to, y);
}

void forward_into(const Call& c, const Tensor* y, double* mean, double* var, bool fixed) {
  Maybe residual;
  if (y && needs_double(c)) {
    if (c.residual) residual = widened(*c.residual, c.g);
    const Tensor result = empty_strided(c.g.sizes, c.g.strides, ScalarType::Double);
    forward_as(c, widened(c.x, c.g), residual, &result, mean, var, fixed);
    Tensor rounded = *y;
    torch::stable::copy_(rounded, result);
    return;
  }
  if (c.residual) residual = laid_out(*c.residual, c.g);
  forward_as(c, laid_out(c.x, c.g), residual, y, mean, var, fixed);
}

void apply_into(const Call& c, const Tensor& y) {
  if (c.g.numel() == 0) return;
  const Values<double> mean(c.mean), var(c.var);
  forward_into(c, &y, const_cast<double*>(mean.get()), const_cast<double*>(var.get()), true);
}

void count_into(const Call& c, double* count) {
  const Geometry& g = c.g;
  const int64_t statistics = g.num_statistics();
  if (!c.mask) {
    std::fill_n(count, statistics, double(g.numel() > 0 ? g.values_per_statistic() : 0));
    return;
  }
  const bool* const mask = flags(c);
  const auto valid = [&](int64_t from, int64_t some) {
    return double(std::count(mask + from, mask + from + some, true));
  };
  if (g.over_batch()) {
    std::fill_n(count, statistics, valid(0, g.n * g.s));
    return;
  }
  for (int64_t n = 0; n < g.n; ++n)
    std::fill_n(count + n * g.groups(), g.groups(),
                double(g.channels_per_group()) * valid(n * g.s, g.s));
}

Gradients::Gradients(const Call& c) : type(c.x.scalar_type()), param_type(param_type_of(c)) {
  if (c.needs & kInput) x = new_result(c.g, type);
  if (c.needs & kWeight) weight = param_gradient(c, param_type);
  if (c.needs & kBias) bias = param_gradient(c, param_type);
  if (c.needs & kResidual) residual = new_result(c.g, type);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> Gradients::all() const {
  return {x ? *x : empty(0, type), weight ? *weight : empty(0, param_type),
          bias ? *bias : empty(0, param_type), residual ? *residual : empty(0, type)};
}

void backward_into(const Call& c, const double* mean, const double* var, const Gradients& made) {
  const Geometry& g = c.g;
  const auto zero = [](const Maybe& t) {
    if (!t) return;
    Tensor to = *t;
    torch::stable::zero_(to);
  };
  if (g.numel() == 0) return zero(made.weight), zero(made.bias);
  // one value is its own mean: its gradient is zero, not the rounding of what cancels
  const bool alone = g.values_per_statistic() == 1 && g.centred && !c.constant && !c.sums;
  if (alone) zero(made.x);
  Maybe inner;
  if (c.acts()) inner = inner_of(c, made, alone);
  const bool params = made.weight || made.bias;
  // by element the drivers add the samples up themselves
  const int64_t samples = g.over_batch() || g.s == 1 ? 1 : g.n;
  Room<GradSums> room;
  GradSums* const sums = params ? room.of(samples * g.c) : nullptr;
  backward_as(c, mean, var, alone ? Maybe() : made.x, inner, sums, false);
  if (!params) return;
  Room<double> totals;
  double* const of_weight = totals.of(2 * g.c);
  parallel(g.c, samples, [&](int64_t k) {
    GradSums total;
    for (int64_t n = 0; n < samples; ++n) total.add(sums[n * g.c + k]);
    of_weight[k] = total.grad_x_hat;
    of_weight[g.c + k] = total.grad;
  });
  if (made.weight) store(of_weight, *made.weight);
  if (made.bias) store(of_weight + g.c, *made.bias);
}

Tensor gradient_sums(const Call& c, const double* mean, const double* var) {
  const Geometry& g = c.g;
  const int64_t count = g.over_batch() ? g.c : g.n * g.c, shape[] = {2, count};
  const Dims sizes(shape, shape + 2);
  Tensor found = empty_strided(sizes, contiguous_strides(sizes), ScalarType::Double);
  if (g.numel() == 0) {
    torch::stable::zero_(found);
    return found;
  }
  const auto sums = scratch<GradSums>(count);
  Maybe inner;
  if (c.acts()) inner = new_result(g, c.x.scalar_type());
  backward_as(c, mean, var, std::nullopt, inner, sums.get(), !g.over_batch());
  double* const to = doubles(found);
  for (int64_t i = 0; i < count; ++i) {
    to[i] = sums[i].grad_x_hat;
    to[count + i] = sums[i].grad;
  }
  return found;
}

}  // namespace truenorm
