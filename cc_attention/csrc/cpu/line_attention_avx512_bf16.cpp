#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

#if defined(__x86_64__)
#include <immintrin.h>

#define CCNET_TARGET CCNET_TARGET_AVX512_BF16
#include "cc_attention/csrc/cpu/line.h"
// clang-format off: the order matters
#include "libs/csrc/cpu/target_begin.h"
#include "libs/csrc/cpu/simd.h"
#include "libs/csrc/cpu/scratch.h"
#include "cc_attention/csrc/cpu/transpose.h"
#include "cc_attention/csrc/cpu/matmul.h"
#include "cc_attention/csrc/cpu/line_attention.h"
// clang-format on

namespace ccnet {
namespace avx512_bf16 {

const LineKernels<BFloat16>& line_kernels(const BFloat16*) { return kernels_of<Pairs, BFloat16>(); }

}  // namespace avx512_bf16
}  // namespace ccnet

#include "libs/csrc/cpu/target_end.h"
#endif
