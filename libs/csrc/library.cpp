// The operator library: one name for all native operators. Those of criss-cross attention are declared in
// cc_attention/csrc.
#include <torch/csrc/stable/library.h>

#include <string>

#include "libs/csrc/cpu/capability.h"

namespace {

std::string cpu_capability() { return ccnet::name_of(ccnet::cpu_capability()); }

}  // namespace

STABLE_TORCH_LIBRARY(ccnet, m) {
  // The instruction set that the CPU kernels use: baseline, avx2, avx512 or avx512_bf16
  m.def("cpu_capability() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(ccnet, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&cpu_capability));
}
