#include "libs/csrc/cuda/abn_kernels.cuh"

template struct ccnet::AbnLaunchers<double, double>;
template cudaError_t ccnet::update_running_statistics(const double*, double, int64_t, double*, double*, cudaStream_t);
