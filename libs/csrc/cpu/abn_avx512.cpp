#if defined(__x86_64__)
#define CCNET_TARGET CCNET_TARGET_AVX512
#include "libs/csrc/cpu/abn_target.h"
#endif
