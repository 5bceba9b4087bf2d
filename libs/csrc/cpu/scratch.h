// A kernel's working memory, handed out in pieces of one block. Included as simd.h is, after <cstring> and, where it is
// built with AddressSanitizer, <sanitizer/asan_interface.h>.

namespace ccnet {
namespace CCNET_CAPABILITY {

// Without a block it only counts, which tells how large the block must be.
class Scratch {
 public:
  __attribute__((always_inline)) explicit Scratch(char* block) : block_(block) {}

  template <class T>
  __attribute__((always_inline)) T* take(int64_t count) {
    constexpr int64_t alignment = 64;
    const int64_t bytes = count * static_cast<int64_t>(sizeof(T));
    const int64_t rounded = (bytes + alignment - 1) / alignment * alignment;
    char* piece = block_ == nullptr ? nullptr : block_ + used_;
    used_ += rounded;
#if defined(__SANITIZE_ADDRESS__)
    // What is read before it is written is NaN, and what lies between the pieces may not be touched.
    used_ += alignment;
    if (piece != nullptr) {
      __asan_unpoison_memory_region(piece, rounded);
      std::memset(piece, 0xff, rounded);
      __asan_poison_memory_region(piece + bytes, rounded - bytes + alignment);
    }
#endif
    return reinterpret_cast<T*>(piece);
  }

  __attribute__((always_inline)) int64_t used() const { return used_; }

 private:
  char* block_;
  int64_t used_ = 0;
};

}  // namespace CCNET_CAPABILITY
}  // namespace ccnet
