// Attention along one line of pixels, of which criss-cross attention is made: what the compiled instruction sets offer
// (line_attention.h), and what calls it (criss_cross.cpp).
//
// A pixel's channels follow each other. Numbers that there is one of a pixel, in [N, (D,) H, W], lie `step` apart from one
// pixel of the line to the next.
#pragma once

#include <cstdint>

#include "libs/csrc/cpu/scalar_types.h"

namespace ccnet {

struct Line {
  int64_t length;  // pixels
  int64_t step;
  int64_t query_channels;
  int64_t value_channels;
  // The axes of a criss-cross path follow each other: the first one's lines have the pixel itself, later ones leave it
  // out and merge into what is there. After the last, what is there is the result.
  bool first_axis;
  bool last_axis;
};

// A tensor along the line: pixel i's first channel is data[i * stride]. In the explicit form the channels of energies and
// weights are the line's part of the path.
template <class T>
struct Along {
  T* data;
  int64_t stride;
  int64_t next;  // numbers to this thread's next line, which is fetched ahead; 0: there is none
  __attribute__((always_inline)) Along from(int64_t pixel) const { return {data + pixel * stride, stride, next}; }
  __attribute__((always_inline)) operator Along<const T>() const { return {data, stride, next}; }
};

// Of each pixel's energies so far, as numbers a pixel: the largest, and the sum of exp(energy - largest). Their
// logarithm in one number, largest + log(sum), would lose what float32 cannot hold beside a large energy.
template <class Real>
struct PathSum {
  Real* largest;
  Real* sum;
  __attribute__((always_inline)) PathSum from(int64_t pixel) const { return {largest + pixel, sum + pixel}; }
};

template <class T>
struct LineKernels {
  using Real = Accumulate<T>;

  // Bytes of scratch that any of the others needs.
  int64_t (*scratch_bytes)(const Line&);

  // out and path take in this line's keys and values.
  void (*attention)(const Line&, Along<const T> query, Along<const T> key, Along<const T> value, Along<T> out,
                    PathSum<Real> path, char* scratch);
  // The gradients of what `attention` wrote. delta is written on the first axis, which alone reads out, and read on the
  // others.
  void (*attention_backward)(const Line&, Along<const T> query, Along<const T> key, Along<const T> value,
                             Along<const T> out, Along<const T> grad_out, PathSum<const Real> path, Real* delta,
                             Along<T> grad_query, Along<T> grad_key, Along<T> grad_value, char* scratch);

  void (*energy)(const Line&, Along<const T> query, Along<const T> key, Along<T> energy, char* scratch);
  void (*energy_backward)(const Line&, Along<const T> query, Along<const T> key, Along<const T> grad_energy,
                          Along<T> grad_query, Along<T> grad_key, char* scratch);
  // out takes in weight * value.
  void (*map)(const Line&, Along<const T> weight, Along<const T> value, Along<T> out, char* scratch);
  void (*map_backward)(const Line&, Along<const T> weight, Along<const T> value, Along<const T> grad_out,
                       Along<T> grad_weight, Along<T> grad_value, char* scratch);

  // Not of a line, but compiled with it: y [columns, rows] from x [rows, columns], x_row and y_row numbers from row to row
  void (*transpose)(const T* x, int64_t x_row, int64_t rows, int64_t columns, T* y, int64_t y_row);
};

// For the instruction set that cpu_capability() names
template <class T>
const LineKernels<T>& line_kernels();

// clang-format off
namespace baseline {
const LineKernels<float>& line_kernels(const float*);
const LineKernels<double>& line_kernels(const double*);
const LineKernels<Half>& line_kernels(const Half*);
const LineKernels<BFloat16>& line_kernels(const BFloat16*);
}
namespace avx2 {
const LineKernels<float>& line_kernels(const float*);
const LineKernels<double>& line_kernels(const double*);
const LineKernels<Half>& line_kernels(const Half*);
const LineKernels<BFloat16>& line_kernels(const BFloat16*);
}
namespace avx512 {
const LineKernels<float>& line_kernels(const float*);
const LineKernels<double>& line_kernels(const double*);
const LineKernels<Half>& line_kernels(const Half*);
const LineKernels<BFloat16>& line_kernels(const BFloat16*);
}
namespace avx512_bf16 {
const LineKernels<BFloat16>& line_kernels(const BFloat16*);
}
// clang-format on

}  // namespace ccnet
