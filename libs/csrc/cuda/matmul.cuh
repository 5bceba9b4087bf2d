// Products of matrices in shared memory, computed by a block: on tensor cores, float32 as TF32, and without.
#pragma once

#include "libs/csrc/cuda/tile.cuh"

namespace ccnet {

struct TensorCores {};  // mma.sync: 16-bit elements, and float32 rounded to TF32
struct PlainCores {};

// A thread's part of a matrix [kM, kN]: element x[i][j] is at (row(i), column(j)). Columns are in groups of kGroup that
// lie side by side; kRowLanes lanes that differ in their low bits, of kColumnWarps warps, share a row.
template <class Cores, class T, int kM, int kN, int kThreads, int kColumnWarps_ = 0>
struct Accumulator;

// A warp's part is made of m16n8 fragments.
template <class T, int kM, int kN, int kThreads, int kColumnWarps_>
struct Accumulator<TensorCores, T, kM, kN, kThreads, kColumnWarps_> {
  static constexpr int kColumnWarps = kColumnWarps_ > 0 ? kColumnWarps_ : kN >= 64 ? 2 : 1;
  static constexpr int kWarpRows = kM / (kThreads / 32 / kColumnWarps), kWarpColumns = kN / kColumnWarps;
  static constexpr int kRows = kWarpRows / 8, kColumns = kWarpColumns / 4;
  static constexpr int kGroup = 2, kRowLanes = 4, kRun = 16 / sizeof(T);
  static_assert(kWarpRows % 16 == 0 && kWarpColumns % 16 == 0, "whole fragments, and pairs of them");

  float x[kRows][kColumns];

  static __device__ __forceinline__ int warp_row() { return threadIdx.x / 32 / kColumnWarps * kWarpRows; }
  static __device__ __forceinline__ int warp_column() { return threadIdx.x / 32 % kColumnWarps * kWarpColumns; }
  static __device__ __forceinline__ int row(int i) { return warp_row() + i * 8 + threadIdx.x % 32 / 4; }
  static __device__ __forceinline__ int column(int j) {
    return warp_column() + j / 2 * 8 + threadIdx.x % 4 * 2 + j % 2;
  }

  // The 16 rows and 16 columns from (16 * m, 16 * n) of the warp's part on += A B, a fragment and two side by side
  __device__ __forceinline__ void add_product(int m, int n, const uint32_t (&a)[4], const uint32_t (&b)[4]) {
    float (&upper)[kColumns] = x[2 * m], (&lower)[kColumns] = x[2 * m + 1];
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
      const int j = 4 * n + i;
      if constexpr (sizeof(T) == 4) {
        mma_m16n8k8_tf32(upper[j], upper[j + 1], lower[j], lower[j + 1], a, b[i], b[i + 1]);
      } else {
        mma_m16n8k16<T>(upper[j], upper[j + 1], lower[j], lower[j + 1], a, b[i], b[i + 1]);
      }
    }
  }

  // f(row, column, Run of columns, 16 bytes of T) for all that the block has. The fragments give a lane 2 columns; four
  // lanes, or two with 4 bytes, exchange theirs so that each has a run of one fragment.
  template <class F>
  __device__ __forceinline__ void each_run(const F& f) const {
    constexpr int kLanes = kRun / 2;
    static_assert(kWarpColumns % (8 * kLanes) == 0, "runs of as many fragments");
    const int lane = threadIdx.x % kLanes, first_column = warp_column() + threadIdx.x % 4 / kLanes * kRun;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int j = 0; j < kColumns; j += kRun) {
        float pairs[kLanes][2];  // of fragment k; at the end, of lane k
#pragma unroll
        for (int k = 0; k < kRun; ++k) {
          pairs[k / 2][k % 2] = x[i][j + k];
        }
#pragma unroll
        for (int bit = 1; bit < kLanes; bit *= 2) {
#pragma unroll
          for (int k = 0; k < kLanes; ++k) {
            if (k & bit) {
              continue;
            }
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              const bool upper = lane & bit;
              const float mine = upper ? pairs[k][e] : pairs[k | bit][e];
              const float other = __shfl_xor_sync(~0u, mine, bit);
              (upper ? pairs[k][e] : pairs[k | bit][e]) = other;
            }
          }
        }
        Run<float, kRun> run;
#pragma unroll
        for (int k = 0; k < kRun; ++k) {
          run.x[k] = pairs[k / 2][k % 2];
        }
        f(row(i), first_column + (j / 2 + lane) * 8, run);
      }
    }
  }
};

