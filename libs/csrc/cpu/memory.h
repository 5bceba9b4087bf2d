// Memory allocation for the CPU kernels.
#pragma once

#include <cstdint>
#include <cstdlib>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace ccnet {

// A block of at least `bytes` bytes that this thread keeps and reuses, one for each kNumber; null if memory runs out.
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

// Asks for pages of 2 MB in large new memory: with pages of 4 KB, the page faults cost more than writing the data.
inline void prefer_huge_pages([[maybe_unused]] void* data, int64_t bytes) {
  constexpr int64_t large = 4 << 20;
  if (bytes < large) {
    return;
  }
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = 2 << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + page - 1) / page * page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / page * page;
  if (begin < end) {
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // only advice: it may fail
  }
#endif
}

}  // namespace ccnet
