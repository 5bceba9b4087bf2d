// Matrices in shared memory.
#pragma once

#include "libs/csrc/cuda/scalar_types.cuh"

namespace ccnet {

// Rows of the pixels of a line, channels side by side. What is fetched or written by packs of 16 bytes begins at a
// multiple of them in every row and has a whole number of them.
template <class T>
struct Rows {
  T* data;
  int64_t stride;  // elements from row to row
  int count;
  int channels;
};

// A row-major matrix whose rows' packs of 16 bytes are permuted, so that in no bank meet: 8 rows at the same column
// (ldmatrix); with 4 bytes 4 rows at two packs side by side (fragments that ldmatrix cannot transpose); without tensor
// cores the rows that 8 lanes have in an Accumulator, which lie 4 apart.
template <class T, int kRows_, int kColumns_>
struct Tile {
  static constexpr int kRows = kRows_, kColumns = kColumns_;
  static constexpr int kPack = 16 / sizeof(T);  // elements
  static constexpr int kPacks = kColumns / kPack;
  static constexpr int kRowBytes = kColumns * sizeof(T), kBytes = kRows * kRowBytes;
  static_assert(kPacks >= 2 && (kPacks & (kPacks - 1)) == 0, "rows of 32, 64, 128 ... bytes");

  __device__ __forceinline__ explicit Tile(SharedCarver& carver) : data(carver.take<T>(kRows * kColumns)) {}
  __device__ __forceinline__ explicit Tile(T* data) : data(data) {}

  static __device__ __forceinline__ int permuted(int row, int pack) {
    if constexpr (sizeof(T) > 2) {
      return pack ^ ((row * 2 ^ row / 4) % (kPacks < 8 ? kPacks : 8));
    } else if constexpr (kPacks >= 8) {
      return pack ^ (row % 8);
    } else {
      return pack ^ (row / (8 / kPacks) % kPacks);  // 128 bytes hold several rows
    }
  }
  // Rows so far apart are permuted alike.
  static constexpr int kPeriod = sizeof(T) > 2 ? 32 : 8;

  static __device__ __forceinline__ int offset(int row, int column) {
    return row * kColumns + permuted(row, column / kPack) * kPack + column % kPack;
  }
  __device__ __forceinline__ T* at(int row, int column) const { return data + offset(row, column); }
  // The same of row first + row, where `first` is known when this is compiled: then only `row` costs instructions.
  __device__ __forceinline__ T* at(int first, int row, int column) const {
    const int rest = first % kPeriod;
    return at(rest + row, column) + (first - rest) * kColumns;
  }

  // With 4 bytes: what is so many times 4 rows and 8 columns, none or one, from the element at `offset`, whose row % 8 is
  // less than 4 and column % 16 less than 8. So permuted, that changes bits of its pack.
  __device__ __forceinline__ T* moved(int offset, int rows, int columns) const {
    static_assert(kPack == 4 && kPacks >= 8, "packs are permuted by 8");
    return data + ((offset ^ (rows + 2 * columns) * kPack) + rows * 4 * kColumns);
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

  // What a thread copies of the rows from first_row on: its pack of every kAtOnce-th
  template <int kThreads>
  struct Source {
    static constexpr int kAtOnce = kThreads / kPacks;
    static_assert(kThreads % kPacks == 0 && kRows * kPacks % 32 == 0, "a thread stays in its column; whole warps");
    const T* from;
    int64_t step;  // from one of these rows to the next
    int rows, channels;
    __device__ __forceinline__ Source(const Rows<const T>& x, int first_row)
        : step(kAtOnce * x.stride), rows(x.count - first_row), channels(x.channels) {
      const unsigned thread = unknown(threadIdx.x);
      from = x.data + static_cast<int>(first_row + thread / kPacks) * x.stride + thread % kPacks * kPack;
    }
  };
  // Channels from first_channel on; what is beyond the rows or channels is 0. The tile is there after copies_wait() and a
  // barrier.
  template <int kThreads>
  __device__ __forceinline__ void fetch(const Source<kThreads>& x, int first_channel) const {
    constexpr int kAtOnce = Source<kThreads>::kAtOnce;
    const unsigned thread = unknown(threadIdx.x);
    const int first = thread / kPacks, pack = thread % kPacks;
    const bool inside = first_channel + pack * kPack < x.channels;
    const T* from = x.from + first_channel;
#pragma unroll kCopiesAtOnce
    for (int i = 0; i < kRows; i += kAtOnce, from += x.step) {
      if (kRows % kAtOnce == 0 || first + i < kRows) {
        copy_async(at(i, first, pack * kPack), from, first + i < x.rows && inside);
      }
    }
  }
  template <int kThreads>
  __device__ __forceinline__ void fetch(const Rows<const T>& x, int first_row, int first_channel) const {
    fetch(Source<kThreads>(x, first_row), first_channel);
  }

  T* data;
};

}  // namespace ccnet
