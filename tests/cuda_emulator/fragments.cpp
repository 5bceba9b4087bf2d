// One warp that runs a wrapper of tensor-core instructions on registers that a test gives it, lane by lane.
#include "libs/csrc/cuda/scalar_types.cuh"

namespace {

using namespace ccnet;

template <class T>
__global__ void mma_kernel(const uint32_t* a, const uint32_t* b, float* d) {
  const int lane = threadIdx.x;
  const uint32_t left[4] = {a[lane * 4], a[lane * 4 + 1], a[lane * 4 + 2], a[lane * 4 + 3]};
  float* const sums = d + lane * 4;
  mma_m16n8k16<T>(sums[0], sums[1], sums[2], sums[3], left, b[lane * 2], b[lane * 2 + 1]);
}

__global__ void mma_tf32_kernel(const uint32_t* a, const uint32_t* b, float* d) {
  const int lane = threadIdx.x;
  uint32_t left[4];
  for (int i = 0; i < 4; ++i) {
    left[i] = rounded_to_tf32(a[lane * 4 + i]);
  }
  float* const sums = d + lane * 4;
  mma_m16n8k8_tf32(sums[0], sums[1], sums[2], sums[3], left, rounded_to_tf32(b[lane * 2]),
                   rounded_to_tf32(b[lane * 2 + 1]));
}

// rows: of four matrices of 8x8, 16 bytes each
template <bool kTransposed>
__global__ void ldmatrix_kernel(const uint4* rows, uint32_t* x) {
  SharedCarver carver;
  uint4* const shared = carver.take<uint4>(32);
  const int lane = threadIdx.x;
  store_shared(shared + lane, rows[lane]);
  __syncwarp();
  uint32_t registers[4];
  if (kTransposed) {
    ldmatrix_x4_trans(registers, shared + lane);
  } else {
    ldmatrix_x4(registers, shared + lane);
  }
  for (int i = 0; i < 4; ++i) {
    x[lane * 4 + i] = registers[i];
  }
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))
EXPORT int run_mma(int is_half, const uint32_t* a, const uint32_t* b, float* d) {
  return ccnet::launch(is_half ? mma_kernel<Half> : mma_kernel<BFloat16>, 1, 32, 0, nullptr, a, b, d);
}
EXPORT int run_mma_tf32(const uint32_t* a, const uint32_t* b, float* d) {
  return ccnet::launch(mma_tf32_kernel, 1, 32, 0, nullptr, a, b, d);
}
EXPORT int run_ldmatrix(int transposed, const uint4* rows, uint32_t* x) {
  return ccnet::launch(transposed ? ldmatrix_kernel<true> : ldmatrix_kernel<false>, 1, 32, 512, nullptr, rows, x);
}
