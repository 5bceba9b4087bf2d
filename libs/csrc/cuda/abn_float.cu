#include "libs/csrc/cuda/abn_kernels.cuh"

template struct ccnet::AbnLaunchers<float, float>;
template cudaError_t ccnet::update_running_statistics(const double*, double, int64_t, float*, float*, cudaStream_t);
