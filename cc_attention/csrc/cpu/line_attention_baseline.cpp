#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

#define CCNET_TARGET CCNET_TARGET_BASELINE
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
namespace baseline {

const LineKernels<float>& line_kernels(const float*) { return kernels_of<Singles<float>, float>(); }
const LineKernels<double>& line_kernels(const double*) { return kernels_of<Singles<double>, double>(); }
const LineKernels<Half>& line_kernels(const Half*) { return kernels_of<Singles<float>, Half>(); }
const LineKernels<BFloat16>& line_kernels(const BFloat16*) { return kernels_of<Singles<float>, BFloat16>(); }

}  // namespace baseline
}  // namespace ccnet

#include "libs/csrc/cpu/target_end.h"
