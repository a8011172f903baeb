// From a Call to the drivers: the arguments' checks, their memory, and the sums of the parameters.
#include "call.h"

#include "masked.h"
#include "pool.h"
#include "turned.h"

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

// Whether the leading dimensions lie in memory as they are counted.
bool in_order(const Geometry& g, int64_t feature_dims) {
  int64_t next = g.c;
  for (int64_t d = g.sizes.size() - feature_dims; d-- > 0;) {
    if (g.sizes[d] != 1 && g.strides[d] != next) return false;
    next *= g.sizes[d];
  }
  return true;
}

// Gradients of weight and bias: shaped like weight, or the channels of x, in weight's dtype, or
// where there is none in the one that x is computed in. _core/operators.py states the same rule.
ScalarType param_type_of(const Call& c) {
  if (c.weight) return c.weight->scalar_type();
  return c.x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}
Tensor param_gradient(const Call& c, ScalarType type) {
  const Geometry& g = c.g;
  if (c.by_part) {
    const auto sizes = c.weight->sizes();
    const Dims of_parts(sizes.begin(), sizes.end());
    return empty_strided(of_parts, contiguous_strides(of_parts), type);
  }
  const Dims sizes = c.axes.feature_dims > 0
                         ? Dims(g.sizes.end() - c.axes.feature_dims, g.sizes.end())
                         : Dims(&g.c, &g.c + 1);
  return empty_strided(sizes, contiguous_strides(sizes), type);
}

const bool* flags(const Call& c) { return c.mask ? values<bool>(*c.mask) : nullptr; }
const bool* rows_of(const Call& c) { return c.by_row() ? flags(c) : nullptr; }

