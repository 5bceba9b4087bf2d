// Attention along lines of pixels on the GPU: what the operators (criss_cross.cu) call.
//
// Tensors are channels_last: a pixel's channels follow each other, and pixels are numbered n, (depth,) row, column.
#pragma once

#include <cstdint>

#include "libs/csrc/cuda/primitives.cuh"

namespace ccnet {

// The lines of one axis: `step` pixels lie from one pixel of a line to the next.
struct Line {
  int64_t step;  // less than 2^31
  int length;  // pixels
  // The axes of a criss-cross path follow each other: the first one's lines have the pixel itself, later ones leave it
  // out and merge into what is there. After the last, what is there is the result.
  bool first_axis, last_axis;
  // Explicit form: a pixel's energies or weights are `path` numbers, this line's begin at `path_begin`.
  int path, path_begin;

  __host__ __device__ bool on_path(int query, int key) const { return key < length && (first_axis || key != query); }
};

struct Axes {
  Line lines[3];
  int count;
  int64_t images, pixels;  // pixels of an image
  bool allow_tf32;  // in products of float32
};

// [pixels, channels]
template <class T>
struct Pixels {
  T* data;
  int channels;
  Pixels from(int64_t pixel) const { return {data + pixel * channels, channels}; }
};

// Of each pixel's energies so far: the largest, and the sum of exp(energy - largest).
template <class Real>
struct PathSum {
  Real* largest;
  Real* sum;
  PathSum from(int64_t pixel) const { return {largest + pixel, sum + pixel}; }
};

// What the backward pass works with, of as many images as it works on at a time: dP = grad_out . value for each pair of
// pixels of a path, as the kernels like it, and parts of delta, the sum of weight * dP over a pixel's path.
struct GradScratchSize {
  int64_t images, products, slots;  // `slots` parts for each pixel
};
template <class Real>
struct GradScratch {
  GradScratchSize size;
  Real *products, *parts;
};

// Each runs its kernels for each axis, in order, on the stream. Nothing is launched for no pixels. Channels are whole
// packs of 16 bytes and data begins at a multiple of them, but for energies and weights of the explicit form.
template <class T, class Real>
struct LineAttentionLaunchers {
  // out = attention, or with a residual: residual + gamma * attention. The axes use two `path` in turns; `path` has the
  // whole path's numbers in the end.
  static cudaError_t attention(const Axes&, Pixels<const T> query, Pixels<const T> key, Pixels<const T> value,
                               const T* residual, const Real* gamma, Pixels<T> out, PathSum<Real> path,
                               PathSum<Real> other_path, cudaStream_t);
  static cudaError_t scratch_size(const Axes&, int query_channels, int value_channels, GradScratchSize&);
  // Gradients of query, key and value, and delta [pixels]. Without gamma it is 1.
  static cudaError_t attention_backward(const Axes&, Pixels<const T> query, Pixels<const T> key, Pixels<const T> value,
                                        Pixels<const T> grad_out, PathSum<const Real> path, const Real* gamma,
                                        const GradScratch<Real>&, Real* delta, Pixels<T> grad_query,
                                        Pixels<T> grad_key, Pixels<T> grad_value, cudaStream_t);

  static cudaError_t energy(const Axes&, Pixels<const T> query, Pixels<const T> key, Pixels<T> energy, cudaStream_t);
  static cudaError_t energy_backward(const Axes&, Pixels<const T> query, Pixels<const T> key,
                                     Pixels<const T> grad_energy, Pixels<T> grad_query, Pixels<T> grad_key,
                                     cudaStream_t);
  static cudaError_t map(const Axes&, Pixels<const T> weight, Pixels<const T> value, Pixels<T> out, cudaStream_t);
  static cudaError_t map_backward(const Axes&, Pixels<const T> weight, Pixels<const T> value, Pixels<const T> grad_out,
                                  Pixels<T> grad_weight, Pixels<T> grad_value, cudaStream_t);
};

}  // namespace ccnet
