#define CCNET_TARGET CCNET_TARGET_BASELINE
#include "libs/csrc/cpu/abn_target.h"
