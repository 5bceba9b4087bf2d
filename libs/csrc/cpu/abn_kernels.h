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

// y = (x - shift) * scale + offset. shift is the mean rounded to Real: subtracting it first is exact where x is near the
// mean. offset accounts for the rounding.
template <class Real>
struct AffineNumbers {
  const Real *shift, *scale, *offset;
  __attribute__((always_inline)) AffineNumbers from(int64_t i) const { return {shift + i, scale + i, offset + i}; }
};

// dx = dy * of_grad + (y - bias) * of_deviation + constant
template <class Real>
struct GradientNumbers {
  const Real *bias, *of_grad, *of_deviation, *constant;
  __attribute__((always_inline)) GradientNumbers from(int64_t i) const {
    return {bias + i, of_grad + i, of_deviation + i, constant + i};
  }
};

template <class T>
struct AbnKernels {
  using Real = Accumulate<T>;

  // For each channel: the mean of its elements, and the sum of squared deviations from that mean
  void (*statistics)(const Block&, const T* x, double* mean, double* squares);
  // z = activation(y + residual); z may be x. Here and below, residual is null if there is none.
  void (*forward)(const Block&, ActivationOf, const T* x, AffineNumbers<Real>, const T* residual, T* z);
  // For each channel: the sums over its elements of dy and of dy * (y - bias)
  void (*backward_sums)(const Block&, ActivationOf, const T* z, const T* grad_z, const T* residual, const Real* bias,
                        double* sum, double* product_sum);
  // past_caches: write the gradients with non-temporal stores, because they are larger than the caches.
  void (*backward)(const Block&, ActivationOf, const T* z, const T* grad_z, const T* residual, GradientNumbers<Real>,
                   T* grad_x, T* grad_residual, bool past_caches);
};

CCNET_DECLARE_KERNELS(AbnKernels, abn_kernels)

}  // namespace ccnet
