// Memory allocation for the CPU kernels.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace ccnet {

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

// Memory that a thread keeps for its next call. It is mapped apart from the heap, which it would fragment: freed memory
// of large tensors could then not be reused for others.
class KeptBlock {
 public:
  KeptBlock() = default;
  KeptBlock(const KeptBlock&) = delete;
  ~KeptBlock() { release(); }

  // At least that many bytes; null when there is no memory.
  char* get(int64_t bytes) {
    if (size_ < bytes) {
      release();
      data_ = allocate(bytes);
      size_ = data_ == nullptr ? 0 : bytes;
      prefer_huge_pages(data_, size_);
    }
    return data_;
  }

 private:
#if defined(__linux__) && !defined(__SANITIZE_ADDRESS__)
  void release() {
    if (data_ != nullptr) {
      munmap(data_, size_);
    }
  }
  static char* allocate(int64_t bytes) {
    void* data = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return data == MAP_FAILED ? nullptr : static_cast<char*>(data);
  }
#else
  void release() { std::free(data_); }
  static char* allocate(int64_t bytes) {
    void* data = nullptr;
    return posix_memalign(&data, 4096, bytes) == 0 ? static_cast<char*>(data) : nullptr;
  }
#endif

  char* data_ = nullptr;
  int64_t size_ = 0;
};

// What a thread keeps blocks for
enum class Kept { scratch, lines, value, query, key, path, products, count };

inline char* thread_block(Kept what, int64_t bytes) {
  static thread_local KeptBlock blocks[static_cast<int>(Kept::count)];
  return blocks[static_cast<int>(what)].get(bytes);
}

// Under AddressSanitizer, fills fresh memory with NaN, so that a read before the first write shows in the results.
inline void show_if_read([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  if (bytes > 0) {
    std::memset(data, 0xff, bytes);
  }
#endif
}

}  // namespace ccnet
