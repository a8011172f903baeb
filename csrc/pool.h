// Recycled memory for large results. A buffer handed out belongs to its tensor; one given back is
// idle, and stays mapped until it is handed out again or the cap on idle memory pushes it out.
#pragma once

#include <cstddef>

namespace truenorm {

struct Buffer {
  void* data;
  size_t capacity;
};

// Below this glibc serves memory from its heap, already mapped.
constexpr size_t kPoolFrom = size_t{1} << 20;

// At least `bytes`, aligned to a page; data is null where the pool is off or memory is short.
Buffer take(size_t bytes);

void give_back(Buffer buffer) noexcept;

}  // namespace truenorm
