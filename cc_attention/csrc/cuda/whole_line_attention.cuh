// Attention along lines of up to 256 pixels with 16-bit elements, forward.
//
// attention_kernel would read the values of a line twice, once for each of two tiles of queries, since the weights of
// 256 queries do not fit. Here a block has a whole line: its keys stay in shared memory, its queries in registers as
// fragments, and weights are made anew, 16 keys at a time, for every slice of values, which is read once.
#pragma once

#include "cc_attention/csrc/cuda/line_attention.cuh"

namespace ccnet {

template <class T_>
struct WholeLineAttention {
  using T = T_;
  static constexpr int kLength = 256, kSlice = 64, kThreads = 256;
  static constexpr int kQueries = kThreads / 32 * 16;  // a warp has 16 at a time
  static constexpr int kTiles = kLength / kQueries;
  using Slice = Tile<T, kLength, kSlice>;
  using Sums = Accumulator<TensorCores, T, kQueries, kSlice, kThreads, 1>;
  static constexpr int kBytes = 2 * Slice::kBytes + 3 * kLength * static_cast<int>(sizeof(float));

  template <class In, class Out>
  static bool takes(const Line& line, const In& query, const In& key, const In& value, const Out& out) {
    return line.length > kQueries && line.length <= kLength && query.channels <= kSlice && value.channels > 0 &&
           query.aligned && key.aligned && value.aligned && out.aligned;
  }

  // A thread has rows i = 0, 1 of a warp's 16, 8 apart, and four of 16 keys: columns 2t, 2t + 1, 2t + 8, 2t + 9.
  struct Energies {
    float x[2][4];
  };
  static __device__ __forceinline__ int row(int i) { return Sums::row(i); }
  static __device__ __forceinline__ int column(int j) { return threadIdx.x % 4 * 2 + j / 2 * 8 + j % 2; }

  static __device__ __forceinline__ bool on_path(const Line& line, int query, int key) {
    return key < line.length && (line.first_axis || key != query);
  }

  // -inf where a key is not on the path
  static __device__ __forceinline__ Energies energies(const uint32_t (&queries)[kSlice / 16][4], const Slice& keys,
                                                      const Line& line, int first_query, int first_key) {
    Energies energy = {};
#pragma unroll
    for (int k = 0; k < kSlice / 16; ++k) {
      uint32_t right[4];
      load_right<true>(right, keys, k * 16, first_key);
      float (&upper)[4] = energy.x[0], (&lower)[4] = energy.x[1];
      mma_m16n8k16<T>(upper[0], upper[1], lower[0], lower[1], queries[k], right[0], right[1]);
      mma_m16n8k16<T>(upper[2], upper[3], lower[2], lower[3], queries[k], right[2], right[3]);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const bool there = on_path(line, first_query + row(i), first_key + column(j));
        energy.x[i][j] = there ? energy.x[i][j] : -INFINITY;
      }
    }
    return energy;
  }

  static __device__ __forceinline__ float base_of(float largest) { return largest == -INFINITY ? 0 : largest; }

  // A softmax over some keys, as the largest energy and the sum of exp(energy - largest); taking in others of them
  static __device__ __forceinline__ void merge(float& largest, float& sum, float other_largest, float other_sum) {
    const float merged = larger(largest, other_largest), base = base_of(merged);
    sum = sum * exponential<T>(largest - base) + other_sum * exponential<T>(other_largest - base);
    largest = merged;
  }
};

template <class Work>
__global__ void __launch_bounds__(Work::kThreads, 2)
    whole_line_attention_kernel(const Line line, const LineMap<const typename Work::T> query,
                                const LineMap<const typename Work::T> key, const LineMap<const typename Work::T> value,
                                const LineMap<typename Work::T> out, const PathSum<float> path) {
  using T = typename Work::T;
  constexpr int kSteps = Work::kSlice / 16;
  SharedCarver carver;
  const typename Work::Slice keys(carver), values(carver);
  float *const base = carver.take<float>(Work::kLength), *const scale = carver.take<float>(Work::kLength);
  float* const keep = carver.take<float>(Work::kLength);
  const int64_t pixel = first_pixel(line, blockIdx.x);
  const int depth = round_up(line.length, 16);

  uint32_t queries[Work::kTiles][kSteps][4];
  values.template fetch<Work::kThreads>(query.rows(line, pixel), 0, 0);
  keys.template fetch<Work::kThreads>(key.rows(line, pixel), 0, 0);
  copies_wait();
  __syncthreads();
#pragma unroll
  for (int tile = 0; tile < Work::kTiles; ++tile) {
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      load_left<false>(queries[tile][k], values, tile * Work::kQueries + Work::Sums::warp_row(), k * 16);
    }
  }

  // Softmax over the path so far
