// What code this library has: nvcc compiles it once for each architecture, and a device runs the one that suits it.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <string>

#include "libs/csrc/cuda/operators.h"
#include "libs/csrc/cuda/primitives.cuh"

#define CCNET_TEXT_OF(...) #__VA_ARGS__
#define CCNET_TEXT(...) CCNET_TEXT_OF(__VA_ARGS__)

namespace ccnet {

static __global__ void image_kernel() {}  // never launched

cudaError_t architecture_of_code(int& architecture) {
  cudaFuncAttributes of_kernel;
  const cudaError_t error = cudaFuncGetAttributes(&of_kernel, image_kernel);
  // From PTX, the driver makes code for the device (binaryVersion) with the instructions of the PTX.
  architecture = error == cudaSuccess ? std::min(of_kernel.ptxVersion, of_kernel.binaryVersion) : 0;
  return forget(error);
}

namespace {

int64_t cuda_architecture(int64_t device) {
  const torch::stable::accelerator::DeviceGuard guard(static_cast<int32_t>(device));
  int architecture = 0;
  const cudaError_t error = architecture_of_code(architecture);
  const bool no_code = error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction ||
                       error == cudaErrorUnsupportedPtxVersion;
  STD_TORCH_CHECK(error == cudaSuccess || no_code, "cuda:", device, ": ", text_of(error));
  return architecture;
}

// cudart refuses a driver of an older major version: cudaErrorInsufficientDriver. Asked by version, since every other
// question makes a context.
std::string cuda_driver_problem() {
  int driver = 0, runtime = 0;
  STD_TORCH_CHECK(cudaDriverGetVersion(&driver) == cudaSuccess && cudaRuntimeGetVersion(&runtime) == cudaSuccess,
                  "no versions of CUDA's driver and runtime");
  if (driver == 0 || driver / 1000 >= runtime / 1000) {
    return "";
  }
  return "it is of CUDA " + std::to_string(runtime / 1000) + ", and the GPU's driver runs no newer code than CUDA " +
         std::to_string(driver / 1000) + "." + std::to_string(driver % 1000 / 10) + "'s";
}

std::string cuda_build() {
  return "CUDA " CCNET_TEXT(__CUDACC_VER_MAJOR__) "." CCNET_TEXT(__CUDACC_VER_MINOR__) "; " CCNET_TEXT(__CUDA_ARCH_LIST__);
}

}  // namespace
}  // namespace ccnet

STABLE_TORCH_LIBRARY_FRAGMENT(ccnet, m) {
  // The architecture of the code that runs on that device, 75 for sm_75; 0 if there is none for it
  m.def("cuda_architecture(int device) -> int");
  // What made the library: "CUDA 13.0; 750,800", the release of nvcc and ten times the architectures
  m.def("cuda_build() -> str");
  // Why the driver cannot run the library; empty if it can, or if there is no driver
  m.def("cuda_driver_problem() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(ccnet, CompositeExplicitAutograd, m) {
  m.impl("cuda_architecture", TORCH_BOX(&ccnet::cuda_architecture));
  m.impl("cuda_build", TORCH_BOX(&ccnet::cuda_build));
  m.impl("cuda_driver_problem", TORCH_BOX(&ccnet::cuda_driver_problem));
}
