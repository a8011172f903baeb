#include "kernels_of.h"

namespace truenorm::TRUENORM_ISA {
extern const Kernels<bf16> bf;
const Kernels<bf16> bf = kernels_of<bf16>();
}  // namespace truenorm::TRUENORM_ISA
