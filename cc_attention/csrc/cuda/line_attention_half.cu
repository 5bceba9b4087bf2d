#include "cc_attention/csrc/cuda/launchers.cuh"

template struct ccnet::LineAttentionLaunchers<ccnet::Half, float>;
