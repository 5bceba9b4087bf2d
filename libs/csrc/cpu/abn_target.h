// Everything that abn_*.cpp compile for the instruction set that they name in CCNET_TARGET.

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "libs/csrc/cpu/abn_kernels.h"
// clang-format off: the order matters
#include "libs/csrc/cpu/target_begin.h"
#include "libs/csrc/cpu/simd.h"

namespace ccnet {
namespace CCNET_CAPABILITY {
#include "libs/csrc/activation_functions.h"
}  // namespace CCNET_CAPABILITY
}  // namespace ccnet

#include "libs/csrc/cpu/abn_vectors.h"
// clang-format on

namespace ccnet {
namespace CCNET_CAPABILITY {

#if CCNET_TARGET != CCNET_TARGET_AVX512_BF16
const AbnKernels<float>& abn_kernels(const float*) { return kernels_of<float>(); }
const AbnKernels<double>& abn_kernels(const double*) { return kernels_of<double>(); }
const AbnKernels<Half>& abn_kernels(const Half*) { return kernels_of<Half>(); }
#endif
const AbnKernels<BFloat16>& abn_kernels(const BFloat16*) { return kernels_of<BFloat16>(); }

}  // namespace CCNET_CAPABILITY
}  // namespace ccnet

#include "libs/csrc/cpu/target_end.h"
