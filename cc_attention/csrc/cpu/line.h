// Attention along one line of pixels: the interface between the kernels, compiled for each instruction set
// (line_attention.h), and criss-cross attention, which calls them for every row and column (criss_cross.cpp).
//
// The channels of a pixel are contiguous. In arrays with one number per pixel, [N, (D,) H, W], the numbers of neighbouring
// pixels of the line are `step` apart.
#pragma once

#include <cstdint>

#include "libs/csrc/cpu/capability.h"
#include "libs/csrc/cpu/scalar_types.h"

namespace ccnet {

struct Line {
  int64_t length;  // pixels
  int64_t step;
  int64_t query_channels;
  int64_t value_channels;
  // A criss-cross path is processed axis by axis. Lines of the first axis include the pixel itself. Those of later axes
  // leave it out and are merged into the partial result, which is complete after the last axis.
  bool first_axis;
  bool last_axis;
};

// A tensor along the line: the first channel of pixel i is data[i * stride]. The channels of energies and weights are the
// positions of the path that are on this line.
template <class T>
struct Along {
  T* data;
  int64_t stride;
  int64_t next;  // offset of this thread's next line, for prefetching; 0 if there is none
  __attribute__((always_inline)) Along from(int64_t pixel) const { return {data + pixel * stride, stride, next}; }
  __attribute__((always_inline)) operator Along<const T>() const { return {data, stride, next}; }
};

// The running softmax of each pixel: the largest energy so far, and the sum of exp(energy - largest). They are kept apart
// because in one number, largest + log(sum), float32 would round away the logarithm beside a large energy.
template <class Real>
struct PathSum {
  Real* largest;
  Real* sum;
  __attribute__((always_inline)) PathSum from(int64_t pixel) const { return {largest + pixel, sum + pixel}; }
};

template <class T>
struct LineKernels {
  using Real = Accumulate<T>;

  // Bytes of scratch memory that is enough for each of the other kernels
  int64_t (*scratch_bytes)(const Line&);

  // Merges the keys and values of this line into out and path. On the last axis out becomes
  // residual + gamma * attention, if there is a residual.
  void (*attention)(const Line&, Along<const T> query, Along<const T> key, Along<const T> value,
                    Along<const T> residual, Real gamma, Along<T> out, PathSum<Real> path, char* scratch);
  // The gradient of value, and delta, for each query the sum of weight * dP over its path, dP being grad_out . value.
  // The last axis, which completes delta, goes on to the gradients of query and key. Others leave dP in `products`, a row
  // of numbers for each pixel, to query_key_gradients, which takes in their part afterwards.
  void (*value_gradients)(const Line&, Along<const T> query, Along<const T> key, Along<const T> value,
                          Along<const T> grad_out, PathSum<const Real> path, Real gamma, Along<Real> products,
                          Real* delta, Along<T> grad_query, Along<T> grad_key, Along<T> grad_value, char* scratch);
  void (*query_key_gradients)(const Line&, Along<const T> query, Along<const T> key, PathSum<const Real> path,
                              Real gamma, Along<Real> products, const Real* delta, Along<T> grad_query,
                              Along<T> grad_key, char* scratch);

  void (*energy)(const Line&, Along<const T> query, Along<const T> key, Along<T> energy, char* scratch);
  void (*energy_backward)(const Line&, Along<const T> query, Along<const T> key, Along<const T> grad_energy,
                          Along<T> grad_query, Along<T> grad_key, char* scratch);
  // Adds weight * value to out, or on the first axis overwrites out with it.
  void (*map)(const Line&, Along<const T> weight, Along<const T> value, Along<T> out, char* scratch);
  void (*map_backward)(const Line&, Along<const T> weight, Along<const T> value, Along<const T> grad_out,
                       Along<T> grad_weight, Along<T> grad_value, char* scratch);

  // Transposes x [rows, columns] to y [columns, rows], whose rows are x_row and y_row numbers apart. Not an operation on a
  // line, but compiled for the same instruction sets.
  void (*transpose)(const T* x, int64_t x_row, int64_t rows, int64_t columns, T* y, int64_t y_row);
};

CCNET_DECLARE_KERNELS(LineKernels, line_kernels)

}  // namespace ccnet
