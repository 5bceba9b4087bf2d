// Activated batch norm on the GPU: what the operators (abn.cu) call.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>

#include "libs/csrc/activation.h"
#include "libs/csrc/cuda/scalar_types.cuh"

namespace ccnet {

constexpr int kAbnThreads = 256;  // a block

// A tensor cut among blocks of threads. Of channels_last, rows of all channels, a block has a part of the rows and some
// columns side by side, each a pack of elements that is moved at once; of NCHW, a part of the planes of one channel.
//
// How it is cut depends on the tensor's shape and alignment only, and with it the order in which sums are added up.
struct Pieces {
  bool planes;
  int pack;     // elements: 16 bytes, or 1
  int columns;  // that a block has, a power of two; planes: 1
  int steps;    // that a thread takes at most
  int64_t channels, rows, row_length;  // planes: a row is a plane
  int64_t groups;                      // of columns; planes: channels
  int64_t parts;                       // of the packs along a column, or of a channel's planes
  int64_t blocks() const { return groups * parts; }
  // Rows of row_length at data, and tensors like it at the others
  static Pieces cut(bool planes, int64_t channels, int64_t rows, int64_t row_length, int element_bytes,
                    std::initializer_list<const void*> data);

  __host__ __device__ int64_t row_packs() const { return row_length / pack; }
  // Packs along a column, or of a channel's planes, and how many of them a block has
  __host__ __device__ int64_t along() const { return planes ? rows / channels * row_packs() : rows; }
  __host__ __device__ int64_t along_block() const { return int64_t{steps} * (kAbnThreads / columns); }
  __host__ __device__ int block_channels() const { return planes ? 1 : columns * pack; }
};

inline Pieces Pieces::cut(bool planes, int64_t channels, int64_t rows, int64_t row_length, int element_bytes,
                          std::initializer_list<const void*> data) {
  // 8 columns are 128 bytes side by side. A block's sums cost about as much as some steps; every block of the backward
  // pass adds up those of all parts.
  constexpr int64_t most_columns = 8, enough_blocks = 1024, most_parts = 128, fewest_steps = 16;
  const int whole = 16 / element_bytes;
  const bool aligned = row_length % whole == 0 && std::all_of(data.begin(), data.end(), [](const void* p) {
                         return reinterpret_cast<uintptr_t>(p) % 16 == 0;
                       });
  Pieces pieces{planes, aligned ? whole : 1, 1, 0, channels, rows, row_length, channels, 0};
  if (!planes) {
    while (pieces.columns < std::min(pieces.row_packs(), most_columns)) {
      pieces.columns *= 2;
    }
    pieces.groups = (pieces.row_packs() + pieces.columns - 1) / pieces.columns;
  }
  const auto divided = [](int64_t x, int64_t by) { return (x + by - 1) / by; };
  const int64_t packs = pieces.along() * pieces.columns;
  const int64_t parts = std::clamp<int64_t>(enough_blocks / std::max<int64_t>(pieces.groups, 1), 1, most_parts);
  pieces.steps = static_cast<int>(std::max(fewest_steps, divided(packs, kAbnThreads * parts)));
  pieces.parts = divided(pieces.along(), pieces.along_block());
  return pieces;
}

// What the numbers of a channel are made of (../channel.h); weight and bias may be nullptr.
template <class Real>
struct ChannelSources {
  const Real *normaliser, *weight, *bias;
  Real eps;
};

template <class Real>
struct RunningStatistics {
  Real *mean, *var;
  double momentum;
};

// What the backward pass has: z and the residual, or, if the activation cannot be inverted, x and z. The second may be
// nullptr.
template <class T>
struct KeptData {
  const T *first, *second, *grad_z;
};

// The sums over the elements of each channel of dy and dy * deviation: parts of them [parts, 2, C], none if they are 0.
template <class Real>
struct GradientSums {
  const Real* data;
  int64_t parts;
};

template <class T, class Real>
struct AbnLaunchers {
  // To partial, [parts, 3, C]: for each block and channel, a number near the mean, and the sums of deviations from it and
  // of their squares
  static cudaError_t moments(const Pieces&, const T* x, Real* partial, cudaStream_t);
  // z may be x, residual nullptr.
  static cudaError_t forward(const Pieces&, const T* x, const ChannelSources<Real>&, const ActivationOf&,
                             const T* residual, T* z, cudaStream_t);
  // To partial, [parts, 2, C]
  static cudaError_t backward_sums(const Pieces&, const KeptData<T>&, const ChannelSources<Real>&, const ActivationOf&,
                                   Real* partial, cudaStream_t);
  // grad_residual, and grad_weight with grad_bias, may be nullptr.
  static cudaError_t backward(const Pieces&, const KeptData<T>&, const ChannelSources<Real>&, const ActivationOf&,
                              const GradientSums<Real>&, T* grad_x, T* grad_residual, Real* grad_weight, Real* grad_bias,
                              cudaStream_t);
};

// In abn_float.cu and abn_double.cu, for these two
template <class Real>
struct AbnChannels {
  // Of the moments that the blocks of these pieces left: statistics, [3, C], as of abn_statistics
  static cudaError_t statistics(const Pieces&, const Real* partial, double* statistics, cudaStream_t);
  // or normaliser and running statistics
  static cudaError_t normaliser(const Pieces&, const Real* partial, const RunningStatistics<Real>&, double eps,
                                Real* normaliser, cudaStream_t);
  // Of statistics [parts, 3, C]
  static cudaError_t normaliser(const double* statistics, int64_t parts, int64_t channels,
                                const RunningStatistics<Real>&, double eps, Real* normaliser, cudaStream_t);
  // Of the running statistics as constants
  static cudaError_t normaliser(int64_t channels, const Real* running_mean, const Real* running_var, double eps,
                                Real* normaliser, cudaStream_t);
  // sums [2, C], and the gradients of the parameters
  static cudaError_t gradient_sums(const GradientSums<Real>&, int64_t channels, const ChannelSources<Real>&, bool has_x,
                                   Real* sums, Real* grad_weight, Real* grad_bias, cudaStream_t);
};

}  // namespace ccnet
