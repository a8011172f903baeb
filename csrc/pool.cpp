#include "pool.h"

#include <algorithm>
#include <cstdint>
#include <mutex>
#include <new>
#include <vector>

#include "exported.h"
#include "pages.h"

#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define TRUENORM_ASAN 1
#endif
#endif
#if defined(__SANITIZE_ADDRESS__)
#define TRUENORM_ASAN 1
#endif
#if defined(TRUENORM_ASAN)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(data, size) ((void)(data), (void)(size))
#define ASAN_UNPOISON_MEMORY_REGION(data, size) ((void)(data), (void)(size))
#endif

namespace truenorm {
namespace {

// Sizes that differ by less are one size. A multiple of every page size.
constexpr size_t kGranule = size_t{64} << 10;

size_t rounded(size_t bytes) { return (bytes + kGranule - 1) & ~(kGranule - 1); }

void unmap(const Buffer& buffer) {
  // whoever is given these addresses next knows nothing of the poison
  ASAN_UNPOISON_MEMORY_REGION(buffer.data, buffer.capacity);
  unmap_pages(buffer.data, buffer.capacity);
}

class Pool {
 public:
  // Leaked: a tensor may die after the destructors of static objects have run.
  static Pool& instance() {
    static Pool* const pool = [] {
      auto* made = new Pool;
      around_fork([] { instance().mutex_.lock(); }, [] { instance().mutex_.unlock(); },
                  [] { instance().in_child(); });
      return made;
    }();
    return *pool;
  }

  Buffer take(size_t bytes) {
    Buffer buffer{nullptr, rounded(bytes)};
    {
      const std::lock_guard lock(mutex_);
      if (cap_ == 0) return buffer;
      const size_t found = find(buffer.capacity);
      if (found < idle_.size()) {
        ++hits_;
        buffer = idle_[found];
        idle_.erase(idle_.begin() + ptrdiff_t(found));
        idle_bytes_ -= buffer.capacity;
      } else {
        ++misses_;
      }
    }
    if (buffer.data == nullptr) buffer.data = map_pages(buffer.capacity);
    if (buffer.data == nullptr) {
      // idle memory of other sizes may be what is missing
      empty();
      buffer.data = map_pages(buffer.capacity);
    }
    if (buffer.data != nullptr) {
      ASAN_POISON_MEMORY_REGION(buffer.data, buffer.capacity);
      ASAN_UNPOISON_MEMORY_REGION(buffer.data, bytes);
    }
    return buffer;
  }

  void give_back(const Buffer& buffer) {
    if (!keep(buffer)) return unmap(buffer);
    push_out();
  }

  void empty() { push_out(0); }

  void set_cap(size_t bytes) {
    {
      const std::lock_guard lock(mutex_);
      cap_ = bytes;
    }
    push_out();
  }

  void statistics(int64_t* of) {
    const std::lock_guard lock(mutex_);
    of[0] = int64_t(cap_);
    of[1] = int64_t(idle_bytes_);
    of[2] = int64_t(idle_.size());
    of[3] = hits_;
    of[4] = misses_;
  }

 private:
  // The newest buffer of this size, still warm in the caches; else the smallest that is at most a
  // quarter larger, as where the sizes of batches vary. What is past `capacity` is wasted while the
  // tensor lives, hence the bound.
  size_t find(size_t capacity) const {
    size_t best = idle_.size();
    for (size_t i = idle_.size(); i-- > 0;) {
      const size_t size = idle_[i].capacity;
      if (size == capacity) return i;
      const bool fits = size > capacity && size <= capacity + capacity / 4;
      if (fits && (best == idle_.size() || size < idle_[best].capacity)) best = i;
    }
    return best;
  }

  bool keep(const Buffer& buffer) {
    const std::lock_guard lock(mutex_);
    // above the cap it would push out all others, and not fit even then
    if (buffer.capacity > cap_) return false;
    try {
      idle_.push_back(buffer);
    } catch (const std::bad_alloc&) {
      return false;
    }
    ASAN_POISON_MEMORY_REGION(buffer.data, buffer.capacity);
    idle_bytes_ += buffer.capacity;
    return true;
  }

  // The oldest buffers go until at most `limit` bytes are idle; the system is called unlocked.
  void push_out(size_t limit = SIZE_MAX) {
    while (true) {
      Buffer oldest;
      {
        const std::lock_guard lock(mutex_);
        if (idle_bytes_ <= std::min(limit, cap_)) return;
        oldest = idle_.front();
        idle_.erase(idle_.begin());
        idle_bytes_ -= oldest.capacity;
      }
      unmap(oldest);
    }
  }

  // What was idle in the parent would be copied page by page when either process writes to it.
  void in_child() {
    for (const Buffer& buffer : idle_) unmap(buffer);
    idle_.clear();
    idle_bytes_ = 0;
    mutex_.unlock();
  }

  std::mutex mutex_;
  std::vector<Buffer> idle_;  // the oldest first
  size_t cap_ = 0, idle_bytes_ = 0;
  int64_t hits_ = 0, misses_ = 0;
};

}  // namespace

Buffer take(size_t bytes) { return Pool::instance().take(bytes); }

void give_back(Buffer buffer) noexcept { Pool::instance().give_back(buffer); }

}  // namespace truenorm

TRUENORM_EXPORT void truenorm_pool_set_cap(int64_t bytes) {
  truenorm::Pool::instance().set_cap(size_t(bytes));
}

TRUENORM_EXPORT void truenorm_pool_empty() { truenorm::Pool::instance().empty(); }

// cap, idle bytes, idle buffers, hits, misses
TRUENORM_EXPORT void truenorm_pool_statistics(int64_t* of) {
  truenorm::Pool::instance().statistics(of);
}
