#if defined(__x86_64__)
#define CCNET_TARGET CCNET_TARGET_AVX512
#include "cc_attention/csrc/cpu/line_attention_target.h"
#endif
