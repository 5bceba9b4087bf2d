#include "libs/csrc/cpu/capability.h"

#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>

namespace ccnet {
namespace {

constexpr Capability kAll[] = {Capability::baseline, Capability::avx2, Capability::avx512, Capability::avx512_bf16};

// Each level has all of the ones before.
Capability best() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  // The kernels for AVX2 also use F16C, which every CPU with AVX2 has and not every compiler can ask for.
  if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))) {
    return Capability::baseline;
  }
  if (!(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))) {
    return Capability::avx2;
  }
  // Its own test: the first AVX-512 machines do not have it, and would stop at an illegal instruction.
  return __builtin_cpu_supports("avx512bf16") ? Capability::avx512_bf16 : Capability::avx512;
#else
  return Capability::baseline;
#endif
}

}  // namespace

const char* name_of(Capability capability) {
  switch (capability) {
    case Capability::baseline:
      return "baseline";
    case Capability::avx2:
      return "avx2";
    case Capability::avx512:
      return "avx512";
    case Capability::avx512_bf16:
      return "avx512_bf16";
  }
  return "";
}

Capability cpu_capability() {
  static const Capability supported = std::min(best(), kBestBuilt);
  const char* wanted = std::getenv("CCNET_CPU_CAPABILITY");
  if (wanted == nullptr || *wanted == '\0') {
    return supported;
  }
  for (Capability capability : kAll) {
    if (std::strcmp(wanted, name_of(capability)) == 0) {
      STD_TORCH_CHECK(capability <= supported, "CCNET_CPU_CAPABILITY=", wanted, ": this CPU has no more than ",
                      name_of(best()), ", and the library no more than ", name_of(kBestBuilt));
      return capability;
    }
  }
  STD_TORCH_CHECK(false, "CCNET_CPU_CAPABILITY=", wanted, ": expected baseline, avx2, avx512 or avx512_bf16");
  return supported;
}

}  // namespace ccnet
