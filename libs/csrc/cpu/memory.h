// Memory of the CPU kernels' callers.
#pragma once

#include <cstdint>
#include <cstdlib>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace ccnet {

// This thread's block of at least that many bytes, kept for its next call; null when there is no memory.
inline char* thread_block(int64_t bytes) {
  struct Block {
    char* data = nullptr;
    int64_t size = 0;
    ~Block() { std::free(data); }
  };
  static thread_local Block block;
  if (block.size < bytes) {
    constexpr int64_t page = 4096;
    const int64_t size = (bytes + page - 1) / page * page;
    std::free(block.data);
    block.data = static_cast<char*>(std::aligned_alloc(page, size));
    block.size = block.data == nullptr ? 0 : size;
  }
  return block.data;
}

// Large fresh memory is written to in 4 KB pages, each a fault that costs more than filling the page: ask for 2 MB ones.
inline void prefer_huge_pages(void* data, int64_t bytes) {
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

}  // namespace ccnet
