#include "cc_attention/csrc/cpu/line.h"

namespace ccnet {
CCNET_DEFINE_KERNELS(LineKernels, line_kernels)
}  // namespace ccnet
