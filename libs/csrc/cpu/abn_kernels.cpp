#include "libs/csrc/cpu/abn_kernels.h"

#include <type_traits>

#include "libs/csrc/cpu/capability.h"

namespace ccnet {

template <class T>
const AbnKernels<T>& abn_kernels() {
  const Capability capability = cpu_capability();
  const T* type = nullptr;
#if defined(__x86_64__)
  if constexpr (std::is_same_v<T, BFloat16>) {
    if (capability == Capability::avx512_bf16) {
      return avx512_bf16::abn_kernels(type);
    }
  }
  if (capability >= Capability::avx512) {
    return avx512::abn_kernels(type);
  }
  if (capability == Capability::avx2) {
    return avx2::abn_kernels(type);
  }
#endif
  return baseline::abn_kernels(type);
}

template const AbnKernels<float>& abn_kernels();
template const AbnKernels<double>& abn_kernels();
template const AbnKernels<Half>& abn_kernels();
template const AbnKernels<BFloat16>& abn_kernels();

}  // namespace ccnet
