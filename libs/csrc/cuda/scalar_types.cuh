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

// Two elements of 16 bits, the first in the lower half
template <class T>
__device__ __forceinline__ uint32_t pair_of(float low, float high) {
  uint32_t bits;
  if constexpr (std::is_same_v<T, Half>) {
    const auto pair = __floats2half2_rn(low, high);
    memcpy(&bits, &pair, sizeof bits);
  } else {
    const auto pair = __floats2bfloat162_rn(low, high);
    memcpy(&bits, &pair, sizeof bits);
  }
  return bits;
}

__device__ __forceinline__ float2 numbers_of(const Half&, uint32_t pair) {
  __half2 x;
  memcpy(static_cast<void*>(&x), &pair, sizeof x);
  return __half22float2(x);
}
__device__ __forceinline__ float2 numbers_of(const BFloat16&, uint32_t pair) {
  __nv_bfloat162 x;
  memcpy(static_cast<void*>(&x), &pair, sizeof x);
  return __bfloat1622float2(x);
}
// Its two elements
template <class T>
__device__ __forceinline__ float2 numbers_of(uint32_t pair) {
  return numbers_of(T(), pair);
}

__host__ __device__ constexpr int round_up(int x, int to) { return (x + to - 1) / to * to; }

// Of a and NaN: a
__device__ __forceinline__ float greater(float a, float b) { return fmaxf(a, b); }
__device__ __forceinline__ double greater(double a, double b) { return fmax(a, b); }

// For results that are rounded to T
template <class T>
__device__ __forceinline__ Accumulate<T> exponential(Accumulate<T> x) {
  if constexpr (sizeof(T) == 2) {
    return exp2_approximate(x * 1.4426950408889634f);
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
