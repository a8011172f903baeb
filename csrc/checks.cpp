// The words of checks.h.
#include "checks.h"

#include <stdexcept>
#include <string>

namespace truenorm::check {
namespace {

std::string text(const char* words) { return words; }
std::string text(const std::string& words) { return words; }
std::string text(int64_t value) { return std::to_string(value); }

// Not by +, of which gcc 12 warns.
template <class... Parts>
std::string join(const Parts&... parts) {
  std::string all;
  (all.append(text(parts)), ...);
  return all;
}

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  throw std::runtime_error(join(parts...));
}

template <class Sizes>
std::string tuple_of(const Sizes& sizes) {
  std::string words = "(";
  bool first = true;
  for (const int64_t size : sizes) {
    if (!first) words.append(", ");
    words.append(std::to_string(size));
    first = false;
  }
  return words.append(sizes.size() == 1 ? ",)" : ")");
}

std::string shape(const Tensor& t) { return join("shape ", tuple_of(t.sizes())); }

std::string dtype_of(const Tensor& t) {
  switch (type_of(t)) {
    case ScalarType::Double:
      return "torch.float64";
    case ScalarType::Float:
      return "torch.float32";
    case ScalarType::Half:
      return "torch.float16";
    case ScalarType::BFloat16:
      return "torch.bfloat16";
    case ScalarType::Bool:
      return "torch.bool";
    case ScalarType::Byte:
      return "torch.uint8";
    case ScalarType::Char:
      return "torch.int8";
    case ScalarType::Short:
      return "torch.int16";
    case ScalarType::Int:
      return "torch.int32";
    case ScalarType::Long:
      return "torch.int64";
    case ScalarType::ComplexFloat:
      return "torch.complex64";
    case ScalarType::ComplexDouble:
      return "torch.complex128";
    case ScalarType::Undefined:
      return "of a kind without a kernel";
    default:
      return torch::headeronly::toString(type_of(t));
  }
}

std::string named(const char* name) { return join("`", name, "`"); }

}  // namespace

void wrong_dtype(const char* name, const Tensor& given) {
  fail(named(name), " has dtype ", dtype_of(given),
       ": truenorm has no kernel for this dtype; pass ", name, ".float()");
}

void wrong_input(const Tensor& x, const Axes& axes) {
  const std::string of_x = join("`x` of ", shape(x));
  const int64_t dim = x.dim();
  if (axes.feature_dims < 0 || axes.feature_dims > dim)
    fail("`feature_dims` (=", axes.feature_dims, ") must be from 0 to ", dim,
         ", the dimensions of ", of_x, ": pass how many of the last dimensions share a statistic");
  if (axes.feature_dims > 0)
    fail("`num_groups` (=", axes.num_groups, ") must divide the values of the last ",
         axes.feature_dims, " dimensions of ", of_x, ": pass a divisor");
  if (dim < 2) fail(of_x, " needs the dimensions (N, C, …): add them with x[None]");
  const int64_t channels = x.size(1);
  fail("`num_groups` (=", axes.num_groups, ") must be 0, or divide the ", channels, " channels of ",
       of_x, ": pass a divisor of ", channels);
}

void wrong_parameter(const char* name, const Tensor& given, const Tensor& x, int64_t feature_dims,
                     bool by_part) {
  const auto sizes = x.sizes();
  const int64_t* const end = sizes.data() + sizes.size();
  const Dims wanted =
      feature_dims > 0 ? Dims(end - feature_dims, end) : Dims(sizes.data() + 1, sizes.data() + 2);
  fail(named(name), " must have shape ", tuple_of(wanted), ", one value per channel of `x` of ",
       shape(x), ", but got ", shape(given), ": pass one of that shape, or None",
       by_part ? ", or as many rows of it as divide the samples, for weight and bias alike" : "");
}

void wrong_parts(const Tensor& bias, int64_t parts) {
  fail("`bias` must have as many rows as `weight`, ", parts, ", but got ", shape(bias),
       ": pass one for each");
}

