// The fastest loop of multiply-adds of each instruction set: all operands stay in registers. peak.py compiles and runs it.
//
// It includes itself once per instruction set and takes the vectors, the multiply-add and the number of sums that a tile
// keeps in registers from the kernels.

#if !defined(CCNET_TARGET)

#include <atomic>
#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#define CCNET_IN_REGISTER(x) asm volatile("" : "+v"(x))
#else
#define CCNET_IN_REGISTER(x) asm volatile("" : "+w"(x))
#endif

struct Run {
  int64_t iterations;                  // of every thread
  std::atomic<int64_t> multiply_adds;  // done by all threads, as the sums tell: exact up to 2^23 iterations
};

// Defines peak_<instruction set>_<dtype>, which torch_parallel_for calls on each thread.
#define CCNET_PEAK_OF(capability, dtype) peak_##capability##_##dtype
#define CCNET_PEAK_NAME(capability, dtype) CCNET_PEAK_OF(capability, dtype)
#define CCNET_PEAK(dtype, Product)                                                                   \
  extern "C" void CCNET_PEAK_NAME(CCNET_CAPABILITY, dtype)(int64_t begin, int64_t end, void* data) { \
    Run& run = *static_cast<Run*>(data);                                                             \
    for (; begin < end; ++begin) {                                                                   \
      run.multiply_adds += loop<Product>(run.iterations);                                            \
    }                                                                                                \
  }

#define CCNET_TARGET CCNET_TARGET_BASELINE
#include "benchmarks/peak.cpp"
#if defined(__x86_64__)
#define CCNET_TARGET CCNET_TARGET_AVX2
#include "benchmarks/peak.cpp"
#define CCNET_TARGET CCNET_TARGET_AVX512
#include "benchmarks/peak.cpp"
#define CCNET_TARGET CCNET_TARGET_AVX512_BF16
#include "benchmarks/peak.cpp"
#endif

#else

// clang-format off: the order matters
#include "libs/csrc/cpu/target_begin.h"
#include "libs/csrc/cpu/simd.h"
#include "cc_attention/csrc/cpu/matmul.h"
// clang-format on

namespace ccnet {
namespace CCNET_CAPABILITY {

// Adds 1 * 1 to each sum in every iteration, and returns the total of all lanes: the number of multiply-adds.
template <class Product>
static __attribute__((noinline)) int64_t loop(int64_t iterations) {
  using Word = typename Product::Word;
  constexpr int kSums = kTileRows * kTileVectors;
  Vector<Word> sums[kSums] = {}, a = splat<Word>(1), b = a;
  if constexpr (Product::kPerWord == 2) {
    a = b = (Vector<Word>)(Bits{} + 0x3f803f80);  // two bfloat16 of 1
  }
  CCNET_IN_REGISTER(b);
  for (int64_t i = 0; i < iterations; ++i) {
#pragma GCC unroll 32
    for (int k = 0; k < kSums; ++k) {
      CCNET_IN_REGISTER(a);  // to the compiler another number: it cannot multiply once for all
      sums[k] = multiply_add<Product>(sums[k], a, b);
    }
  }
  double total = 0;
  for (const Vector<Word>& sum : sums) {
    for (int lane = 0; lane < kLanes<Word>; ++lane) {
      total += sum[lane];
    }
  }
  return static_cast<int64_t>(total);
}

#if CCNET_TARGET == CCNET_TARGET_AVX512_BF16
CCNET_PEAK(bfloat16, Pairs)
#else
CCNET_PEAK(float32, Singles<float>)
CCNET_PEAK(float64, Singles<double>)
#endif

}  // namespace CCNET_CAPABILITY
}  // namespace ccnet

#include "libs/csrc/cpu/target_end.h"

#endif
