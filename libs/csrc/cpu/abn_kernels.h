// The interface between the kernels of activated batch norm, compiled for each instruction set (abn_vectors.h), and the
// operators that call them (abn.cpp). A kernel works on one block of contiguous elements.
#pragma once

#include <cstdint>

#include "libs/csrc/activation.h"
#include "libs/csrc/cpu/capability.h"
#include "libs/csrc/cpu/scalar_types.h"

namespace ccnet {

// [rows, length] elements. Either all belong to one channel, and kernels read only the first element of arrays with one
// number per channel; or column i has its own number i. These arrays then have kNumbersBeyond more elements at the end, so
// that kernels can read whole vectors.
struct Block {
  int64_t rows;
  int64_t length;
  bool one_channel;
};
constexpr int64_t kNumbersBeyond = 16;

// y = (x - shift) * scale + offset, dx = dy * scale + deviation * of_deviation + constant, where the deviation is x - shift,
// or y - shift if x is not kept (../channel.h). The forward pass reads the first three only.
template <class Real>
struct ChannelNumbers {
  const Real *shift, *scale, *offset, *of_deviation, *constant;
  __attribute__((always_inline)) ChannelNumbers from(int64_t i) const {
    return {shift + i, scale + i, offset + i, of_deviation + i, constant + i};
  }
};

// What the backward pass has: z, and the residual, if there was one; or, if the activation cannot be inverted, x, and z,
// if there was a residual. What there is not is null.
template <class T>
struct KeptData {
  const T *x, *z, *residual;
};

template <class T>
struct AbnKernels {
  using Real = Accumulate<T>;

  // For each channel: the mean of its elements, and the sum of squared deviations from that mean
  void (*statistics)(const Block&, const T* x, double* mean, double* squares);
  // z = activation(y + residual); z may be x, residual null.
  void (*forward)(const Block&, ActivationOf, const T* x, ChannelNumbers<Real>, const T* residual, T* z);
  // For each channel: the sums over its elements of dy and of dy * deviation
  void (*backward_sums)(const Block&, ActivationOf, KeptData<T>, const T* grad_z, ChannelNumbers<Real>, double* sum,
                        double* deviation_sum);
  // grad_residual may be null. past_caches: write the gradients with non-temporal stores, because they are larger than
  // the caches.
  void (*backward)(const Block&, ActivationOf, KeptData<T>, const T* grad_z, ChannelNumbers<Real>, T* grad_x,
                   T* grad_residual, bool past_caches);
};

CCNET_DECLARE_KERNELS(AbnKernels, abn_kernels)

}  // namespace ccnet
