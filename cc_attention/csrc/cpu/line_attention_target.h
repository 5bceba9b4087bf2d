// Everything that line_attention_*.cpp compile for the instruction set that they name in CCNET_TARGET.

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

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
namespace CCNET_CAPABILITY {

#if CCNET_TARGET == CCNET_TARGET_AVX512_BF16
const LineKernels<BFloat16>& line_kernels(const BFloat16*) { return kernels_of<Pairs, BFloat16>(); }
#else
const LineKernels<float>& line_kernels(const float*) { return kernels_of<Singles<float>, float>(); }
const LineKernels<double>& line_kernels(const double*) { return kernels_of<Singles<double>, double>(); }
const LineKernels<Half>& line_kernels(const Half*) { return kernels_of<Singles<float>, Half>(); }
const LineKernels<BFloat16>& line_kernels(const BFloat16*) { return kernels_of<Singles<float>, BFloat16>(); }
#endif

}  // namespace CCNET_CAPABILITY
}  // namespace ccnet

#include "libs/csrc/cpu/target_end.h"
