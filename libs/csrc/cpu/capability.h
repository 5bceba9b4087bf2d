// Which of the compiled instruction sets the kernels use, decided at run time.
#pragma once

namespace ccnet {

enum class Capability { baseline, avx2, avx512, avx512_bf16 };

// The best that this CPU has, or what the environment variable CCNET_CPU_CAPABILITY names. Throws when that is not one
// of baseline, avx2, avx512, avx512_bf16, or is beyond this CPU.
Capability cpu_capability();

const char* name_of(Capability capability);

}  // namespace ccnet
