// The kernels of activated batch norm that the compiled instruction sets offer (abn_vectors.h), and what calls them
// (abn.cpp). Each works on one block of elements that lie side by side.
#pragma once

#include <cstdint>

#include "libs/csrc/activation.h"
#include "libs/csrc/cpu/scalar_types.h"

namespace ccnet {

// [rows, length] elements. They are of one channel, whose number is the first of each array of numbers, or column i is
// of the channel of number i. Arrays of numbers to read then end with kNumbersBeyond more.
struct Block {
  int64_t rows;
  int64_t length;
  bool one_channel;
};
constexpr int64_t kNumbersBeyond = 16;

// y = (x - shift) * scale + offset. Taking off the mean first, rounded to shift, loses nothing where x is near it; what
// the rounding left out is in offset.
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

  // Of each channel's elements: the mean, and the sum of squared deviations from it
  void (*statistics)(const Block&, const T* x, double* mean, double* squares);
  // z = activation(y + residual); z may be x. Here and below residual may be null, for 0.
  void (*forward)(const Block&, ActivationOf, const T* x, AffineNumbers<Real>, const T* residual, T* z);
  // Of each channel's elements: the sums of dy and of dy * (y - bias)
  void (*backward_sums)(const Block&, ActivationOf, const T* z, const T* grad_z, const T* residual, const Real* bias,
                        double* sum, double* product_sum);
  // past_caches: the gradients are too large to be read from a cache afterwards.
  void (*backward)(const Block&, ActivationOf, const T* z, const T* grad_z, const T* residual, GradientNumbers<Real>,
                   T* grad_x, T* grad_residual, bool past_caches);
};

// For the instruction set that cpu_capability() names
template <class T>
const AbnKernels<T>& abn_kernels();

// clang-format off
namespace baseline {
const AbnKernels<float>& abn_kernels(const float*);
const AbnKernels<double>& abn_kernels(const double*);
const AbnKernels<Half>& abn_kernels(const Half*);
const AbnKernels<BFloat16>& abn_kernels(const BFloat16*);
}
namespace avx2 {
const AbnKernels<float>& abn_kernels(const float*);
const AbnKernels<double>& abn_kernels(const double*);
const AbnKernels<Half>& abn_kernels(const Half*);
const AbnKernels<BFloat16>& abn_kernels(const BFloat16*);
}
namespace avx512 {
const AbnKernels<float>& abn_kernels(const float*);
const AbnKernels<double>& abn_kernels(const double*);
const AbnKernels<Half>& abn_kernels(const Half*);
const AbnKernels<BFloat16>& abn_kernels(const BFloat16*);
}
namespace avx512_bf16 {
const AbnKernels<BFloat16>& abn_kernels(const BFloat16*);
}
// clang-format on

}  // namespace ccnet
