// What operators on the GPU have in common: the device and the stream that they run on, and reporting of errors.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>

#include "libs/csrc/cuda/scalar_types.cuh"
#include "libs/csrc/dtype.h"

#ifdef __CUDACC__
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#endif

// Where the operators are registered. Tests register the same functions, emulated, elsewhere.
#ifndef CCNET_CUDA_LIBRARY
#define CCNET_CUDA_LIBRARY ccnet
#define CCNET_CUDA_KEY CUDA
#endif

namespace ccnet {

// While it lives, x's device is the current one.
class OnDeviceOf {
#ifdef __CUDACC__
 public:
  explicit OnDeviceOf(const torch::stable::Tensor& x) : guard_(x.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
  cudaStream_t stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
#else
 public:
  explicit OnDeviceOf(const torch::stable::Tensor&) {}
  cudaStream_t stream() const { return nullptr; }
#endif
};

// f(T*), T being the type of x's elements; what f returns is checked.
template <class F>
void run_for_type(const char* name, const torch::stable::Tensor& x, const F& f) {
  const cudaError_t error = for_element_type<Half, BFloat16>(name, x, f);
  STD_TORCH_CHECK(error == cudaSuccess, name, ": ", text_of(error));
}

}  // namespace ccnet
