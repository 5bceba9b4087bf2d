#include "libs/csrc/cuda/abn_kernels.cuh"

template struct ccnet::AbnLaunchers<ccnet::Half, float>;
