// One layer call, y = select(mask, act(norm(x) · weight + bias + residual), padding), whatever the
// layer: what an operator was given, and what is made of it. Every operator fills a Call and has it
// read; nothing else looks at its arguments.
#pragma once

#include <tuple>

#include "tensors.h"

namespace truenorm {

// Gradients that are wanted, and what else `needs` says.
constexpr int64_t kInput = 1, kWeight = 2, kBias = 4, kResidual = 8;
constexpr int64_t kByOutput = 16;  // the residual holds y

// What a call is apart from its tensors and numbers, in one integer; Python packs the same bits.
struct Form {
  int64_t bits;

  int64_t needs() const { return bits & 31; }
  bool wants_gradient() const { return bits & (kInput | kWeight | kBias | kResidual); }
  bool constant() const { return bits & 32; }
  bool centred() const { return !(bits & 64); }
  bool per_channel() const { return bits & 128; }
  bool keeps() const { return bits & 256; }
  bool rounds() const { return bits & 512; }
  bool one_plus() const { return bits & 1024; }
  bool as_given() const { return bits & 2048; }
  Act act() const { return Act(bits >> 16 & 0xff); }
  // over trailing dimensions ROUNDS is of each step, elsewhere of what the activation is applied to
  bool steps() const { return rounds() && feature_dims() > 0; }
  Activation activation(double parameter) const {
    return {act(), parameter, false, rounds() && feature_dims() == 0};
  }
  int64_t feature_dims() const { return bits >> 24 & 0xff; }
  int64_t num_groups() const { return bits >> 32; }

  // grouped: whether the values of trailing dimensions may be of several groups
  void check(bool grouped) const {
    if (bits < 0) check::wrong_form(bits, "is negative: pass a sum of its flags");
    if (bits & 0xf000)
      check::wrong_form(bits,
                        "has bits from 12 to 15, which mean nothing here: pass a sum of its "
                        "flags");
    if (rounds() && feature_dims() == 0 && act() == Act::none)
      check::wrong_form(bits,
                        "has ROUNDS without `feature_dims` or an activation: pass it for trailing "
                        "dimensions, or before an activation");
    if (as_given() && feature_dims() == 0)
      check::wrong_form(bits,
                        "has AS_GIVEN without `feature_dims`: pass it for trailing dimensions");
    if (((feature_dims() > 0 && !grouped) || per_channel()) && num_groups() > 0)
      check::wrong_form(bits, "has a `num_groups` beside `feature_dims` or PER_CHANNEL: pass 0");
    if (feature_dims() > 0 && per_channel())
      check::wrong_form(bits, "has PER_CHANNEL and `feature_dims`: pass one of them");
  }
  Axes axes(const Tensor& x, bool grouped = false) const {
    check(grouped);
    const int64_t groups = feature_dims() > 0             ? std::max<int64_t>(num_groups(), 1)
                           : per_channel() && x.dim() > 1 ? x.size(1)
                                                          : num_groups();
    return {groups, feature_dims(), centred(), as_given()};
  }
};

struct Call {
  const Tensor& x;
  Axes axes;
  double eps = 0.0;
  const Tensor* weight = nullptr;  // as all tensors: null for none
  const Tensor* bias = nullptr;
  const Tensor* mask = nullptr;  // none: all is valid
  const Tensor* residual = nullptr;
  const Tensor* mean = nullptr;  // the statistics, where they are given
  const Tensor* var = nullptr;
  Activation act = {};
  double padding = 0.0;
  // of a backward
  const Tensor* grad = nullptr;
  const Tensor* sums = nullptr;
  int64_t needs = 0;
  bool constant = false;  // the statistics do not depend on x
  bool rounds = false;    // each step of the affine one to x's dtype: see RowAffine
  bool one_plus = false;  // 1 + weight is what is meant

  // made by read()
  Geometry g = {};
  // A weight with one more dimension, and a bias beside it, has a row for each of so many parts of
  // the samples, which follow one another.
  bool by_part = false;
  int64_t parts = 1;

  // Positions of a sample, where the channels of x, or of its gradient, lie outside of these, and a
  // driver takes it as it is; else 0.
  int64_t positions = 0;

  // Looks at every argument before a byte of any is read: in this order, whatever the operator.
  // of_values: whether an empty x has no result; over: x is written to.
  const Call& read(bool of_values = false, bool over = false);

  bool acts() const { return residual || act.kind != Act::none || (needs & kResidual); }
  // of the sums that weight and bias take of a part: its channels', of each sample where they are
  int64_t sums_of_part() const { return g.over_batch() || g.s == 1 ? g.c : g.n / parts * g.c; }
  // a sample is one row, which counts or does not
  bool by_row() const { return g.s == 1 && !g.over_batch(); }
};

inline const Tensor* given(const Maybe& t) { return t ? &*t : nullptr; }

// Writes y, where there is one, and the statistics, or with `fixed` reads these. y may be x.
void forward_into(const Call& call, const Tensor* y, double* mean, double* var, bool fixed);
// y by the call's own statistics, which are given.
void apply_into(const Call& call, const Tensor& y);
// How many values each statistic spans.
void count_into(const Call& call, double* count);

// Memory for y; x's own where that is written `over` and laid out for the kernels.
Tensor result_of(const Call& call, bool over);
// What is left to do once y has been written.
void close(const Call& call, const Tensor& y, bool over);

// Those gradients that are wanted.
struct Gradients {
  ScalarType type, param_type;
  Maybe x, weight, bias, residual;

  explicit Gradients(const Call& call);
  // an empty tensor in the place of the others
  std::tuple<Tensor, Tensor, Tensor, Tensor> all() const;
};
void backward_into(const Call& call, const double* mean, const double* var, const Gradients& made);
// Σ grad · x̂ and Σ grad per channel, and of each sample where the statistics are: [2, …].
Tensor gradient_sums(const Call& call, const double* mean, const double* var);

}  // namespace truenorm
