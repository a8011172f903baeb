#include "kernels_of.h"

namespace truenorm::TRUENORM_ISA {
extern const Kernels<f16> hf;
const Kernels<f16> hf = kernels_of<f16>();
}  // namespace truenorm::TRUENORM_ISA
