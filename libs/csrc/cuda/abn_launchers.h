// Activated batch norm on the GPU: what the operators (abn.cu) call.
#pragma once

#include <cstdint>

#include "libs/csrc/activation.h"
#include "libs/csrc/cuda/scalar_types.cuh"

namespace ccnet {

// A tensor [rows, row_length] cut among blocks of threads: rows and columns of channels_last, where a column is a
// channel, or planes of NCHW, where a row is. A block has `columns` threads side by side, each with a pack of elements
// that is moved at once, and goes over a part of the rows; or it goes over a part of a plane.
//
// How it is cut depends on the tensor's shape and alignment only, and with it the order in which sums are added up.
struct Pieces {
  bool planes;
  int pack;     // elements: 16 bytes, or 1
  int columns;  // a power of two; planes: 1
  int64_t channels, rows, row_length;
  int64_t groups;  // of columns; planes: planes
  int64_t parts;   // of the rows, or of a plane
  int steps;       // that a thread takes at most
  int64_t blocks() const { return groups * parts; }
  // Blocks that have elements of the same channel, each of which leaves sums of its own
  int64_t slots() const { return planes ? rows / channels * parts : parts; }
};

// weight and bias may be nullptr. `numbers` and `partial` are scratch.
template <class T, class Real>
struct AbnLaunchers {
  static constexpr int kNumbers = 4;  // a channel, of Real

  struct Affine {
    const Real *weight, *bias;
    double eps;
    ActivationOf activation;
  };

  // statistics [3, C]; partial [slots, 3, C]
  static cudaError_t statistics(const Pieces&, const T* x, double* partial, double* statistics, cudaStream_t);
  // z may be x.
  static cudaError_t forward(const Pieces&, const T* x, const double* statistics, const Affine&, Real* numbers, T* z,
                             cudaStream_t);
  // sums [2, C]; partial [slots, 2, C]
  static cudaError_t backward_sums(const Pieces&, const T* z, const T* grad_z, const Affine&, double* partial,
                                   double* sums, cudaStream_t);
  // sums: nullptr where the statistics are constants
  static cudaError_t backward(const Pieces&, const T* z, const T* grad_z, const double* statistics, const double* sums,
                              const Affine&, Real* numbers, T* grad_x, cudaStream_t);
};

// Real: float or double; in abn_float.cu and abn_double.cu
template <class Real>
cudaError_t update_running_statistics(const double* statistics, double momentum, int64_t channels, Real* running_mean,
                                      Real* running_var, cudaStream_t);

}  // namespace ccnet
