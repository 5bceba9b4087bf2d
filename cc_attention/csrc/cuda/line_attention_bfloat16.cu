#include "cc_attention/csrc/cuda/line_attention.cuh"

template struct ccnet::LineAttentionLaunchers<ccnet::BFloat16, float>;
