// Recycled memory for large results. A buffer handed out belongs to its tensor; one given back is
// idle, and stays mapped until it is handed out again or the cap on idle memory pushes it out.
#pragma once

#include <cstddef>

namespace truenorm {

struct Buffer {
  void* data;
  size_t capacity;
};

// Below this the heap serves: its memory is whatever was freed last, of any size, and still in the
// caches, where buffers of a size of their own were last used by that layer's call before.
constexpr size_t kPoolFrom = size_t{8} << 20;

// At least `bytes`, aligned to a page; data is null where the pool is off or memory is short.
Buffer take(size_t bytes);

void give_back(Buffer buffer) noexcept;

}  // namespace truenorm
