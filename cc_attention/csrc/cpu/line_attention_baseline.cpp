#define CCNET_TARGET CCNET_TARGET_BASELINE
#include "cc_attention/csrc/cpu/line_attention_target.h"
