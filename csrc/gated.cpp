// RMSNorm beside a gate, forward and backward, some rows at a time while these are in cache:
// norm(x · act(gate)) · weight, or norm(x) · weight · act(gate), over the groups of each row.
// What is normalized is in the type that is computed in, as those who wrote such norms have it.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <memory>
#include <tuple>

#include "eager.h"

namespace truenorm {
namespace {

// Where the gate comes in and what is rounded, in one integer; _core/call.py has the same bits.
struct Order {
  int64_t bits;

  bool before() const { return bits & 1; }  // the norm; else after it
  bool swish() const { return bits & 2; }
  GateRounding rounds() const { return {(bits & 4) != 0, (bits & 8) != 0}; }
};

// Rows of the last dimension, which may lie apart.
template <class T>
struct Lines {
  Tensor held;
  const T* first;
  int64_t apart;

  explicit Lines(const Tensor& t)
      : held(steps_of(t) > 0 ? t : torch::stable::contiguous(t)),
        first(static_cast<const T*>(held.const_data_ptr())),
        apart(steps_of(held)) {}

  // How far apart rows are, where all are as far from the next; else 0.
  static int64_t steps_of(const Tensor& t) {
    const auto sizes = t.sizes(), strides = t.strides();
    int64_t d = t.dim() - 1, apart = 0, next = 0;
    const int64_t len = sizes[d];
    if (len != 1 && strides[d] != 1) return 0;
    while (d-- > 0) {
      if (sizes[d] == 1) continue;
      if (strides[d] < len || (apart != 0 && strides[d] != next)) return 0;
      if (apart == 0) apart = strides[d];
      next = strides[d] * sizes[d];
    }
    return apart == 0 ? len : apart;
  }
  const T* row(int64_t i) const { return first + i * apart; }
  bool dense(int64_t len) const { return apart == len; }
};

// Rows that are served together: how many depends on their length alone, for the sums of weight's
// gradient go from block to block.
struct RowBlocks {
  const Geometry& g;
  int64_t rows, count;

  explicit RowBlocks(const Geometry& of)
      : g(of),
        rows(std::clamp<int64_t>(kTogether / of.c, std::min<int64_t>(kRowsTogether, of.n), of.n)),
        count(ceil_div(of.n, rows)) {}

  // body(block, its first row, its geometry)
  template <class Body>
  void each(const Body& body) const {
    parallel(count, rows * g.c,
             [&](int64_t i) { body(i, i * rows, samples_of(g, std::min(rows, g.n - i * rows))); });
  }

