// What one instruction set offers: the tables that kernels_*.cpp fill.
#include "kernels.h"

#if !defined(TRUENORM_ISA)
#error "compile once per instruction set, with TRUENORM_ISA naming it"
#endif

#define TN_STRING_(x) #x
#define TN_STRING(x) TN_STRING_(x)

namespace truenorm::TRUENORM_ISA {

extern const Kernels<double> f64;
extern const Kernels<float> f32;
extern const Kernels<bf16> bf;
extern const Kernels<f16> hf;

extern const InstructionSet instruction_set;
const InstructionSet instruction_set = {TN_STRING(TRUENORM_ISA), &f64, &f32, &bf, &hf};

}  // namespace truenorm::TRUENORM_ISA