#pragma unroll
  for (int tile = 0; tile < Work::kTiles; ++tile) {
    const int first_query = tile * Work::kQueries;
    float largest[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};
#pragma unroll 1
    for (int first_key = 0; first_key < depth; first_key += 16) {
      const auto energy = Work::energies(queries[tile], keys, line, first_query, first_key);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float (&x)[4] = energy.x[i];
        const float most = larger(larger(x[0], x[1]), larger(x[2], x[3])), from = Work::base_of(most);
        float total = 0;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          total += exponential<T>(x[j] - from);
        }
        Work::merge(largest[i], sum[i], most, total);
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int bit = 1; bit < 4; bit *= 2) {
        const float other = __shfl_xor_sync(~0u, largest[i], bit);
        const float other_sum = __shfl_xor_sync(~0u, sum[i], bit);
        Work::merge(largest[i], sum[i], other, other_sum);
      }
      const int row = first_query + Work::row(i);
      const bool valid = row < line.length, earlier = valid && !line.first_axis, writes = threadIdx.x % 4 == 0;
      const int64_t u = valid ? pixel + row * line.step : 0;
      const float before = load_global(path.largest + u, earlier), sum_before = load_global(path.sum + u, earlier);
      Work::merge(largest[i], sum[i], earlier ? before : -INFINITY, earlier ? sum_before : 0);
      // All -inf so far: 0, and NaN only if it stays so to the end
      const float inverse = sum[i] == 0 && !line.last_axis ? 0 : 1 / sum[i];
      const float from = Work::base_of(largest[i]);
      store_shared(base + row, from, writes);
      store_shared(scale + row, inverse, writes);
      store_shared(keep + row, earlier ? sum_before * exponential<T>(before - from) * inverse : 0, writes);
      store_global(path.largest + u, largest[i], valid && writes);
      store_global(path.sum + u, sum[i], valid && writes);
    }
  }

  for (int c = 0; c < value.channels; c += Work::kSlice) {
    __syncthreads();
    values.template fetch<Work::kThreads>(value.rows(line, pixel), 0, c);
    copies_wait();
    __syncthreads();
#pragma unroll
    for (int tile = 0; tile < Work::kTiles; ++tile) {
      const int first_query = tile * Work::kQueries;
      typename Work::Sums sums;
      clear(sums);
      float from[2], by[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        from[i] = load_shared(base + first_query + Work::row(i));
        by[i] = load_shared(scale + first_query + Work::row(i));
      }
#pragma unroll 1
      for (int first_key = 0; first_key < depth; first_key += 16) {
        const auto energy = Work::energies(queries[tile], keys, line, first_query, first_key);
        uint32_t weights[4];  // of rows 0, 1, 0, 1 at columns 0 and 1, then 2 and 3: a fragment as it is
#pragma unroll
        for (int part = 0; part < 4; ++part) {
          const int i = part % 2, j = part / 2 * 2;
          Run<T, 2> pair;
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            pair.x[e] = down<T>(exponential<T>(energy.x[i][j + e] - from[i]) * by[i]);
          }
          memcpy(&weights[part], &pair, sizeof pair);
        }
#pragma unroll
        for (int n = 0; n < kSteps; ++n) {
          uint32_t right[4];
          load_right<false>(right, values, first_key, n * 16);
          const int j = 4 * n;
          float (&upper)[16] = sums.x[0], (&lower)[16] = sums.x[1];
          mma_m16n8k16<T>(upper[j], upper[j + 1], lower[j], lower[j + 1], weights, right[0], right[1]);
          mma_m16n8k16<T>(upper[j + 2], upper[j + 3], lower[j + 2], lower[j + 3], weights, right[2], right[3]);
        }
      }
      write_rows(sums, out.rows(line, pixel), first_query, c, !line.first_axis,
                 [&](int row) { return load_shared(keep + first_query + row); });
    }
  }
}

}  // namespace ccnet
