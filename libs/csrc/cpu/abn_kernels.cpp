#include "libs/csrc/cpu/abn_kernels.h"

namespace ccnet {
CCNET_DEFINE_KERNELS(AbnKernels, abn_kernels)
}  // namespace ccnet
