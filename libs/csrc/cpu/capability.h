// Which of the compiled instruction sets the kernels use, decided at run time.
#pragma once

#include <type_traits>

namespace ccnet {

enum class Capability { baseline, avx2, avx512, avx512_bf16 };

// The best that this CPU has, or what the environment variable CCNET_CPU_CAPABILITY names. Throws when that is not one
// of baseline, avx2, avx512, avx512_bf16, or is beyond this CPU.
Capability cpu_capability();

const char* name_of(Capability capability);

// Defines `const Table<T>& kernels<T>()`: the table of kernels for elements of type T that the namespace of the instruction
// set named by cpu_capability() gives. avx512_bf16 has one for BFloat16 only; the other types use that of avx512.
#if defined(__x86_64__)
#define CCNET_CHOOSE_KERNELS(kernels)                  \
  if constexpr (std::is_same_v<T, BFloat16>) {         \
    if (capability == Capability::avx512_bf16) {       \
      return avx512_bf16::kernels(type);               \
    }                                                  \
  }                                                    \
  if (capability >= Capability::avx512) {              \
    return avx512::kernels(type);                      \
  }                                                    \
  if (capability == Capability::avx2) {                \
    return avx2::kernels(type);                        \
  }
#else
#define CCNET_CHOOSE_KERNELS(kernels) (void)capability;
#endif
#define CCNET_DEFINE_KERNELS(Table, kernels)           \
  template <class T>                                   \
  const Table<T>& kernels() {                          \
    const Capability capability = cpu_capability();    \
    const T* type = nullptr;                           \
    CCNET_CHOOSE_KERNELS(kernels)                      \
    return baseline::kernels(type);                    \
  }                                                    \
  template const Table<float>& kernels();              \
  template const Table<double>& kernels();             \
  template const Table<Half>& kernels();               \
  template const Table<BFloat16>& kernels();

}  // namespace ccnet
