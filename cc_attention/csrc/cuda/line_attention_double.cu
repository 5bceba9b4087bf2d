#include "cc_attention/csrc/cuda/launchers.cuh"

template struct ccnet::LineAttentionLaunchers<double, double>;
