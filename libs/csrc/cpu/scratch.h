// A kernel's working memory, handed out in pieces of one block. Included as simd.h is.

namespace ccnet {
namespace CCNET_CAPABILITY {

// Without a block it only counts, which tells how large the block must be.
class Scratch {
 public:
  __attribute__((always_inline)) explicit Scratch(char* block) : block_(block) {}

  template <class T>
  __attribute__((always_inline)) T* take(int64_t count) {
    constexpr int64_t alignment = 64;
    char* piece = block_ == nullptr ? nullptr : block_ + used_;
    used_ += (count * static_cast<int64_t>(sizeof(T)) + alignment - 1) / alignment * alignment;
    return reinterpret_cast<T*>(piece);
  }

  __attribute__((always_inline)) int64_t used() const { return used_; }

 private:
  char* block_;
  int64_t used_ = 0;
};

}  // namespace CCNET_CAPABILITY
}  // namespace ccnet
