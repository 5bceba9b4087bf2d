// Memory of the CPU kernels' callers.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace ccnet {

// This thread's block of that number, of at least that many bytes, kept for its next call; null when there is no memory.
template <int kNumber = 0>
char* thread_block(int64_t bytes) {
  struct Block {
    char* data = nullptr;
    int64_t size = 0;
    ~Block() { std::free(data); }
  };
  static thread_local Block block;
  if (block.size < bytes) {
    std::free(block.data);
    void* data = nullptr;
    block.size = posix_memalign(&data, 4096, bytes) == 0 ? bytes : 0;
    block.data = block.size > 0 ? static_cast<char*>(data) : nullptr;
  }
  return block.data;
}

// Large fresh memory is written to in 4 KB pages, each a fault that costs more than filling the page: ask for 2 MB ones.
inline void prefer_huge_pages(void* data, int64_t bytes) {
  constexpr int64_t large = 4 << 20;
  if (bytes < large) {
    return;
  }
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = 2 << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + page - 1) / page * page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / page * page;
  if (begin < end) {
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // advice: if refused, nothing is lost
  }
#else
  (void)data;
  (void)bytes;
#endif
}

// With AddressSanitizer, fresh memory is made NaN: what is read before it is written then shows in the results.
inline void show_if_read(void* data, int64_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  if (bytes > 0) {
    std::memset(data, 0xff, bytes);
  }
#else
  (void)data;
  (void)bytes;
#endif
}

}  // namespace ccnet
