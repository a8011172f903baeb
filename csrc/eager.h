// What the operators of eager calls share: what a backward is handed, and how they refuse.
// Everything has internal linkage.
#pragma once

#include <bit>
#include <stdexcept>
#include <string>

#include "call.h"

namespace truenorm {
namespace {

// What the backward needs besides tensors of the call's own, in one tensor: each scalar's way
// through the dispatcher takes time. Per statistic the means, then the variances; then these.
struct Kept {
  Form form;
  double eps, parameter;

  static constexpr int64_t kValues = 3;

  static int64_t record_size(const Geometry& g) { return 2 * g.num_statistics() + kValues; }
  Tensor record(const Geometry& g) const {
    const Tensor made = empty(record_size(g), ScalarType::Double);
    double* const end = doubles(made) + record_size(g);
    end[-3] = std::bit_cast<double>(form.bits);
    end[-2] = eps;
    end[-1] = parameter;
    return made;
  }
  // Read before what it says of x is known.
  static Kept of(const Tensor& record) {
    const bool whole = check::type_of(record) == ScalarType::Double && record.numel() > kValues &&
                       record.is_contiguous();
    if (!whole) check::wrong_record(record, "as eager_norm has made it");
    check::memory("record", record);
    const double* const end = doubles(record) + record.numel();
    return {{std::bit_cast<int64_t>(end[-3])}, end[-2], end[-1]};
  }
};

// What is not in order, in the words of checks.h.
template <class Body>
[[maybe_unused]] void in_order(const Body& body, const char* of = "") {
  try {
    body();
  } catch (const std::runtime_error& error) {
    throw std::runtime_error(std::string("truenorm: no call for the short way") + of + ": " +
                             error.what());
  }
}
[[maybe_unused]] constexpr const char* kRecorded = ", with a form that `record` holds";

[[maybe_unused]] void expect(bool held, const char* words) {
  if (!held) throw std::runtime_error(words);
}

// The axes of x, which has values, and more than one to a statistic where one has no variance.
[[maybe_unused]] Axes axes_of(const Tensor& x, Form form) {
  expect(x.numel() > 0, "`x` is empty: it has no moments; pass a tensor that holds values");
  const Axes axes = form.axes(x, true);
  const bool whole = !form.rounds() && !form.as_given();
  expect(axes.feature_dims == 0 || axes.num_groups == 1 || whole,
         "`form` has ROUNDS or AS_GIVEN, for which trailing dimensions are one group: pass 0");
  if (axes.feature_dims > 0 || form.constant()) return axes;
  const auto sizes = x.sizes();
  const int64_t dim = int64_t(sizes.size());
  if (dim < 2) return axes;  // which geometry_of refuses
  int64_t values = 1;
  for (int64_t d = 2; d < dim; ++d) values *= sizes[d];
  if (axes.num_groups == 0)
    values *= sizes[0];
  else if (!form.per_channel())  // as torch: fails only where the whole batch has one value
    values *= sizes[0] * (sizes[1] / axes.num_groups);
  if (values == 1) check::one_value(x);
  return axes;
}

template <class T>
const T* values_of(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}
template <class T>
T* room_of(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

}  // namespace
}  // namespace truenorm
