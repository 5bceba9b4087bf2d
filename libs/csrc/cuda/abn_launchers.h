// Activated batch norm on the GPU: what the operators (abn.cu) call.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>

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
  // rows of row_length at data, and tensors like it at the others
  static Pieces cut(bool planes, int64_t channels, int64_t rows, int64_t row_length, int element_bytes,
                    std::initializer_list<const void*> data);
  // Blocks that have elements of the same channel, each of which leaves sums of its own
  int64_t slots() const { return planes ? rows / channels * parts : parts; }
};

inline Pieces Pieces::cut(bool planes, int64_t channels, int64_t rows, int64_t row_length, int element_bytes,
                          std::initializer_list<const void*> data) {
  constexpr int64_t threads = 256, most_columns = 32, enough_blocks = 1024;
  constexpr int64_t fewest_steps = 4, most_steps = 64;  // that float32 sums are accurate for; their sum is in float64
  const int whole = 16 / element_bytes;
  const bool aligned = row_length % whole == 0 && std::all_of(data.begin(), data.end(), [](const void* p) {
                         return reinterpret_cast<uintptr_t>(p) % 16 == 0;
                       });
  Pieces pieces{};
  pieces.planes = planes;
  pieces.pack = aligned ? whole : 1;
  pieces.channels = channels;
  pieces.rows = rows;
  pieces.row_length = row_length;
  const int64_t packs = row_length / pieces.pack;
  pieces.columns = 1;
  while (!planes && pieces.columns < std::min(packs, most_columns)) {
    pieces.columns *= 2;
  }
  pieces.groups = planes ? rows : (packs + pieces.columns - 1) / pieces.columns;
  const int64_t along = planes ? packs : rows, lanes = threads / pieces.columns;
  const int64_t parts = std::max<int64_t>(1, enough_blocks / std::max<int64_t>(1, pieces.groups));
  const int64_t steps = (along + lanes * parts - 1) / (lanes * parts);
  pieces.steps = static_cast<int>(std::clamp(steps, fewest_steps, most_steps));
  pieces.parts = (along + lanes * pieces.steps - 1) / (lanes * pieces.steps);
  return pieces;
}

// weight, bias, and residual with grad_residual, may be nullptr. `numbers` and `partial` are scratch.
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
  static cudaError_t forward(const Pieces&, const T* x, const double* statistics, const Affine&, const T* residual,
                             Real* numbers, T* z, cudaStream_t);
  // sums [2, C]; partial [slots, 2, C]
  static cudaError_t backward_sums(const Pieces&, const T* z, const T* grad_z, const Affine&, const T* residual,
                                   double* partial, double* sums, cudaStream_t);
  // sums: nullptr where the statistics are constants
  static cudaError_t backward(const Pieces&, const T* z, const T* grad_z, const double* statistics, const double* sums,
                              const Affine&, const T* residual, Real* numbers, T* grad_x, T* grad_residual,
                              cudaStream_t);
};

// Real: float or double; in abn_float.cu and abn_double.cu
template <class Real>
cudaError_t update_running_statistics(const double* statistics, double momentum, int64_t channels, Real* running_mean,
                                      Real* running_var, cudaStream_t);

}  // namespace ccnet
