// Which instruction set runs: the best this machine has, or the one that TRUENORM_ISA names.
#include <cstdlib>
#include <cstring>

#if defined(TRUENORM_X86)
#include <cpuid.h>
#endif

#include "kernels.h"

namespace truenorm {

namespace avx512 {
extern const InstructionSet instruction_set;
}
namespace avx2 {
extern const InstructionSet instruction_set;
}
namespace baseline {
extern const InstructionSet instruction_set;
}
namespace neon {
extern const InstructionSet instruction_set;
}

namespace {

#if defined(TRUENORM_X86)
// Asked of the processor: clang 14's __builtin_cpu_supports does not know it.
[[maybe_unused]] bool has_f16c() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;
}
#endif

// TRUENORM_HAS_*: which of them this library was built with
const InstructionSet* choose() {
  const char* wanted = std::getenv("TRUENORM_ISA");
  const bool any = wanted == nullptr || *wanted == '\0';
  const auto asked = [&](const InstructionSet& set) {
    return any || std::strcmp(wanted, set.name) == 0;
  };
#if defined(TRUENORM_X86)
  __builtin_cpu_init();
  [[maybe_unused]] const bool has_avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
#endif
#if defined(TRUENORM_HAS_avx512)
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") &&
                          __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (has_avx512 && asked(avx512::instruction_set)) return &avx512::instruction_set;
#endif
#if defined(TRUENORM_HAS_avx2)
  if (has_avx2 && asked(avx2::instruction_set)) return &avx2::instruction_set;
#endif
#if defined(TRUENORM_HAS_neon)
  if (asked(neon::instruction_set)) return &neon::instruction_set;
#endif
#if defined(TRUENORM_HAS_baseline)
  if (asked(baseline::instruction_set)) return &baseline::instruction_set;
#endif
  return nullptr;
}

}  // namespace

const InstructionSet* instruction_set() {
  static const InstructionSet* const chosen = choose();
  return chosen;
}

}  // namespace truenorm

// nullptr where TRUENORM_ISA names an instruction set that is not here
extern "C" __attribute__((visibility("default"))) const char* truenorm_instruction_set() {
  const truenorm::InstructionSet* set = truenorm::instruction_set();
  return set ? set->name : nullptr;
}
