// The operators of an eager call on a CPU: all of a layer's step in one call of the dispatcher,
// which is most of a small input's time. They take only what is in order, and refuse the rest
// before anything is changed; _core/eager.py then goes the long way, where errors are worded.
#include "eager.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>
#include <utility>

#include "running.h"

namespace truenorm {
namespace {

// Given statistics that are not constant are the running ones, which move towards x's own.
std::tuple<Tensor, Tensor> norm_more(const Tensor& x, Maybe weight, Maybe bias, int64_t bits,
                                     double eps, Maybe mean, Maybe var, Maybe num_batches_tracked,
                                     double momentum, Maybe residual, double parameter) {
  const Form form{bits};
  const bool moves = mean && !form.constant();
  Call call{.x = x,
            .axes = {},
            .eps = eps,
            .weight = given(weight),
            .bias = given(bias),
            .residual = given(residual),
            .mean = moves ? nullptr : given(mean),
            .var = moves ? nullptr : given(var),
            .act = form.activation(parameter),
            .rounds = form.steps(),
            .one_plus = form.one_plus()};
  const Geometry& g = call.g;
  in_order([&] {
    call.axes = axes_of(x, form);
    call.read();
    if (!mean != !var)
      check::one_of_two(mean ? "running_mean" : "running_var",
                        mean ? "running_var" : "running_mean");
    expect(mean || !form.constant(),
           "`form` is CONSTANT, and `running_mean` is None: pass the statistics");
    if (!mean) return;
    expect(g.num_statistics() % g.c == 0 && form.feature_dims() == 0 &&
               (form.constant() ? g.over_batch() : g.over_batch() || g.groups() == g.c),
           "`form` must be one value per channel, or with running statistics that move one per "
           "sample and channel, where statistics are given: 0, or PER_CHANNEL");
    if (moves) check::running(*mean, *var, given(num_batches_tracked), std::isnan(momentum), g.c);
  });
  const Tensor y = result_of(call, false);
  if (form.constant() && !form.wants_gradient()) {
    apply_into(call, y);
    return {y, Tensor()};
  }
  const int64_t count = g.num_statistics();
  const Tensor record = form.wants_gradient() ? Kept{form, eps, parameter}.record(g) : Tensor();
  Room<double> unsaved;
  double* const values = form.wants_gradient() ? doubles(record) : unsaved.of(2 * count);
  if (form.constant()) {
    // running statistics change in place at the next training step: keep today's values
    const Values<double> of_mean(call.mean), of_var(call.var);
    std::copy_n(of_mean.get(), count, values);
    std::copy_n(of_var.get(), count, values + count);
  }
  forward_into(call, &y, values, values + count, form.constant());
  if (moves)
    move({*mean, *var, given(num_batches_tracked), momentum},
         {values, values + count, count / g.c, nullptr, double(g.values_per_statistic())});
  return {y, record};
}

// The same with few arguments, each of which takes time.
std::tuple<Tensor, Tensor> norm(const Tensor& x, Maybe weight, Maybe bias, int64_t form,
                                double eps) {
  return norm_more(x, std::move(weight), std::move(bias), form, eps, std::nullopt, std::nullopt,
                   std::nullopt, 0.0, std::nullopt, 0.0);
}

std::tuple<Tensor, Tensor> norm_given(const Tensor& x, Maybe weight, Maybe bias, int64_t form,
                                      double eps, const Tensor& mean, const Tensor& var) {
  return norm_more(x, std::move(weight), std::move(bias), form, eps, mean, var, std::nullopt, 0.0,
                   std::nullopt, 0.0);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> norm_backward(const Tensor& grad, const Tensor& x,
                                                         const Tensor& record, Maybe weight,
                                                         Maybe bias, Maybe residual) {
  Call call{.x = x,
            .axes = {},
            .weight = given(weight),
            .bias = given(bias),
            .residual = given(residual),
            .grad = &grad};
  in_order(
      [&] {
        const Kept kept = Kept::of(record);
        call.axes = axes_of(x, kept.form);
        call.eps = kept.eps;
        call.act = kept.form.activation(kept.parameter);
        call.needs = kept.form.needs();
        call.constant = kept.form.constant();
        call.rounds = kept.form.steps();
        call.one_plus = kept.form.one_plus();
        call.read();
        if (record.numel() != Kept::record_size(call.g))
          check::wrong_record(record, "of an x of this shape");
      },
      kRecorded);
  const double* const mean = doubles(record);
  const Gradients made(call);
  backward_into(call, mean, mean + call.g.num_statistics(), made);
  const auto found = [](const Maybe& t) { return t ? *t : Tensor(); };
  return {found(made.x), found(made.weight), found(made.bias), found(made.residual)};
}

// --- h = x + other, and y = norm(h) over trailing dimensions: both are given back

// Some rows at a time, so that what one pass writes the next finds in cache.
struct Blocks {
  const Geometry& g;
  int64_t rows, count;

  template <class T>
  Blocks(const Geometry& of, T)
      : g(of),
        rows(std::clamp<int64_t>(kInCache / (4 * of.c * int64_t(sizeof(T))), 1, of.n)),
        count(ceil_div(of.n, rows)) {}

  // body(block, its first row, its geometry)
  template <class Body>
  void each(const Body& body) const {
    const auto block = [&](int64_t i) {
      const Geometry some = samples_of(g, std::min(rows, g.n - i * rows));
      body(i, i * rows, some);
    };
    if (busy(count)) return parallel(count, rows * g.c, block);
    for (int64_t i = 0; i < count; ++i) block(i);
  }
};

std::tuple<Tensor, Tensor, Tensor> add_norm(const Tensor& x, const Tensor& other, Maybe weight,
                                            Maybe bias, int64_t bits, double eps) {
  const Form form{bits};
  Call call{.x = x,
            .axes = {},
            .eps = eps,
            .weight = given(weight),
            .bias = given(bias),
            .residual = &other};
  const Geometry& g = call.g;
  in_order([&] {
    call.axes = axes_of(x, form);
    call.read();
    expect(form.feature_dims() > 0 && form.num_groups() == 0 && g.c > 1 && !call.by_part &&
               form.act() == Act::none,
           "`form` must be one over trailing dimensions of more than one value, without groups or "
           "an activation");
    for (const Tensor* p : {call.weight, call.bias})
      expect(!p || p->scalar_type() != ScalarType::Double || x.element_size() == 8,
             "`weight` and `bias` must not be wider than float32 beside a narrower `x`");
  });
  const Tensor one = laid_out(x, g), two = laid_out(other, g);
  const Tensor y = new_result(g, x.scalar_type()), h = new_result(g, x.scalar_type());
  const Tensor record = form.wants_gradient() ? Kept{form, eps, 0.0}.record(g) : Tensor();
  Room<double> unsaved;
  double* const mean = form.wants_gradient() ? doubles(record) : unsaved.of(2 * g.n);
  with_type(x, [&]<class T>(T) {
    const Kernels<T>& use = table<T>(kernels());
    const Values<compute_t<T>> weights(call.weight, form.one_plus()), biases(call.bias);
    Blocks(g, T{}).each([&](int64_t, int64_t first, const Geometry& some) {
      const int64_t at = first * g.c;
      use.add(values_of<T>(one) + at, values_of<T>(two) + at, room_of<T>(h) + at, some.numel(),
              false);
      Forward<T> f{
          some,          use,          eps,          values_of<T>(h) + at, room_of<T>(y) + at,
          weights.get(), biases.get(), mean + first, mean + g.n + first,   false,
          streams<T>(g)};
      f.rounds = form.rounds();
      forward_rows(f);
    });
  });
  return {y, h, record};
}

// Gradients of x (and the same of other), weight and bias, from those of y and of h.
std::tuple<Tensor, Tensor, Tensor> add_norm_backward(const Tensor& grad, const Tensor& grad_h,
                                                     const Tensor& x, const Tensor& record,
                                                     Maybe weight) {
  Call call{.x = x, .axes = {}, .weight = given(weight), .grad = &grad};
  Form form{0};
  const Geometry& g = call.g;
  in_order(
      [&] {
        const Kept kept = Kept::of(record);
        form = kept.form;
        call.axes = axes_of(x, form);
        call.eps = kept.eps;
        call.needs = form.needs();
        call.one_plus = form.one_plus();
        call.read();
        check::gradient(grad_h, x, g);
        expect(form.feature_dims() > 0 && form.num_groups() == 0 && !call.by_part &&
                   (form.needs() & kInput),
               "`record` must be of a call over trailing dimensions whose input has a gradient");
        if (record.numel() != Kept::record_size(g))
          check::wrong_record(record, "of an x of this shape");
      },
      kRecorded);
  const Gradients made(call);
  const Tensor of_y = laid_out_like(x, grad, g), of_h = laid_out_like(x, grad_h, g);
  const Tensor h = laid_out(x, g);
  const double* const mean = doubles(record);
  const bool params = made.weight || made.bias;
  with_type(x, [&]<class T>(T) {
    const Kernels<T>& use = table<T>(kernels());
    const bool stream = streams<T>(g);
    const Values<compute_t<T>> weights(call.weight, form.one_plus());
    T* const to = room_of<T>(*made.x);
    const Blocks blocks(g, T{});
    const auto sums = scratch<GradSums>(params ? blocks.count * g.c : 0);
    blocks.each([&](int64_t i, int64_t first, const Geometry& some) {
      const int64_t at = first * g.c;
      Backward<T> b{
          some,    use,           call.eps,     values_of<T>(of_y) + at, values_of<T>(h) + at,
          to + at, weights.get(), mean + first, mean + g.n + first,      false,
          false};
      b.sums = params ? sums.get() + i * g.c : nullptr;
      b.of_bias = made.bias.has_value();
      backward_rows(b);
      use.add(to + at, values_of<T>(of_h) + at, to + at, some.numel(), stream);
      fence(stream);
    });
    if (!params) return;
    Room<double> room;
    double* const totals = room.of(2 * g.c);
    for (int64_t c = 0; c < g.c; ++c) {
      GradSums total;
      for (int64_t i = 0; i < blocks.count; ++i) total.add(sums[i * g.c + c]);
      totals[c] = total.grad_x_hat;
      totals[g.c + c] = total.grad;
    }
    if (made.weight) store(totals, *made.weight);
    if (made.bias) store(totals + g.c, *made.bias);
  });
  const auto found = [](const Maybe& t) { return t ? *t : Tensor(); };
  return {*made.x, found(made.weight), found(made.bias)};
}

}  // namespace
}  // namespace truenorm

STABLE_TORCH_LIBRARY_IMPL(truenorm, CPU, m) {
  m.impl("eager_norm", TORCH_BOX(&truenorm::norm));
  m.impl("eager_norm_given", TORCH_BOX(&truenorm::norm_given));
  m.impl("eager_norm_more", TORCH_BOX(&truenorm::norm_more));
  m.impl("eager_norm_backward", TORCH_BOX(&truenorm::norm_backward));
  m.impl("eager_add_norm", TORCH_BOX(&truenorm::add_norm));
  m.impl("eager_add_norm_backward", TORCH_BOX(&truenorm::add_norm_backward));
}
