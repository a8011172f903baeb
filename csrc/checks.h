// What an operator may be given. Every operator's entry asks here before it reads or writes a byte,
// whoever calls it: a layer, whose own checks word the same sooner, a graph from disk, or a person.
// What is in order costs a few comparisons; an error names argument, value and remedy, and is
// worded out of line (checks.cpp). src/truenorm/_core/arguments.py is the twin for all that has no
// C++ kernel.
//
// The dispatcher lets only dense CPU tensors get here: the device is the twin's to check.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <exception>
#include <optional>
#include <utility>

#include "activation.h"
#include "geometry.h"

namespace truenorm::check {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

[[noreturn]] void wrong_dtype(const char* name, const Tensor& given);
[[noreturn]] void wrong_input(const Tensor& x, const Axes& axes);
[[noreturn]] void wrong_parameter(const char* name, const Tensor& given, const Tensor& x,
                                  int64_t feature_dims, bool by_part);
[[noreturn]] void wrong_parts(const Tensor& bias, int64_t parts);
[[noreturn]] void wrong_statistic(const char* name, const Tensor& given, const Tensor& x,
                                  int64_t count);
[[noreturn]] void wrong_gradient(const Tensor& given, const Tensor& x);
[[noreturn]] void wrong_residual(const Tensor& given, const Tensor& x);
[[noreturn]] void no_count();
[[noreturn]] void wrong_number(const char* name, int64_t value, const char* meaning);
[[noreturn]] void wrong_running(const char* name, const Tensor& given, const char* meaning);
[[noreturn]] void one_value(const Tensor& x);
[[noreturn]] void wrong_record(const Tensor& given, const char* wanted);
[[noreturn]] void one_of_two(const char* name, const char* missing);
[[noreturn]] void wrong_sums(const Tensor& given, const Tensor& x, int64_t count);
[[noreturn]] void wrong_form(int64_t form, const char* meaning);
[[noreturn]] void rounds_wide();
[[noreturn]] void as_given_with_more();
[[noreturn]] void no_memory(const char* name, const Tensor& given);
[[noreturn]] void no_values(const char* name, const Tensor& x);

inline bool has_kernel(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::BFloat16 ||
         type == ScalarType::Half;
}

// Undefined where it is none that the stable ABI knows, of which it throws without a word.
inline ScalarType type_of(const Tensor& t) {
  try {
    return t.scalar_type();
  } catch (const std::exception&) {
    return ScalarType::Undefined;
  }
}

inline void dtype(const char* name, const Tensor& t) {
  if (!has_kernel(type_of(t))) wrong_dtype(name, t);
}

// A storage may have been freed (`untyped_storage().resize_(0)`).
inline void memory(const char* name, const Tensor& t) {
  if (t.const_data_ptr() == nullptr && t.numel() > 0) no_memory(name, t);
}

// Whether so many groups divide the values of trailing dimensions.
inline bool fit_groups(const int64_t* size, const int64_t* end, int64_t groups) {
  int64_t values = 1;
  while (size != end) values *= *size++;
  return groups > 0 && values % groups == 0 && groups <= std::max<int64_t>(values, 1);
}

// x against the axes: what `geometry` takes.
inline void input(const Tensor& x, const Axes& axes) {
  dtype("x", x);
  const auto sizes = x.sizes();
  const auto dim = int64_t(sizes.size());
  const bool in_order =
      axes.feature_dims == 0
          ? dim >= 2 && axes.num_groups >= 0 &&
                (axes.num_groups == 0 || (sizes[1] % axes.num_groups == 0 &&
                                          axes.num_groups <= std::max<int64_t>(sizes[1], 1)))
          : axes.feature_dims > 0 && axes.feature_dims <= dim &&
                (axes.num_groups == 1 ||
                 fit_groups(sizes.end() - axes.feature_dims, sizes.end(), axes.num_groups));
  if (!in_order) wrong_input(x, axes);
  memory("x", x);
}

inline void has_values(const char* name, const Tensor& x, const Geometry& g) {
  if (g.numel() == 0) no_values(name, x);
}

// A weight or bias: shaped like the channels, with one dimension before these if it is `by_part`.
inline void parameter(const char* name, const Tensor* p, const Tensor& x, const Geometry& g,
                      int64_t feature_dims, bool by_part) {
  if (!p) return;
  dtype(name, *p);
  const auto sizes = p->sizes();
  const int64_t dims = std::max<int64_t>(feature_dims, 1), first = int64_t(by_part);
  const int64_t* const channels = feature_dims == 0 ? &g.c : g.sizes.end() - feature_dims;
  const bool in_order = int64_t(sizes.size()) == dims + first &&
                        std::equal(sizes.begin() + first, sizes.end(), channels) &&
                        (!by_part || (sizes[0] > 0 ? g.n % sizes[0] == 0 : g.n == 0));
  if (!in_order) wrong_parameter(name, *p, x, feature_dims, by_part);
  memory(name, *p);
}

inline void as_many_parts(int64_t parts, const Tensor* bias) {
  if (bias && std::max<int64_t>(bias->size(0), 1) != parts) wrong_parts(*bias, parts);
}

// One value per statistic, or where x is a part of a batch, per channel.
inline void statistic(const char* name, const Tensor& s, const Tensor& x, const Geometry& g) {
  dtype(name, s);
  if (s.numel() != g.num_statistics()) wrong_statistic(name, s, x, g.num_statistics());
  memory(name, s);
}

// Both of a statistic's values, or none.
inline void given(const Tensor* mean, const Tensor* var) {
  if (!mean != !var) one_of_two(mean ? "mean" : "var", mean ? "var" : "mean");
}

// Two means per statistic, of weight · grad · x̂ and of weight · grad.
inline void sums(const Tensor& s, const Tensor& x, const Geometry& g) {
  dtype("sums", s);
  if (s.numel() != 2 * g.num_statistics()) wrong_sums(s, x, g.num_statistics());
  memory("sums", s);
}

// Mean, variance and count, a row each; columns: how many, negative for any number.
inline void record(const Tensor& r, int64_t columns) {
  if (type_of(r) != ScalarType::Double || r.dim() != 2 || r.size(0) != 3 || !r.is_contiguous() ||
      (columns >= 0 && r.size(1) != columns))
    wrong_record(r, "of three rows with one value per statistic of x");
  memory("record", r);
}

// A gradient of x's shape, in a dtype of its own.
inline void gradient(const Tensor& t, const Tensor& x, const Geometry& g) {
  dtype("grad", t);
  const auto sizes = t.sizes();
  if (!std::equal(sizes.begin(), sizes.end(), g.sizes.begin(), g.sizes.end())) wrong_gradient(t, x);
  memory("grad", t);
}

// What is added to x's outputs, in x's dtype.
inline void residual(const Tensor* r, const Tensor& x, const Geometry& g) {
  if (!r) return;
  const auto sizes = r->sizes();
  if (type_of(*r) != x.scalar_type() ||
      !std::equal(sizes.begin(), sizes.end(), g.sizes.begin(), g.sizes.end()))
    wrong_residual(*r, x);
  memory("residual", *r);
}

// What is written where it lies: no two of its elements may be one in memory.
void written(const char* name, const Tensor& t);

// A mask (N, *positions), read byte by byte.
void mask(const Tensor& m, const Tensor& x, const Geometry& g);

// `most`: all flags that there are, added up
inline void needs(int64_t value, int64_t most) {
  if (value < 0 || value > most)
    wrong_number("needs", value,
                 most == 7 ? "from 0 to 7, the sum of 1 (of x), 2 (of weight) and 4 (of bias)"
                           : "from 0 to 31, the sum of 1 (of x), 2 (of weight), 4 (of bias), 8 (of "
                             "residual) and 16 (residual holds the output)");
}

inline void holds_output(bool asked, const Tensor* residual) {
  if (asked && !residual)
    wrong_number("needs", 16, "less than 16 where `residual` is None: pass the output as residual");
}

// the numbers of Act
inline void activation(int64_t act) {
  if (act < 0 || act > int64_t(Act::relu6))
    wrong_number("act", act, "from 0 to 8 (truenorm: no such activation): see csrc/activation.h");
}

inline void window(int64_t size) {
  if (size < 1) wrong_number("size", size, "at least 1, the channels of a window");
}

// Running statistics of `channels` channels that are moved, and their count of batches.
inline void running(const Tensor& mean, const Tensor& var, const Tensor* batches, bool averaged,
                    int64_t channels) {
  const auto one = [&](const char* name, const Tensor& t) {
    dtype(name, t);
    if (t.dim() != 1 || t.numel() != channels || channels == 0)
      wrong_running(name, t, "of shape (C,), one value per channel");
    if (t.numel() > 1 && t.stride(0) == 0) written(name, t);
    memory(name, t);
  };
  one("running_mean", mean);
  one("running_var", var);
  if (batches) {
    if (type_of(*batches) != ScalarType::Long || batches->numel() != 1)
      wrong_running("num_batches_tracked", *batches, "one torch.int64 value");
    memory("num_batches_tracked", *batches);
  } else if (averaged) {
    no_count();
  }
}

}  // namespace truenorm::check
