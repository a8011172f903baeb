#include "pages.h"

#if defined(_WIN32)
#define NOMINMAX
#define WIN32_LEAN_AND_MEAN
#include <windows.h>

namespace truenorm {

void* map_pages(size_t bytes) {
  return VirtualAlloc(nullptr, bytes, MEM_RESERVE | MEM_COMMIT, PAGE_READWRITE);
}

void unmap_pages(void* data, size_t) { VirtualFree(data, 0, MEM_RELEASE); }

void ask_for_huge_pages(void*, size_t) {}

void around_fork(void (*)(), void (*)(), void (*)()) {}

}  // namespace truenorm

#else
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>

namespace truenorm {

void* map_pages(size_t bytes) {
  // a huge page must start where the address divides by its size: map more, and cut to that
  const size_t spare = bytes >= kHugeFrom ? kHugePage : 0;
  void* const mapped =
      mmap(nullptr, bytes + spare, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) return nullptr;
  if (spare == 0) return mapped;
  char* const begin = static_cast<char*>(mapped);
  const size_t before = (kHugePage - uintptr_t(begin) % kHugePage) % kHugePage;
  if (before > 0) munmap(begin, before);
  if (before < spare) munmap(begin + before + bytes, spare - before);
  ask_for_huge_pages(begin + before, bytes);
  return begin + before;
}

void unmap_pages(void* data, size_t bytes) { munmap(data, bytes); }

void ask_for_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] size_t bytes) {
#if defined(MADV_HUGEPAGE)
  if (bytes < kHugeFrom) return;
  const auto page = uintptr_t(sysconf(_SC_PAGESIZE));
  const auto begin = (uintptr_t(data) + page - 1) & ~(page - 1);
  const auto end = (uintptr_t(data) + bytes) & ~(page - 1);
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

void around_fork(void (*before)(), void (*in_parent)(), void (*in_child)()) {
  pthread_atfork(before, in_parent, in_child);
}

}  // namespace truenorm
#endif
