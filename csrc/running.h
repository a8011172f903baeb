// Running statistics, moved towards a batch's.
#pragma once

#include "tensors.h"

namespace truenorm {

struct Running {
  const Tensor &mean, &var;
  const Tensor* num_batches_tracked;
  double momentum;  // NaN: 1 / batches seen, this one included
};

// A batch's statistics: of one sample after the other, each of its channels.
struct Observed {
  const double *mean, *var;
  int64_t samples;
  const double* counts;  // how many values each spans; null: `count`
  double count;
};

// Averaged over samples, and the variance stored unbiased. What spans fewer than two values has no
// unbiased variance, and is left out.
void move(const Running& running, const Observed& seen);

}  // namespace truenorm
