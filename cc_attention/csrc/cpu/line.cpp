#include "cc_attention/csrc/cpu/line.h"

#include <type_traits>

#include "libs/csrc/cpu/capability.h"

namespace ccnet {

template <class T>
const LineKernels<T>& line_kernels() {
  const Capability capability = cpu_capability();
  const T* type = nullptr;
#if defined(__x86_64__)
  if constexpr (std::is_same_v<T, BFloat16>) {
    if (capability == Capability::avx512_bf16) {
      return avx512_bf16::line_kernels(type);
    }
  }
  if (capability >= Capability::avx512) {
    return avx512::line_kernels(type);
  }
  if (capability == Capability::avx2) {
    return avx2::line_kernels(type);
  }
#endif
  return baseline::line_kernels(type);
}

template const LineKernels<float>& line_kernels();
template const LineKernels<double>& line_kernels();
template const LineKernels<Half>& line_kernels();
template const LineKernels<BFloat16>& line_kernels();

}  // namespace ccnet