// A warp has 4 rows of 8 lanes; a thread has 4 columns side by side.
template <class T, int kM, int kN, int kThreads>
struct Accumulator<PlainCores, T, kM, kN, kThreads, 0> {
  static constexpr int kColumnWarps = kN / 32, kRowWarps = kThreads / 32 / kColumnWarps;
  static constexpr int kRows = kM / (4 * kRowWarps), kColumns = 4;
  static constexpr int kGroup = 4, kRowLanes = 8, kRun = 4;
  static_assert(kRows >= 1 && kRows <= 4 && kM % (4 * kRowWarps) == 0, "as many rows for every thread");

  Accumulate<T> x[kRows][kColumns];

  static __device__ __forceinline__ int row(int i) {
    return (threadIdx.x / 32 / kColumnWarps * 4 + threadIdx.x % 32 / 8) * kRows + i;
  }
  static __device__ __forceinline__ int column(int j) {
    return threadIdx.x / 32 % kColumnWarps * 32 + threadIdx.x % 8 * 4 + j;
  }

  template <class F>
  __device__ __forceinline__ void each_run(const F& f) const {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      Run<Accumulate<T>, 4> run;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        run.x[j] = x[i][j];
      }
      f(row(i), column(0), run);
    }
  }
};

template <class Cores, class T, int kM, int kN, int kThreads, int kColumnWarps>
__device__ __forceinline__ void clear(Accumulator<Cores, T, kM, kN, kThreads, kColumnWarps>& acc) {
#pragma unroll
  for (int i = 0; i < acc.kRows; ++i) {
#pragma unroll
    for (int j = 0; j < acc.kColumns; ++j) {
      acc.x[i][j] = 0;
    }
  }
}

// An mma takes 32 bytes of each row of A: 16 elements of 2 bytes, or 8 of 4. ldmatrix moves the latter too, but does not
// transpose them: where k is the tile's row a lane loads its elements of rows k + t and k + t + 4, columns n + g and
// n + g + 8.
template <class X>
__device__ __forceinline__ void load_transposed(uint32_t& x, uint32_t& below, uint32_t& beside, uint32_t& across,
                                                const X& tile, int k, int n) {
  const int lane = threadIdx.x % 32, offset = X::offset(k + lane % 4, n + lane / 4);
  const auto load = [&](int rows, int columns) {
    return load_shared(reinterpret_cast<const uint32_t*>(tile.moved(offset, rows, columns)));
  };
  x = load(0, 0);
  below = load(1, 0);
  beside = load(0, 1);
  across = load(1, 1);
}
template <class X>
__device__ __forceinline__ void round_fragment(uint32_t (&x)[4]) {
  if constexpr (X::kPack == 4) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      x[i] = rounded_to_tf32(x[i]);
    }
  }
}
// The fragment of A from row m and column k on
template <bool kTransposed, class A>
__device__ __forceinline__ void load_left(uint32_t (&x)[4], const A& a, int m, int k) {
  const int lane = threadIdx.x % 32, high = lane / 16, middle = lane / 8 % 2 * 8, low = lane % 8;
  if constexpr (!kTransposed) {
    ldmatrix_x4(x, a.at(m, middle + low, k + high * A::kPack));
  } else if constexpr (A::kPack == 8) {
    ldmatrix_x4_trans(x, a.at(k, high * 8 + low, m + middle));
  } else {
    load_transposed(x[0], x[2], x[1], x[3], a, k, m);
  }
  round_fragment<A>(x);
}
// Two fragments of B, side by side: 16 columns from row k and column n on. Which row a lane reads for them
template <bool kTransposed, class B>
__device__ __forceinline__ SharedAddress right_row(const B& b, int k, int n) {
  const int lane = threadIdx.x % 32, high = lane / 16 * 8, middle = lane / 8 % 2, low = lane % 8;
  return kTransposed ? b.at(n, high + low, k + middle * B::kPack) : b.at(k, middle * 8 + low, n + high);
}
template <bool kTransposed>
__device__ __forceinline__ void load_right(uint32_t (&x)[4], SharedAddress row) {
  if constexpr (kTransposed) {
    ldmatrix_x4(x, row);
  } else {
    ldmatrix_x4_trans(x, row);
  }
}

template <bool kTransposed, class B>
__device__ __forceinline__ void load_right(uint32_t (&x)[4], const B& b, int k, int n) {
  if constexpr (kTransposed || B::kPack == 8) {
    load_right<kTransposed>(x, right_row<kTransposed>(b, k, n));
  } else {
    load_transposed(x[0], x[1], x[2], x[3], b, k, n);
  }
  round_fragment<B>(x);
}

// acc += A B over `depth` columns of A, a multiple of 16. A lies in shared memory as [m, k], or [k, m] if transposed,
// B as [k, n] or [n, k]. Both are there (after a barrier) and stay until every thread has come back.
template <bool kTransposedA, bool kTransposedB, class T, int kM, int kN, int kThreads, int kColumnWarps, class A,
          class B>
