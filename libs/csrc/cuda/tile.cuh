// Matrices in shared memory.
#pragma once

#include "libs/csrc/cuda/scalar_types.cuh"

namespace ccnet {

// Rows of the pixels of a line, channels side by side
template <class T>
struct Rows {
  T* data;
  int64_t stride;  // elements from row to row
  int count;
  int channels;
  bool aligned;  // every row begins at a multiple of 16 bytes and has a whole number of them
};

// A row-major matrix whose rows' packs of 16 bytes are permuted, so that neither 8 rows at the same column (ldmatrix)
// nor the rows that 8 lanes have in an Accumulator without tensor cores share a bank.
template <class T, int kRows_, int kColumns_>
struct Tile {
  static constexpr int kRows = kRows_, kColumns = kColumns_;
  static constexpr int kPack = 16 / sizeof(T);  // elements
  static constexpr int kPacks = kColumns / kPack;
  static constexpr int kBytes = kRows * kColumns * sizeof(T);
  static_assert(kPacks >= 2 && (kPacks & (kPacks - 1)) == 0, "rows of 32, 64, 128 ... bytes");

  __device__ __forceinline__ explicit Tile(SharedCarver& carver) : data(carver.take<T>(kRows * kColumns)) {}
  __device__ __forceinline__ explicit Tile(T* data) : data(data) {}

  static __device__ __forceinline__ int permuted(int row, int pack) {
    if constexpr (sizeof(T) > 2) {
      return pack ^ ((row + row / 4) % (kPacks < 8 ? kPacks : 8));
    } else if constexpr (kPacks >= 8) {
      return pack ^ (row % 8);
    } else {
      return pack ^ (row / (8 / kPacks) % kPacks);  // 128 bytes hold several rows
    }
  }
  __device__ __forceinline__ T* at(int row, int column) const {
    return data + row * kColumns + permuted(row, column / kPack) * kPack + column % kPack;
  }

  template <int kCount>
  __device__ __forceinline__ Run<T, kCount> load(int row, int column) const {
    if constexpr (kCount <= kPack) {
      return load_shared(reinterpret_cast<const Run<T, kCount>*>(at(row, column)));
    } else {
      Run<T, kCount> run;
#pragma unroll
      for (int i = 0; i < kCount; i += kPack) {
        const auto part = load<kPack>(row, column + i);
#pragma unroll
        for (int j = 0; j < kPack; ++j) {
          run.x[i + j] = part.x[j];
        }
      }
      return run;
    }
  }
  template <int kCount>
  __device__ __forceinline__ void store(int row, int column, const Run<T, kCount>& run) const {
    if constexpr (kCount <= kPack) {
      store_shared(reinterpret_cast<Run<T, kCount>*>(at(row, column)), run);
    } else {
#pragma unroll
      for (int i = 0; i < kCount; i += kPack) {
        Run<T, kPack> part;
#pragma unroll
        for (int j = 0; j < kPack; ++j) {
          part.x[j] = run.x[i + j];
        }
        store<kPack>(row, column + i, part);
      }
    }
  }

  // Rows from first_row and channels from first_channel on; what is beyond either end is 0. The tile is there after
  // copies_wait() and a barrier.
  template <int kThreads>
  __device__ __forceinline__ void fetch(const Rows<const T>& x, int first_row, int first_channel) const {
    static_assert(kRows * kPacks % kThreads == 0, "every thread copies as many packs");
    if (x.aligned) {
#pragma unroll 1
      for (int i = unknown(threadIdx.x); i < kRows * kPacks; i += kThreads) {
        const int row = i / kPacks, pack = i % kPacks, channel = first_channel + pack * kPack;
        const bool valid = first_row + row < x.count && channel < x.channels;
        const T* from = x.data + (valid ? (first_row + row) * x.stride + channel : 0);
        copy_async(at(row, pack * kPack), from, valid);
      }
    } else {
#pragma unroll 1
      for (int i = threadIdx.x; i < kRows * kColumns; i += kThreads) {
        const int row = i / kColumns, channel = first_channel + i % kColumns;
        const bool valid = first_row + row < x.count && channel < x.channels;
        const T* from = x.data + (valid ? (first_row + row) * x.stride + channel : 0);
        store_shared(at(row, i % kColumns), load_global(from, valid));
      }
    }
  }

  T* data;
};

}  // namespace ccnet
