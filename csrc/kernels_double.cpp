#include "kernels_of.h"

namespace truenorm::TRUENORM_ISA {
extern const Kernels<double> f64;
const Kernels<double> f64 = kernels_of<double>();
}  // namespace truenorm::TRUENORM_ISA
