// torch's own thread pool, and scratch memory.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <memory>

namespace truenorm {

constexpr int64_t kWorthAThread = int64_t{1} << 14;  // values

// body(i) for i in [0, tasks), each of about `cost` values; small work stays on this thread. A pass
// over what another has just read goes `backwards`: what was read last is still in this core's
// cache.
template <bool backwards = false, class Body>
void parallel(int64_t tasks, int64_t cost, const Body& body) {
  const int64_t grain = std::max<int64_t>(1, kWorthAThread / std::max<int64_t>(cost, 1));
  const auto range = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(backwards ? begin + end - 1 - i : i);
  };
  // too little to share: the pool is not asked
  if (tasks <= grain)
    range(0, tasks);
  else
    torch::stable::parallel_for(0, tasks, grain, range);
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Whether so many equal tasks keep every thread busy, or all but for a fifth of the time.
inline bool busy(int64_t tasks) {
  const int64_t threads = torch::stable::get_num_threads();
  return 4 * ceil_div(tasks, threads) * threads <= 5 * tasks;
}

template <class T>
std::unique_ptr<T[]> scratch(int64_t count) {
  return std::unique_ptr<T[]>(new T[size_t(std::max<int64_t>(count, 1))]);
}

}  // namespace truenorm
