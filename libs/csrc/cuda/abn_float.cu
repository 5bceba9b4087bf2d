#include "libs/csrc/cuda/abn_channels.cuh"
#include "libs/csrc/cuda/abn_kernels.cuh"

template struct ccnet::AbnLaunchers<float, float>;
template struct ccnet::AbnChannels<float>;