__device__ __forceinline__ void multiply(Accumulator<TensorCores, T, kM, kN, kThreads, kColumnWarps>& acc, const A& a,
                                         const B& b, int depth) {
  using Acc = Accumulator<TensorCores, T, kM, kN, kThreads, kColumnWarps>;
  static_assert((kTransposedA ? A::kColumns : A::kRows) == kM && (kTransposedB ? B::kRows : B::kColumns) == kN,
                "sizes");
  constexpr int kFragments = Acc::kRows / 2, kPairs = Acc::kColumns / 4;
#pragma unroll 1
  for (int k = 0; k < depth; k += 2 * A::kPack) {
    uint32_t left[kFragments][4];
#pragma unroll
    for (int m = 0; m < kFragments; ++m) {
      load_left<kTransposedA>(left[m], a, acc.warp_row() + m * 16, k);
    }
#pragma unroll
    for (int n = 0; n < kPairs; ++n) {
      uint32_t right[4];
      load_right<kTransposedB>(right, b, k, acc.warp_column() + n * 16);
#pragma unroll
      for (int m = 0; m < kFragments; ++m) {
        acc.add_product(m, n, left[m], right);
      }
    }
  }
}

template <bool kTransposedA, bool kTransposedB, class T, int kM, int kN, int kThreads, class A, class B>
__device__ __forceinline__ void multiply(Accumulator<PlainCores, T, kM, kN, kThreads>& acc, const A& a, const B& b,
                                         int depth) {
  using Acc = Accumulator<PlainCores, T, kM, kN, kThreads>;
  static_assert((kTransposedA ? A::kColumns : A::kRows) == kM && (kTransposedB ? B::kRows : B::kColumns) == kN,
                "sizes");
  constexpr int kRows = Acc::kRows;
#pragma unroll 1
  for (int k = 0; k < depth; k += 4) {
    Accumulate<T> left[kRows][4], right[4][4];  // [row][k], [k][column]
    if constexpr (kTransposedA) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const auto run = a.template load<kRows>(k + e, acc.row(0));
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
          left[i][e] = up(run.x[i]);
        }
      }
    } else {
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const auto run = a.template load<4>(acc.row(i), k);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          left[i][e] = up(run.x[e]);
        }
      }
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const auto run = kTransposedB ? b.template load<4>(acc.column(e), k) : b.template load<4>(k + e, acc.column(0));
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        (kTransposedB ? right[j][e] : right[e][j]) = up(run.x[j]);
      }
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          acc.x[i][j] += left[i][e] * right[e][j];
        }
      }
    }
  }
}

// ---- writing products ----

// Rows that products are written to: they become scale * product, with `add` plus keep * what is there, and plus the
// residual if there is one.
template <class T>
struct Target {
  Rows<T> rows;
  bool add;
  const T* residual = nullptr;  // laid out as rows.data
};

// Writes acc to rows from first_row and channels from first_channel on; scale(row of acc), keep(row of acc)
template <class Cores, class T, int kM, int kN, int kThreads, int kColumnWarps, class Scale, class Keep>
__device__ __forceinline__ void write_rows(const Accumulator<Cores, T, kM, kN, kThreads, kColumnWarps>& acc,
                                           const Target<T>& target, int first_row, int first_channel,
                                           const Scale& scale, const Keep& keep) {
  using Acc = Accumulator<Cores, T, kM, kN, kThreads, kColumnWarps>;
  constexpr int kRun = Acc::kRun, kPack = 16 / sizeof(T) < kRun ? 16 / sizeof(T) : kRun;
  acc.each_run([&](int row, int column, const Run<Accumulate<T>, kRun>& sums) {
    const Accumulate<T> scaled = scale(row), kept = keep(row);
    const bool inside = first_row + row < target.rows.count;
    const int64_t first = (first_row + row) * target.rows.stride;
#pragma unroll
    for (int i = 0; i < kRun; i += kPack) {
      const int channel = first_channel + column + i;
      const bool valid = inside && channel < target.rows.channels, has_residual = target.residual != nullptr;
      auto* const to = reinterpret_cast<Run<T, kPack>*>(target.rows.data + first + channel);
      const auto* const residual = reinterpret_cast<const Run<T, kPack>*>(target.residual + first + channel);
      const auto before = load_global(to, valid && target.add), own = load_global(residual, valid && has_residual);
      Run<T, kPack> after;
#pragma unroll
      for (int j = 0; j < kPack; ++j) {
        Accumulate<T> x = scaled * sums.x[i + j];
        x = target.add ? x + kept * up(before.x[j]) : x;
        after.x[j] = down<T>(has_residual ? x + up(own.x[j]) : x);
      }
      store_global(to, after, valid);
    }
  });
}

}  // namespace ccnet
