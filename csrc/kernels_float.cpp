#include "kernels_of.h"

namespace truenorm::TRUENORM_ISA {
extern const Kernels<float> f32;
const Kernels<float> f32 = kernels_of<float>();
}  // namespace truenorm::TRUENORM_ISA
