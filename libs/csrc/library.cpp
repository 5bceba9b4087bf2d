// The operator library: one name for all native operators. Those of criss-cross attention are declared in
// cc_attention/csrc.
#include <torch/csrc/stable/library.h>

#include <string>

#include "libs/csrc/cpu/capability.h"

#if defined(__clang__)
#define CCNET_COMPILER __VERSION__
#else
#define CCNET_COMPILER "GCC " __VERSION__
#endif

namespace {

std::string cpu_capability() { return ccnet::name_of(ccnet::cpu_capability()); }

std::string cpu_build() { return CCNET_COMPILER "; " + std::string(ccnet::name_of(ccnet::kBestBuilt)); }

}  // namespace

STABLE_TORCH_LIBRARY(ccnet, m) {
  // The instruction set that the CPU kernels use: baseline, avx2, avx512 or avx512_bf16
  m.def("cpu_capability() -> str");
  // What made the library: "GCC 12.2.0; avx512_bf16", the compiler and the best instruction set that there is code for
  m.def("cpu_build() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(ccnet, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&cpu_capability));
  m.impl("cpu_build", TORCH_BOX(&cpu_build));
}
