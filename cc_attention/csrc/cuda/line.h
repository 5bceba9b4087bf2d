// Attention along lines of pixels on the GPU: what the operators (criss_cross.cu) call.
//
// Tensors are channels_last: a pixel's channels follow each other, and pixels are numbered n, (depth,) row, column.
#pragma once

#include <cstdint>

#include "libs/csrc/cuda/primitives.cuh"

namespace ccnet {

// The lines of one axis: `step` pixels lie from one pixel of a line to the next.
struct Line {
  int64_t step;
  int length;  // pixels
  // The axes of a criss-cross path follow each other: the first one's lines have the pixel itself, later ones leave it
  // out and merge into what is there. After the last, what is there is the result.
  bool first_axis, last_axis;
  // Explicit form: a pixel's energies or weights are `path` numbers, this line's begin at `path_begin`.
  int path, path_begin;
};

struct Axes {
  Line lines[3];
  int count;
  int64_t pixels;  // of all images
};

// [pixels, channels]
template <class T>
struct Pixels {
  T* data;
  int channels;
};

// Of each pixel's energies so far: the largest, and the sum of exp(energy - largest).
template <class Real>
struct PathSum {
  Real* largest;
  Real* sum;
};

// Each runs one kernel for each axis, in order, on the stream. Nothing is launched for no pixels.
template <class T, class Real>
struct LineAttentionLaunchers {
  // out and path, both of them from nothing
  static cudaError_t attention(const Axes&, Pixels<const T> query, Pixels<const T> key, Pixels<const T> value,
                               Pixels<T> out, PathSum<Real> path, cudaStream_t);
  // delta [pixels] is scratch.
  static cudaError_t attention_backward(const Axes&, Pixels<const T> query, Pixels<const T> key, Pixels<const T> value,
                                        Pixels<const T> out, Pixels<const T> grad_out, PathSum<const Real> path,
                                        Real* delta, Pixels<T> grad_query, Pixels<T> grad_key, Pixels<T> grad_value,
                                        cudaStream_t);
  static cudaError_t energy(const Axes&, Pixels<const T> query, Pixels<const T> key, Pixels<T> energy, cudaStream_t);
  static cudaError_t energy_backward(const Axes&, Pixels<const T> query, Pixels<const T> key,
                                     Pixels<const T> grad_energy, Pixels<T> grad_query, Pixels<T> grad_key,
                                     cudaStream_t);
  static cudaError_t map(const Axes&, Pixels<const T> weight, Pixels<const T> value, Pixels<T> out, cudaStream_t);
  static cudaError_t map_backward(const Axes&, Pixels<const T> weight, Pixels<const T> value, Pixels<const T> grad_out,
                                  Pixels<T> grad_weight, Pixels<T> grad_value, cudaStream_t);
};

}  // namespace ccnet
