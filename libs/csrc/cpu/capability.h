// The choice, at run time, among the instruction sets that the kernels are compiled for.
#pragma once

#include <type_traits>

#include "libs/csrc/cpu/scalar_types.h"

namespace ccnet {

enum class Capability { baseline, avx2, avx512, avx512_bf16 };

// The best instruction set that there are kernels for: the build leaves those out that the compiler fails at.
#if !defined(__x86_64__)
constexpr Capability kBestBuilt = Capability::baseline;
#elif defined(CCNET_BEST_CAPABILITY)
constexpr Capability kBestBuilt = Capability::CCNET_BEST_CAPABILITY;
#else
constexpr Capability kBestBuilt = Capability::avx512_bf16;
#endif

// The best instruction set of this CPU and of the build, or the one that the environment variable CCNET_CPU_CAPABILITY
// names. Throws if that is none of baseline, avx2, avx512, avx512_bf16, or one that the CPU or the build does not have.
Capability cpu_capability();

const char* name_of(Capability capability);

// Every instruction set is a namespace, which defines `kernels(const T*)`: its table of kernels for elements of type T. (The
// pointer is null and only chooses the overload.) avx512_bf16 has one for BFloat16 only; other types use that of avx512.
//
// CCNET_DECLARE_KERNELS declares these functions, and `kernels<T>()`, which returns the table of the instruction set that
// cpu_capability() names. CCNET_DEFINE_KERNELS defines the latter.
#define CCNET_DECLARE_KERNELS_OF_ALL_TYPES(Table, kernels) \
  const Table<float>& kernels(const float*);               \
  const Table<double>& kernels(const double*);             \
  const Table<Half>& kernels(const Half*);                 \
  const Table<BFloat16>& kernels(const BFloat16*);
#define CCNET_DECLARE_KERNELS(Table, kernels)           \
  template <class T>                                    \
  const Table<T>& kernels();                            \
  namespace baseline {                                  \
  CCNET_DECLARE_KERNELS_OF_ALL_TYPES(Table, kernels)    \
  }                                                     \
  namespace avx2 {                                      \
  CCNET_DECLARE_KERNELS_OF_ALL_TYPES(Table, kernels)    \
  }                                                     \
  namespace avx512 {                                    \
  CCNET_DECLARE_KERNELS_OF_ALL_TYPES(Table, kernels)    \
  }                                                     \
  namespace avx512_bf16 {                               \
  const Table<BFloat16>& kernels(const BFloat16*);      \
  }

#define CCNET_DEFINE_KERNELS(Table, kernels)                             \
  template <class T>                                                     \
  const Table<T>& kernels() {                                            \
    [[maybe_unused]] const Capability capability = cpu_capability();     \
    const T* type = nullptr;                                             \
    if constexpr (kBestBuilt >= Capability::avx512_bf16 &&               \
                  std::is_same_v<T, BFloat16>) {                         \
      if (capability == Capability::avx512_bf16) {                       \
        return avx512_bf16::kernels(type);                               \
      }                                                                  \
    }                                                                    \
    if constexpr (kBestBuilt >= Capability::avx512) {                    \
      if (capability >= Capability::avx512) {                            \
        return avx512::kernels(type);                                    \
      }                                                                  \
    }                                                                    \
    if constexpr (kBestBuilt >= Capability::avx2) {                      \
      if (capability == Capability::avx2) {                              \
        return avx2::kernels(type);                                      \
      }                                                                  \
    }                                                                    \
    return baseline::kernels(type);                                      \
  }                                                                      \
  template const Table<float>& kernels();                                \
  template const Table<double>& kernels();                               \
  template const Table<Half>& kernels();                                 \
  template const Table<BFloat16>& kernels();

}  // namespace ccnet
