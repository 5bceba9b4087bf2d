#include "cc_attention/csrc/cuda/line_attention.cuh"

template struct ccnet::LineAttentionLaunchers<float, float>;
