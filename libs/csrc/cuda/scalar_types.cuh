// Element types of tensors as the CUDA kernels see them.
#pragma once

#include "libs/csrc/cuda/primitives.cuh"

namespace ccnet {

using Half = __half;
using BFloat16 = __nv_bfloat16;

// The type that sums are made in, and that statistics are kept in.
template <class T>
struct AccumulateOf {
  using type = float;
};
template <>
struct AccumulateOf<double> {
  using type = double;
};
template <class T>
using Accumulate = typename AccumulateOf<T>::type;

__device__ __forceinline__ float up(float x) { return x; }
__device__ __forceinline__ double up(double x) { return x; }
__device__ __forceinline__ float up(Half x) { return __half2float(x); }
__device__ __forceinline__ float up(BFloat16 x) { return __bfloat162float(x); }

template <class T>
__device__ __forceinline__ T down(Accumulate<T> x) {
  if constexpr (std::is_same_v<T, Half>) {
    return __float2half_rn(x);
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    return __float2bfloat16_rn(x);
  } else {
    return x;
  }
}

__host__ __device__ constexpr int round_up(int x, int to) { return (x + to - 1) / to * to; }

// For results that are rounded to T
template <class T>
__device__ __forceinline__ Accumulate<T> exponential(Accumulate<T> x) {
  if constexpr (sizeof(T) == 2) {
    return __expf(x);
  } else if constexpr (sizeof(T) == 4) {
    return expf(x);
  } else {
    return exp(x);
  }
}

// kCount elements that lie side by side and are moved at once
template <class T, int kCount>
struct alignas(sizeof(T) * kCount < 16 ? sizeof(T) * kCount : 16) Run {
  T x[kCount];
};

}  // namespace ccnet