void wrong_statistic(const char* name, const Tensor& given, const Tensor& x, int64_t count) {
  fail(named(name), " must hold ", count, " values, one per statistic of `x` of ", shape(x),
       ", but got ", shape(given), ": pass what was returned for this x and these axes");
}

void wrong_gradient(const Tensor& given, const Tensor& x) {
  fail("`grad` must have the shape of `x`, ", tuple_of(x.sizes()), ", but got ", shape(given),
       ": pass one like x");
}

void wrong_residual(const Tensor& given, const Tensor& x) {
  fail("`residual` must have the shape of `x`, ", tuple_of(x.sizes()), " and its dtype, ",
       dtype_of(x), ", but got ", shape(given), " and ", dtype_of(given),
       ": pass one like x (truenorm: the residual's shape and dtype must be the input's)");
}

void wrong_number(const char* name, int64_t value, const char* meaning) {
  fail(named(name), " (=", value, ") must be ", meaning);
}

void wrong_running(const char* name, const Tensor& given, const char* meaning) {
  fail(named(name), " must be ", meaning, ", but got ", shape(given), " and dtype ",
       dtype_of(given));
}

void no_count() {
  fail(
      "`num_batches_tracked` must be a tensor where `momentum` is None: pass the count of "
      "batches, or a momentum");
}

void one_value(const Tensor& x) {
  fail("`x` of ", shape(x),
       " has one value per statistic, which has no variance: pass more than one");
}

void wrong_record(const Tensor& given, const char* wanted) {
  fail("`record` must be a contiguous float64 tensor, ", wanted, ", but got ", shape(given),
       " and dtype ", dtype_of(given), ": pass the forward's second result");
}

void one_of_two(const char* name, const char* missing) {
  fail(named(name), " is given and ", named(missing), " is not: pass both, or neither");
}

void wrong_sums(const Tensor& given, const Tensor& x, int64_t count) {
  fail("`sums` must hold 2 values for each of the ", count, " statistics of `x` of ", shape(x),
       ", but got ", shape(given),
       ": pass two rows, the means of weight · grad · x̂ and of weight · grad");
}

void wrong_form(int64_t form, const char* meaning) { fail("`form` (=", form, ") ", meaning); }

void rounds_wide() {
  fail(
      "`form` has ROUNDS, and `weight` or `bias` has dtype torch.float64 beside an `x` in half "
      "precision: pass them in x's dtype");
}

void as_given_with_more() {
  fail(
      "`form` has AS_GIVEN beside an activation, a residual, or weights for parts of the samples: "
      "pass a norm alone");
}

void no_memory(const char* name, const Tensor& given) {
  fail(named(name), " of ", shape(given),
       " has no memory: its storage was freed; pass a tensor that holds its values");
}

void no_values(const char* name, const Tensor& x) {
  fail("truenorm::", name, " takes no empty tensor: it has no moments, and `x` has ", shape(x),
       "; pass a tensor that holds values");
}

void written(const char* name, const Tensor& t) {
  const auto sizes = t.sizes();
  const auto strides = t.strides();
  for (size_t d = 0; d < sizes.size(); ++d)
    if (sizes[d] > 1 && strides[d] == 0)
      fail(named(name), " of ", shape(t),
           " is expanded: several of its elements are one in memory, and it is written to; pass ",
           name, ".contiguous()");
}

void mask(const Tensor& m, const Tensor& x, const Geometry& g) {
  if (type_of(m) != ScalarType::Bool || !m.is_contiguous() || m.numel() != g.n * g.s)
    fail("truenorm: a mask must be a contiguous boolean tensor (N, *positions): `mask` must hold ",
         g.n * g.s, " values for `x` of ", shape(x), ", but got ", shape(m), " and dtype ",
         dtype_of(m), "; pass mask.bool().contiguous()");
  memory("mask", m);
}

}  // namespace truenorm::check
