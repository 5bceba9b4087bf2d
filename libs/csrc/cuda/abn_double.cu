#include "libs/csrc/cuda/abn_channels.cuh"
#include "libs/csrc/cuda/abn_kernels.cuh"

template struct ccnet::AbnLaunchers<double, double>;
template struct ccnet::AbnChannels<double>;
