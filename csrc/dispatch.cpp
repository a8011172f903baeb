// Which instruction set runs: the best this machine has, or the one that TRUENORM_ISA names.
#include <cstdlib>
#include <cstring>

#if defined(TRUENORM_X86)
#include <cpuid.h>
#endif

#include "exported.h"
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
struct Processor {
  bool avx2 = false, avx512 = false;
};

// Asked of the processor itself: what compilers have for it (__builtin_cpu_supports) needs a
// library of theirs, which clang-cl does not link and zig's lacks, and clang 14 does not know f16c.
[[maybe_unused]] Processor processor() {
  Processor has;
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned wanted = bit_OSXSAVE | bit_AVX | bit_FMA | bit_F16C;
  if (!__get_cpuid(1, &a, &b, &c, &d) || (c & wanted) != wanted) return has;
  // which registers the system keeps for a process: those of 32 bytes, and those of 64
  unsigned kept = 0, upper = 0;
  __asm__("xgetbv" : "=a"(kept), "=d"(upper) : "c"(0));
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return has;
  has.avx2 = (kept & 0x6) == 0x6 && (b & bit_AVX2);
  constexpr unsigned wide = bit_AVX512F | bit_AVX512BW | bit_AVX512VL | bit_AVX512DQ;
  has.avx512 = has.avx2 && (kept & 0xe6) == 0xe6 && (b & wide) == wide;
  return has;
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
  [[maybe_unused]] const Processor has = processor();
#endif
#if defined(TRUENORM_HAS_avx512)
  if (has.avx512 && asked(avx512::instruction_set)) return &avx512::instruction_set;
#endif
#if defined(TRUENORM_HAS_avx2)
  if (has.avx2 && asked(avx2::instruction_set)) return &avx2::instruction_set;
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
TRUENORM_EXPORT const char* truenorm_instruction_set() {
  const truenorm::InstructionSet* set = truenorm::instruction_set();
  return set ? set->name : nullptr;
}