 private:
  static constexpr int64_t kTogether = int64_t{1} << 16;  // values
};

// A block's rows in the type that is computed in, times act(gate) where there are gates: as they
// lie where they lie so, else made in `room`; slopes: the same rows times act'(gate), or null.
template <class T>
const compute_t<T>* widened(const Lines<T>& from, const Lines<T>* gates, int64_t first,
                            const Geometry& some, bool swish, std::unique_ptr<compute_t<T>[]>& room,
                            compute_t<T>* slopes = nullptr) {
  using A = compute_t<T>;
  if constexpr (std::is_same_v<T, A>)
    if (!gates && from.dense(some.c)) return from.row(first);
  room = scratch<A>(some.numel());
  for (int64_t r = 0; r < some.n; ++r)
    table<T>(kernels()).gate(from.row(first + r), gates ? gates->row(first + r) : nullptr,
                             room.get() + r * some.c, past(slopes, r * some.c), some.c, swish);
  return room.get();
}

Tensor rows_like(const Tensor& x, const Geometry& g) {
  return empty_strided(g.sizes, contiguous_strides(g.sizes), x.scalar_type());
}

void read(Call& call, const Tensor& gate, Form form, Order order) {
  call.axes = axes_of(call.x, form);
  call.read();
  expect(order.bits >= 0 && order.bits < 16, "`order` must be from 0 to 15: see _core/call.py");
  const bool plain = form.feature_dims() == 1 && !form.centred() && !form.constant() &&
                     !form.one_plus() && !form.rounds() && !form.as_given() &&
                     form.act() == Act::none;
  expect(plain, "`form` must be groups of the last dimension, UNCENTRED, and nothing else");
  expect(!call.by_part, "`weight` must have one value for each of a row's values");
  const auto sizes = gate.sizes();
  expect(check::type_of(gate) == call.x.scalar_type() && gate.dim() == call.x.dim() &&
             std::equal(sizes.begin(), sizes.end(), call.g.sizes.begin()),
         "`gate` must have the shape and the dtype of `x`");
  check::memory("gate", gate);
}

std::tuple<Tensor, Tensor> gated_norm(const Tensor& x, const Tensor& gate, Maybe weight,
                                      int64_t bits, double eps, int64_t order_bits) {
  const Form form{bits};
  const Order order{order_bits};
  Call call{.x = x, .axes = {}, .eps = eps, .weight = given(weight)};
  in_order([&] { read(call, gate, form, order); });
  const Tensor y = rows_like(x, call.g);
  const Geometry g = samples_of(call.g, call.g.n);
  const Tensor record =
      form.wants_gradient() ? Kept{form, eps, double(order_bits)}.record(g) : Tensor();
  const int64_t count = g.num_statistics();
  Room<double> unsaved;
  double* const mean = form.wants_gradient() ? doubles(record) : unsaved.of(2 * count);
  with_type(x, [&]<class T>(T) {
    using A = compute_t<T>;
    constexpr bool wide = std::is_same_v<T, A>;
    const Values<A> weights(call.weight);
    const Lines<T> values(x), gates(gate);
    const GateRounding rounds = order.rounds();
    // where x̂ is rounded, the product is the gate's kernel's
    const bool later = is_half<T> && rounds.x_hat;
    RowBlocks(g).each([&](int64_t, int64_t first, const Geometry& some) {
      std::unique_ptr<A[]> room, made;
      const A* const from =
          widened(values, order.before() ? &gates : nullptr, first, some, order.swish(), room);
      T* const to = room_of<T>(y) + first * g.c;
      A* normed;
      if constexpr (wide) {
        normed = to;
      } else {
        made = scratch<A>(some.numel());
        normed = made.get();
      }
      const int64_t at = first * g.groups();
      forward_rows(Forward<A>{some, table<A>(kernels()), eps, from, normed,
                              later ? nullptr : weights.get(), nullptr, mean + at,
                              mean + count + at, false, false});
      if (wide && order.before()) return;
      for (int64_t r = 0; r < some.n; ++r)
        table<T>(kernels()).gated(normed + r * g.c, later ? weights.get() : nullptr,
                                  order.before() ? nullptr : gates.row(first + r), to + r * g.c,
                                  g.c, order.swish(), rounds);
    });
  });
  return {y, record};
}

// Gradients of x, gate and weight.
std::tuple<Tensor, Tensor, Tensor> gated_norm_backward(const Tensor& grad, const Tensor& x,
                                                       const Tensor& gate, const Tensor& record,
                                                       Maybe weight) {
  Call call{.x = x, .axes = {}, .weight = given(weight), .grad = &grad};
  Form form{0};
  Order order{0};
  in_order(
      [&] {
        const Kept kept = Kept::of(record);
        form = kept.form;
        const bool known = kept.parameter >= 0.0 && kept.parameter < 16.0;
        if (!known) check::wrong_record(record, "as eager_gated_norm has made it");
        order = {int64_t(kept.parameter)};
        call.eps = kept.eps;
        read(call, gate, form, order);
        if (record.numel() != Kept::record_size(call.g))
          check::wrong_record(record, "of an x of this shape");
      },
      kRecorded);
  const bool inputs = form.needs() & kInput, params = weight && (form.needs() & kWeight);
  const Tensor of_x = inputs ? rows_like(x, call.g) : Tensor();
  const Tensor of_gate = inputs ? rows_like(x, call.g) : Tensor();
  const Geometry g = samples_of(call.g, call.g.n);
  const Tensor of_weight = params ? empty(g.c, weight->scalar_type()) : Tensor();
  const Tensor pulled =
      grad.scalar_type() == x.scalar_type() ? grad : torch::stable::to(grad, x.scalar_type());
  const bool before = order.before(), swish = order.swish();
  double* const mean = doubles(record);
  with_type(x, [&]<class T>(T) {
    using A = compute_t<T>;
    const Kernels<T>& use = table<T>(kernels());
    const Values<A> weights(call.weight);
    const Lines<T> values(x), gates(gate), grads(pulled);
    const RowBlocks blocks(g);
    const auto sums = scratch<GradSums>(params ? blocks.count * g.c : 0);
    blocks.each([&](int64_t block, int64_t first, const Geometry& some) {
      double* const of_mean = mean + first * g.groups();
      double* const of_var = of_mean + g.num_statistics();
      std::unique_ptr<A[]> rooms[2];
      const auto slopes = scratch<A>(before || !inputs ? 0 : some.numel());
      const A* const from =
          widened(values, before ? &gates : nullptr, first, some, swish, rooms[0]);
      const A* const of_normed = widened(grads, before ? nullptr : &gates, first, some, swish,
                                         rooms[1], before || !inputs ? nullptr : slopes.get());
      const auto of_from = scratch<A>(inputs ? some.numel() : 0);
      Backward<A> b{some,          table<A>(kernels()),
                    call.eps,      of_normed,
                    from,          inputs ? of_from.get() : nullptr,
                    weights.get(), of_mean,
                    of_var,        false,
                    false};
      b.sums = params ? sums.get() + block * g.c : nullptr;
      b.of_bias = false;
      backward_rows(b);
      if (!inputs) return;
      T *const to_x = room_of<T>(of_x) + first * g.c, *const to_gate =
                                                          room_of<T>(of_gate) + first * g.c;
      if (before) {
        for (int64_t r = 0; r < some.n; ++r)
          use.gate_grads(of_from.get() + r * g.c, values.row(first + r), gates.row(first + r),
                         to_x + r * g.c, to_gate + r * g.c, g.c, swish);
        return;
      }
      use.gated(of_from.get(), nullptr, nullptr, to_x, some.numel(), swish, {});
      // in the place of what is no longer needed
      A* const normed = of_from.get();
      forward_rows(Forward<A>{some, table<A>(kernels()), call.eps, from, normed, weights.get(),
                              nullptr, of_mean, of_var, true, false});
      use.gated(normed, slopes.get(), nullptr, to_gate, some.numel(), swish, {});
    });
    if (!params) return;
    const auto totals = scratch<double>(g.c);
    for (int64_t c = 0; c < g.c; ++c) {
      GradSums total;
      for (int64_t i = 0; i < blocks.count; ++i) total.add(sums[i * g.c + c]);
      totals[c] = total.grad_x_hat;
    }
    store(totals.get(), of_weight);
  });
  return {of_x, of_gate, of_weight};
}

}  // namespace
}  // namespace truenorm

STABLE_TORCH_LIBRARY_IMPL(truenorm, CPU, m) {
  m.impl("eager_gated_norm", TORCH_BOX(&truenorm::gated_norm));
  m.impl("eager_gated_norm_backward", TORCH_BOX(&truenorm::gated_norm_backward));
}
