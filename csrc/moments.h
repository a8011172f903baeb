// Count, mean and sum of squared deviations: the one statistic type, and its exact merge.
#pragma once

#include <cstdint>

namespace truenorm {

struct Moments {
  double count = 0.0;
  double mean = 0.0;
  double m2 = 0.0;

  // Chan, Golub and LeVeque 1983: no sum of squares about zero, so no cancellation at any offset.
  void merge(const Moments& other) {
    if (other.count == 0.0) return;
    if (count == 0.0) {
      *this = other;
      return;
    }
    const double total = count + other.count;
    const double delta = other.mean - mean;
    const double share = other.count / total;
    mean += delta * share;
    m2 += other.m2 + delta * delta * count * share;
    count = total;
  }
};

}  // namespace truenorm
