// A map of pixels as one block sees it: the rows of one line.
#pragma once

#include "cc_attention/csrc/cuda/line.h"
#include "libs/csrc/cuda/tile.cuh"

namespace ccnet {

__device__ __forceinline__ int at_most(int limit, int x) { return x < limit ? x : limit; }

// Of the line of that number
__device__ __forceinline__ int64_t first_pixel(const Line& line, unsigned number) {
  const unsigned step = line.step, before = number / step;  // in 32 bits, since division takes that many instructions
  return before * line.step * line.length + (number - before * step);
}

template <class T>
struct LineMap {
  T* data;
  int channels;
  explicit LineMap(const Pixels<T>& x) : data(x.data), channels(x.channels) {}
  __device__ __forceinline__ Rows<T> rows(const Line& line, int64_t first_pixel) const {
    return {data + first_pixel * channels, line.step * channels, line.length, channels};
  }
};

// Of one axis: what line.h's GradScratch is of all
template <class Real>
struct AxisScratch {
  Real* parts;     // [parts of this axis, pixels]
  Real* products;
  const Real* all_parts;
  int slots;
  int64_t pixels;
  __device__ __forceinline__ Real sum_of_parts(int64_t u, bool valid) const {
    Real sum = 0;
#pragma unroll 4
    for (int slot = 0; slot < slots; ++slot) {
      sum += load_global(all_parts + slot * pixels + u, valid);
    }
    return sum;
  }
};

}  // namespace ccnet