// Of the samples from `first` on. In memory [N, S, C] batch statistics see them as one.
std::optional<Valid> valid_of(const Call& c, const Geometry& g, int64_t first = 0) {
  if (!c.mask || c.by_row()) return std::nullopt;
  const bool channels = g.memory == Memory::channels, one = channels && g.over_batch();
  return std::optional<Valid>(std::in_place, flags(c) + first * g.s, one ? 1 : g.n,
                              one ? g.n * g.s : g.s, channels);
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

bool are_columns(const Geometry& g) {
  return has_short_runs(g) && g.s > 1 && g.c > 1 && !gathers(g);
}

template <class T>
void run(const Forward<T>& f) {
  const bool rows = f.geometry.memory == Memory::rows;
  if (f.valid)
    rows ? masked_forward_rows(f) : masked_forward_channels(f);
  else
    rows && !are_columns(f.geometry) ? forward_rows(f) : forward_channels(f);
}

template <class T>
void run(const Backward<T>& b) {
  const bool rows = b.geometry.memory == Memory::rows;
  if (b.valid)
    rows ? masked_backward_rows(b) : masked_backward_channels(b);
  else
    rows && !are_columns(b.geometry) ? backward_rows(b) : backward_channels(b);
}

// body(part, its geometry, its mask) for every part: side by side where they are enough to keep all
// threads busy, else one after the other.
template <class Body>
void by_part(const Call& c, const Body& body) {
  const Geometry of = samples_of(c.g, c.g.n / c.parts);
  const auto one = [&](int64_t k) {
    const std::optional<Valid> valid = valid_of(c, of, k * of.n);
    body(k, of, valid ? &*valid : nullptr);
  };
  if (busy(c.parts)) return parallel(c.parts, of.numel(), one);
  for (int64_t k = 0; k < c.parts; ++k) one(k);
}

// Where the parts share statistics, these are there before the first y.
template <class T>
void run_parts(const Call& c, const Forward<T>& f) {
  const bool fixed = f.fixed || f.geometry.over_batch();
  if (fixed && !f.fixed) {
    Forward<T> all = f;
    all.y = nullptr;
    run(all);
  }
  if (!f.y) return;
  by_part(c, [&](int64_t k, const Geometry& of, const Valid* valid) {
    Forward<T> part = f.part(k, of, valid);
    part.fixed = fixed;
    run(part);
  });
}

// Where the parts share statistics, and so the means of their gradients, the sums come first.
template <class T>
void run_parts(const Call& c, const Backward<T>& b) {
  const int64_t channels = b.geometry.c;
  const auto each = [&](const Backward<T>& all) {
    by_part(c, [&](int64_t k, const Geometry& of, const Valid* valid) {
      run(all.part(k, of, valid, c.sums_of_part()));
    });
  };
  if (!b.geometry.over_batch() || !b.by_sums()) return each(b);
  Backward<T> summing = b, writing = b;
  const auto own = scratch<GradSums>(b.sums ? 0 : c.parts * channels);
  summing.sums = b.sums ? b.sums : own.get();
  summing.grad_x = nullptr;
  each(summing);
  const auto means = scratch<double>(3 * channels);
  double* const count = means.get() + 2 * channels;
  count_into(c, count);
  for (int64_t i = 0; i < channels; ++i) {
    GradSums total;
    for (int64_t at = i; at < c.parts * channels; at += channels) {
      const double weight = b.weight_of(at);
      total.add({weight * summing.sums[at].grad, weight * summing.sums[at].grad_x_hat});
    }
    const double values = std::max(count[i], 1.0);
    means[i] = total.grad / values;
    means[channels + i] = total.grad_x_hat / values;
  }
  writing.sums = nullptr;
  writing.mean_grad = means.get();
  writing.mean_grad_x_hat = means.get() + channels;
  each(writing);
}

template <class Of>
void run_call(const Call& c, const Of& of) {
  c.parts > 1 ? run_parts(c, of) : run(of);
}

// A tensor of x's shape, as a driver takes it.
struct Arranged {
  Tensor t;
  bool turned = false;
};

int64_t positions_of(const Call& c, const Tensor& t) {
  return turned_positions(c.g.sizes, t.strides().data(), c.axes.feature_dims);
}

Arranged arranged(const Call& c, const Tensor& t) {
  if (c.positions == 0) return {laid_out(t, c.g)};
  if (positions_of(c, t) == c.positions) return {t, true};
  return {t.is_contiguous() ? t : torch::stable::contiguous(t)};
}

// of the result
bool lies_turned(const Call& c) { return c.axes.as_given && c.g.dense && !c.x.is_contiguous(); }

void forward_as(const Call& c, const Tensor& given, const Maybe& residual, const Tensor* y,
                double* mean, double* var, bool fixed) {
  const std::optional<Valid> valid = valid_of(c, c.g);
  const Arranged x = arranged(c, given);
  with_type(x.t, [&]<class T>(T) {
    const Values<compute_t<T>> weight(c.weight, c.one_plus), bias(c.bias);
    const Forward<T> f{c.g,
                       table<T>(kernels()),
                       c.eps,
                       values<T>(x.t),
                       target<T>(y),
                       weight.get(),
                       bias.get(),
                       mean,
                       var,
                       fixed,
                       !valid && streams<T>(c.g),
                       values<T>(residual),
                       c.act,
                       valid ? &*valid : nullptr,
                       rows_of(c),
                       element<T>(c.padding),
                       c.rounds};
    if (c.positions == 0) return run_call(c, f);
    forward_turned(f, {c.positions, x.turned, false, lies_turned(c)});
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
  const std::optional<Valid> valid = valid_of(c, g);
  const ScalarType type = c.x.scalar_type();
  const Arranged x = arranged(c, c.x);
  const Arranged grad =
      arranged(c, c.grad->scalar_type() == type ? *c.grad : torch::stable::to(*c.grad, type));
  Maybe residual;
  if (c.residual) residual = laid_out(*c.residual, g);
  const Values<double> means(c.sums);
  const double* const of_x_hat = means.get();
  with_type(x.t, [&]<class T>(T) {
    const Values<compute_t<T>> weight(c.weight, c.one_plus), bias(c.bias);
    const Backward<T> b{g,
                        table<T>(kernels()),
                        c.eps,
                        values<T>(grad.t),
                        values<T>(x.t),
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
                        c.rounds,
                        (c.needs & kBias) != 0};
    if (c.positions == 0) return run_call(c, b);
    backward_turned(b, {c.positions, x.turned, grad.turned, lies_turned(c)});
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
  by_part = weight && weight->dim() == std::max<int64_t>(axes.feature_dims, 1) + 1;
  check::parameter("weight", weight, x, g, axes.feature_dims, by_part);
  check::parameter("bias", bias, x, g, axes.feature_dims, by_part);
  if (by_part) {
    parts = std::max<int64_t>(weight->size(0), 1);
    check::as_many_parts(parts, bias);
    // the parts follow one another
    if (axes.feature_dims > 0 && !in_order(g, axes.feature_dims)) {
      g.dense = false;
      g.strides = contiguous_strides(g.sizes);
    }
  }
  if (axes.as_given && (acts() || by_part)) check::as_given_with_more();
  const bool alone = !residual && act.kind == Act::none && (!mask || axes.as_given);
  if (axes.feature_dims > 0 && axes.num_groups == 1 && !by_part && alone) {
    positions = positions_of(*this, x);
    if (grad && positions == 0 && x.is_contiguous()) positions = positions_of(*this, *grad);
  }
  check::needs(needs, 31);
  check::activation(int64_t(act.kind));
  check::residual(residual, x, g);
  if ((rounds || act.rounds) && needs_double(*this)) check::rounds_wide();
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
  forward_as(c, c.x, residual, y, mean, var, fixed);
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
  if (c.positions > 0 && made.residual) {
    // y being a sum of which it is a term
    Tensor to = *made.residual;
    torch::stable::copy_(to, *c.grad);
  } else if (c.acts()) {
    inner = inner_of(c, made, alone);
  }
  const bool params = made.weight || made.bias;
  // by element the drivers add the samples up themselves
  const int64_t of_part = c.sums_of_part(), samples = of_part / g.c, count = c.parts * g.c;
  Room<GradSums> room;
  GradSums* const sums = params ? room.of(c.parts * of_part) : nullptr;
  backward_as(c, mean, var, alone ? Maybe() : made.x, inner, sums, false);
  if (!params) return;
  Room<double> totals;
  double* const of_weight = totals.of(2 * count);
  parallel(count, samples, [&](int64_t k) {
    const GradSums* const from = sums + k / g.c * of_part + k % g.c;
    GradSums total;
    for (int64_t n = 0; n < samples; ++n) total.add(from[n * g.c]);
    of_weight[k] = total.grad_x_hat;
    of_weight[count + k] = total.grad;
  });
  if (made.weight) store(of_weight, *made.weight);
  if (made.bias) store(of_weight + count, *made.bias);
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
