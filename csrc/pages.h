// Memory as the system hands it out, and what happens to a process: all that depends on which
// system it is.
#pragma once

#include <cstddef>

namespace truenorm {

constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kHugeFrom = 2 * kHugePage;

// Fresh memory, page by page; null where there is none. Huge pages are asked for from kHugeFrom on.
void* map_pages(size_t bytes);

// All of what one call of map_pages gave.
void unmap_pages(void* data, size_t bytes);

// Linux hands out fresh memory page by page, and the faults cost more than the arithmetic: asks for
// huge pages where that pays. To be called before the first touch.
void ask_for_huge_pages(void* data, size_t bytes);

// Called around every fork; nothing where the system has none.
void around_fork(void (*before)(), void (*in_parent)(), void (*in_child)());

}  // namespace truenorm
