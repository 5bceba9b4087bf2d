// Attention along lines with 16-bit elements on tensor cores, as FlashAttention-2 splits it: a warp has some rows of the
// weights, which stay in its registers and are an operand of the next product as they are.
//
// Forward, rows are queries, and the softmax of a row is a matter of the four lanes that share it. Backward, rows are
// keys: dV = P^T dO and dK = dE^T Q are sums over columns. What a block needs of others it takes from shared memory.
#pragma once

#include "cc_attention/csrc/cuda/line_map.cuh"
#include "libs/csrc/cuda/matmul.cuh"

namespace ccnet {

// A warp's rows of a matrix with kColumns columns, rounded to T: fragments of A for mma_m16n8k16, kTiles by kCount
template <class T, int kTiles, int kColumns>
struct WarpRows {
  static constexpr int kCount = kColumns / 16;
  uint32_t x[kTiles][kCount][4];

  // Columns from 16 * k on; x is part of an Accumulator's, whose pairs of columns are a fragment's
  template <int kAccColumns>
  __device__ __forceinline__ void set(int k, const float (&values)[2 * kTiles][kAccColumns], int j) {
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int part = 0; part < 4; ++part) {
        const float(&row)[kAccColumns] = values[2 * m + part % 2];
        x[m][k][part] = pair_of<T>(row[j + part / 2 * 2], row[j + part / 2 * 2 + 1]);
      }
    }
  }
  __device__ __forceinline__ void clear() {
#pragma unroll
    for (auto& tile : x) {
#pragma unroll
      for (auto& fragment : tile) {
#pragma unroll
        for (uint32_t& pair : fragment) {
          pair = 0;
        }
      }
    }
  }
  // `columns` of the rows, from column `first` on, to shared memory, from `row` on
  template <class Tile>
  __device__ __forceinline__ void store(const Tile& to, int row, int first, int columns) const {
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int k = 0; k < kCount; ++k) {
#pragma unroll
        for (int part = 0; part < 4 && 16 * k >= first && 16 * k < first + columns; ++part) {
          const int column = 16 * k - first + part / 2 * 8 + threadIdx.x % 4 * 2;
          T* const at = to.at(row + 16 * m + part % 2 * 8 + threadIdx.x % 32 / 4, column);
          store_shared(reinterpret_cast<uint32_t*>(at), x[m][k][part]);
        }
      }
    }
  }
  template <class Tile>
  __device__ __forceinline__ void load(const Tile& from, int row) {
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int k = 0; k < kCount; ++k) {
        load_left<false>(x[m][k], from, row + 16 * m, 16 * k);
      }
    }
  }
  // acc += these rows times b, from column `first` of it on
  template <class Acc, class B>
  __device__ __forceinline__ void multiply(Acc& acc, const B& b, int first) const {
    constexpr int kPairs = Acc::kColumns / 4;
    SharedAddress rows[kPairs];
#pragma unroll
    for (int n = 0; n < kPairs; ++n) {
      rows[n] = unknown(right_row<false>(b, 0, first + 16 * n));
    }
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
#pragma unroll
      for (int n = 0; n < kPairs; ++n) {
        uint32_t right[4];
        load_right<false>(right, rows[n] + 16 * k * B::kRowBytes);
#pragma unroll
        for (int m = 0; m < kTiles; ++m) {
          acc.add_product(m, n, x[m][k], right);
        }
      }
    }
  }
};

constexpr int kStrip = 32;  // channels that a block or a warp works on at a time

// Through which the lanes of a warp exchange 16 rows of a product, of 32 or 16 channels: fragments give a lane pairs of
// columns, memory wants 16 bytes. A lane gets 8 channels, kLanes lanes a row, kRows rows a lane.
template <int kChannels>
struct Staging {
  static constexpr int kNumbers = 16 * kChannels;  // of a warp
  static constexpr int kLanes = kChannels / 8, kRows = kLanes / 2;
  static constexpr int kRowsApart = 32 / kLanes;
  float* rows;

  __device__ __forceinline__ explicit Staging(float* of_block) : rows(of_block + threadIdx.x / 32 * kNumbers) {}

  // Fours of a row are permuted, so that neither pairs of columns nor whole rows of lanes meet in a bank.
  static __device__ __forceinline__ int permutation(int row) {
    return kChannels == 32 ? row % 4 * 2 + row % 2 : row / 2 % 2 * 3;
  }
  template <class Acc>
  __device__ __forceinline__ void exchange(const Acc& acc, int tile, Run<float, 8> (&packs)[kRows]) const {
    const unsigned thread = unknown(threadIdx.x);
    const int group = thread % 32 / 4, lane = thread % 4, written = permutation(group), even = written / 2 * 2;
    const int row = thread % 32 / kLanes, at = thread % kLanes, read = permutation(row);
    float* const pairs = rows + group * kChannels + ((lane / 2) ^ (written % 2)) * 4 + lane % 2 * 2;
    const float* const fours = rows + row * kChannels + ((2 * at) ^ (read / 2 * 2)) * 4;
    __syncwarp();
#pragma unroll
    for (int j = 0; j < Acc::kColumns; j += 2) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const Run<float, 2> pair{{acc.x[2 * tile + i][j], acc.x[2 * tile + i][j + 1]}};
        store_shared(reinterpret_cast<Run<float, 2>*>(pairs + (j ^ even) * 4 + 8 * i * kChannels), pair);
      }
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float* from = fours + (half ^ (read % 2)) * 4 + i * kRowsApart * kChannels;
        const auto four = load_shared(reinterpret_cast<const Run<float, 4>*>(from));
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          packs[i].x[4 * half + e] = four.x[e];
        }
      }
    }
  }
};

// Where a warp writes products of so many channels: kTiles times 16 rows of a target
template <class T, int kTiles, int kChannels>
struct StripTarget {
  using Exchange = Staging<kChannels>;
  static constexpr int kRows = kTiles * Exchange::kRows;  // of a lane
  __device__ __forceinline__ StripTarget(const Target<T>& target, int first_row) : target_(target) {
    const unsigned thread = unknown(threadIdx.x);
    row_ = first_row + thread % 32 / Exchange::kLanes;
    at_ = row_ * target.rows.stride + thread % Exchange::kLanes * 8;
  }
  // A number for each row of an Accumulator that the lane has, as the lane has rows here
  static __device__ __forceinline__ void exchange(const float (&x)[2 * kTiles], float (&to)[kRows]) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if constexpr (kChannels == 32) {
        to[i] = x[i];
      } else {
        const int row = threadIdx.x % 32 / 2, lane = row % 8 * 4;
        const float upper = __shfl_sync(~0u, x[2 * i], lane);
        const float lower = __shfl_sync(~0u, x[2 * i + 1], lane);
        to[i] = row < 8 ? upper : lower;
      }
    }
  }
  // multiply(sums) makes the products from that channel on. What is there is loaded before and stored afterwards.
  template <class Sums, class F>
  __device__ __forceinline__ void make(int channel, const Exchange& staging, const float (&scale)[kRows],
                                       const float (&keep)[kRows], const F& multiply) const {
    if (target_.residual != nullptr) {
      run<true, true, Sums>(channel, staging, scale, keep, multiply);
    } else if (target_.add) {
      run<true, false, Sums>(channel, staging, scale, keep, multiply);
    } else {
      run<false, false, Sums>(channel, staging, scale, keep, multiply);
    }
  }

 private:
  template <bool kMerges, bool kResidual, class Sums, class F>
  __device__ __forceinline__ void run(int channel, const Exchange& staging, const float (&scale)[kRows],
                                      const float (&keep)[kRows], const F& multiply) const {
    using Pack = Run<uint32_t, 4>;  // pairs
    const bool inside = channel + static_cast<int>(threadIdx.x % Exchange::kLanes) * 8 < target_.rows.channels;
    Pack before[kRows], own[kRows], after;
    Pack* to[kRows];
    bool valid[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int64_t offset = at_ + (i * Exchange::kRowsApart * target_.rows.stride + channel);
      to[i] = reinterpret_cast<Pack*>(target_.rows.data + offset);
      valid[i] = inside && row_ + i * Exchange::kRowsApart < target_.rows.count;
      if (kMerges) {
        before[i] = load_global(to[i], valid[i] && target_.add);
      }
      if (kResidual) {
        own[i] = load_global(reinterpret_cast<const Pack*>(target_.residual + offset), valid[i]);
      }
    }
    Sums sums;
    clear(sums);
    multiply(sums);
    Run<float, 8> packs[Exchange::kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (i % Exchange::kRows == 0) {
        staging.exchange(sums, i / Exchange::kRows, packs);
      }
      const Run<float, 8>& made = packs[i % Exchange::kRows];
#pragma unroll
      for (int pair = 0; pair < 4; ++pair) {
        float low = scale[i] * made.x[2 * pair], high = scale[i] * made.x[2 * pair + 1];
        if (kMerges) {
          const float2 earlier = numbers_of<T>(before[i].x[pair]);
          low += keep[i] * earlier.x;
          high += keep[i] * earlier.y;
        }
        if (kResidual) {
          const float2 residual = numbers_of<T>(own[i].x[pair]);
          low += residual.x;
          high += residual.y;
        }
        after.x[pair] = pair_of<T>(low, high);
      }
      store_global(to[i], after, valid[i]);
    }
  }

  const Target<T> target_;
  int row_;
  int64_t at_;  // of channel 0
};

// acc = A B^T, the rows of A and B being pixels of the line, in whose channels they are summed. The tiles hold the last
// channels afterwards.
template <int kThreads, class Acc, class A, class B, class T>
__device__ __forceinline__ void channel_products(Acc& acc, const A& left, const B& right, const Rows<const T>& a,
                                                 int first_a, const Rows<const T>& b, int first_b) {
  clear(acc);
  for (int c = 0; c < a.channels; c += A::kColumns) {
    __syncthreads();
    left.template fetch<kThreads>(a, first_a, c);
    right.template fetch<kThreads>(b, first_b, c);
    copies_wait();
    __syncthreads();
    multiply<false, true>(acc, left, right, round_up(at_most(A::kColumns, a.channels - c), 16));
  }
}

// ---- forward: a block has kQueries queries, kKeys keys at a time, and every parts-th slice of the values ----

template <class T_, int kQueries_, int kKeys_>
struct TensorCoreForward {
  using T = T_;
  static constexpr int kQueries = kQueries_, kKeys = kKeys_, kThreads = 128;
  static constexpr int kTiles = kQueries / 64, kRows = 2 * kTiles;  // of a warp and of a lane
  static constexpr int kChunk = kKeys > 128 ? 128 : kKeys, kChunks = kKeys / kChunk;  // keys whose energies are there
  static constexpr int kSlice = 64 / kChunks;                                         // channels of values
  using Energies = Accumulator<TensorCores, T, kQueries, kChunk, kThreads, 1>;
  static constexpr int kColumns = kStrip / kTiles;  // that a warp makes at a time
  using Sums = Accumulator<TensorCores, T, kQueries, kColumns, kThreads, 1>;
  using Slice = Tile<T, kKeys, kSlice>;
  using QueryTile = Tile<T, kQueries, 64>;
  using KeyTile = Tile<T, kChunk, 64>;
  static constexpr int kPlace = QueryTile::kBytes > Slice::kBytes ? QueryTile::kBytes : Slice::kBytes;
  using Out = StripTarget<T, kTiles, kColumns>;
  static constexpr int kBytes = 2 * kPlace + kThreads / 32 * Out::Exchange::kNumbers * 4;
  // On a multiprocessor, as registers allow
  static constexpr int kBlocks = kKeys == 128 ? 2 : 3;
  static_assert(KeyTile::kBytes <= kPlace, "they share memory");

  // The softmax of a lane's rows over their path so far
  struct Softmax {
    float largest[kRows], sum[kRows];
  };
  // What the products with the new weights, and what earlier ones have made, are to be multiplied by
  struct Factors {
    float scale[kRows], keep[kRows];
  };

  // -inf for keys that are not on the path: beyond the line and, on later axes, the pixel itself
  static __device__ __forceinline__ void mask(Energies& energy, const Line& line, int first_query, int first_key) {
    const int own = line.first_axis ? -kTiles : (first_query + Energies::warp_row() - first_key) / 16;
#pragma unroll
    for (int k = 0; k < kChunk / 16; ++k) {
      if ((k >= own && k < own + kTiles) || first_key + 16 * k + 16 > line.length) {
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
#pragma unroll
          for (int j = 4 * k; j < 4 * k + 4; ++j) {
            const bool there = line.on_path(first_query + energy.row(i), first_key + energy.column(j));
            energy.x[i][j] = there ? energy.x[i][j] : -INFINITY;
          }
        }
      }
    }
  }

  // The weights of these keys, not yet scaled, and what that does to the softmax. Energies of several chunks of keys are
  // made once to find the largest, and all but the last a second time.
  static __device__ __forceinline__ Factors weigh(WarpRows<T, kTiles, kKeys>& weights, Softmax& softmax, T* first, T* second,
                                                  const Rows<const T>& query, const Rows<const T>& key,
                                                  const Line& line, int first_query, int first_key, bool last) {
    Factors factors;
    float largest[kRows], base[kRows], sum[kRows] = {};
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      largest[i] = softmax.largest[i];
    }
#pragma unroll
    for (int step = 0; step < 2 * kChunks - 1; ++step) {
      const int chunk = step < kChunks ? step : 2 * kChunks - 2 - step, keys = first_key + chunk * kChunk;
      Energies energy;
      channel_products<kThreads>(energy, QueryTile(first), KeyTile(second), query, first_query, key, keys);
      mask(energy, line, first_query, keys);
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
#pragma unroll
        for (int j = 0; j < Energies::kColumns && step < kChunks; ++j) {
          largest[i] = greater(largest[i], energy.x[i][j]);  // NaN does not stay here, but it does in the sum
        }
        if (step == kChunks - 1) {
          largest[i] = greater(largest[i], __shfl_xor_sync(~0u, largest[i], 1));
          largest[i] = greater(largest[i], __shfl_xor_sync(~0u, largest[i], 2));
          // Where every energy is -inf, so that -inf - -inf does not make NaN of a sum that is 0
          base[i] = largest[i] == -INFINITY ? 0 : largest[i];
        }
#pragma unroll
        for (int j = 0; j < Energies::kColumns && step >= kChunks - 1; ++j) {
          energy.x[i][j] = exponential<T>(energy.x[i][j] - base[i]);
          sum[i] += energy.x[i][j];
        }
      }
#pragma unroll
      for (int k = 0; k < kChunk / 16 && step >= kChunks - 1; ++k) {
        weights.set(chunk * kChunk / 16 + k, energy.x, 4 * k);
      }
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      sum[i] += __shfl_xor_sync(~0u, sum[i], 1);
      sum[i] += __shfl_xor_sync(~0u, sum[i], 2);
      const float before = softmax.sum[i] * exponential<T>(softmax.largest[i] - base[i]);
      softmax.largest[i] = largest[i];
      softmax.sum[i] = before + sum[i];
      // All -inf so far: 0, and NaN only if it stays so to the end
      factors.scale[i] = softmax.sum[i] == 0 && !last ? 0 : 1 / softmax.sum[i];
      factors.keep[i] = before * factors.scale[i];
    }
    return factors;
  }
};

template <class Work>
__global__ void __launch_bounds__(Work::kThreads, Work::kBlocks)
    attention_kernel(const Line line, const int parts, const LineMap<const typename Work::T> query,
                     const LineMap<const typename Work::T> key, const LineMap<const typename Work::T> value,
                     const typename Work::T* residual, const float* gamma, const LineMap<typename Work::T> out,
                     const PathSum<const float> path_before, const PathSum<float> path) {
  using T = typename Work::T;
  SharedCarver carver;
  constexpr int kPlace = Work::kPlace / static_cast<int>(sizeof(T));
  T *const first = carver.take<T>(kPlace), *const second = carver.take<T>(kPlace);
  const typename Work::Out::Exchange staging(carver.take<float>(Work::kThreads / 32 * Work::Out::Exchange::kNumbers));
  const int tiles = (line.length + Work::kQueries - 1) / Work::kQueries;
  const int part = blockIdx.x % parts, first_query = blockIdx.x / parts % tiles * Work::kQueries;
  const int64_t pixel = first_pixel(line, blockIdx.x / parts / tiles);
  const auto q = query.rows(line, pixel), k = key.rows(line, pixel), v = value.rows(line, pixel);
  const int row = first_query + Work::Sums::warp_row();

  for (int key_tile = 0; key_tile < line.length; key_tile += Work::kKeys) {
    const int first_key = unknown(key_tile);
    const bool last_keys = first_key + Work::kKeys >= line.length, last = line.last_axis && last_keys;
    const bool merges = !line.first_axis || first_key > 0;
    // f(i, whether the lane's row i is a query of the line, its pixel), each time computed anew
    const auto each_row = [&](const auto& f) {
#pragma unroll
      for (int i = 0; i < Work::kRows; ++i) {
        const int query_row = unknown(first_query) + Work::Sums::row(i);
        const bool valid = query_row < line.length;
        f(i, valid, pixel + (valid ? query_row * line.step : 0));
      }
    };
    typename Work::Softmax softmax;
    const PathSum<const float> earlier = first_key == 0 ? path_before : PathSum<const float>{path.largest, path.sum};
    each_row([&](int i, bool valid, int64_t u) {
      const float largest = load_global(earlier.largest + u, valid && merges);
      softmax.largest[i] = merges ? largest : -INFINITY;
      softmax.sum[i] = load_global(earlier.sum + u, valid && merges);
    });
    WarpRows<T, Work::kTiles, Work::kKeys> weights;
    auto factors = Work::weigh(weights, softmax, first, second, q, k, line, first_query, first_key, last);
    each_row([&](int i, bool valid, int64_t u) {
      const bool writes = valid && part == 0 && threadIdx.x % 4 == 0;
      store_global(path.largest + u, softmax.largest[i], writes);
      store_global(path.sum + u, softmax.sum[i], writes);
    });
    const bool residual_here = last && residual != nullptr;
    const typename Work::Out target(
        {out.rows(line, pixel), merges, residual_here ? residual + pixel * v.channels : nullptr}, row);
    const float by = residual_here ? load_global(gamma, true) : 1;
#pragma unroll
    for (int i = 0; i < Work::kRows; ++i) {
      factors.scale[i] *= by;
      factors.keep[i] *= by;
    }
    float scale[Work::Out::kRows], keep[Work::Out::kRows];
    Work::Out::exchange(factors.scale, scale);
    Work::Out::exchange(factors.keep, keep);

    // Slices alternate between two places.
    T *here = first, *there = second;
    __syncthreads();
    if (part * Work::kSlice < v.channels) {
      typename Work::Slice(here).template fetch<Work::kThreads>(v, first_key, part * Work::kSlice);
    }
    for (int c = part * Work::kSlice; c < v.channels; c += parts * Work::kSlice) {
      copies_wait();
      __syncthreads();
      if (c + parts * Work::kSlice < v.channels) {
        typename Work::Slice(there).template fetch<Work::kThreads>(v, first_key, c + parts * Work::kSlice);
      }
#pragma unroll 1
      for (int n = row < line.length ? 0 : Work::kSlice; n < Work::kSlice; n += Work::kColumns) {
        target.template make<typename Work::Sums>(
            c + n, staging, scale, keep, [&](auto& sums) { weights.multiply(sums, typename Work::Slice(here), n); });
      }
      T* const read = here;
      here = there;
      there = read;
    }
  }
}

// ---- backward ----

// What the forward pass found of each query, and delta, in shared memory
template <int kQueries>
struct QueryNumbers {
  float *largest, *inverse, *delta;
  __device__ __forceinline__ explicit QueryNumbers(float* memory)
      : largest(memory), inverse(memory + kQueries), delta(memory + 2 * kQueries) {}
  __device__ __forceinline__ QueryNumbers from(int row) const {
    QueryNumbers rows = *this;
    rows.largest += row, rows.inverse += row, rows.delta += row;
    return rows;
  }

  // f(row, whether it is a query of the line, its pixel), each row by a thread
  template <int kThreads, class F>
  static __device__ __forceinline__ void each(const Line& line, int64_t pixel, int first_query, const F& f) {
    static_assert(kThreads >= kQueries, "a row for a thread");
    const int row = threadIdx.x;
    if (kThreads == round_up(kQueries, 32) || row < round_up(kQueries, 32)) {  // whole warps
      const bool valid = row < kQueries && first_query + row < line.length;
      f(row, valid, pixel + (valid ? (first_query + row) * line.step : 0));
    }
  }
  // 0 for queries beyond the line
  template <int kThreads>
  __device__ __forceinline__ void load(const PathSum<const float>& path, const Line& line, int64_t pixel,
                                       int first_query) const {
    each<kThreads>(line, pixel, first_query, [&](int row, bool valid, int64_t u) {
      const float sum = load_global(path.sum + u, valid);
      store_shared(largest + row, load_global(path.largest + u, valid), row < kQueries);
      store_shared(inverse + row, valid ? 1 / sum : 0, row < kQueries);
    });
  }
};

template <class T_, int kQueries_>
struct TensorCoreBackward {
  using T = T_;
  static constexpr int kQueries = kQueries_;
  static constexpr int kFragments = kQueries / 16;

  // Where the lanes of a warp have its 16 keys' dP of a tile of queries
  static __host__ __device__ __forceinline__ int64_t products_at(const Line& line, int64_t number, int key, int query) {
    const int fragments = (line.length + 15) / 16, tiles = (line.length + kQueries - 1) / kQueries;
    return ((number * fragments + key / 16) * tiles + query / kQueries) * 16 * kQueries;
  }
  static __device__ __forceinline__ int64_t lane_at(int k, int i) {
    return ((k * 2 + i) * 32 + threadIdx.x % 32) * 4;
  }

  // x, energies of a warp's 16 keys with 16 queries, become weights.
  template <class Energies>
  static __device__ __forceinline__ void weights(Energies& energy, int k, const QueryNumbers<kQueries>& numbers,
                                                 const Line& line, int first_key, int first_query) {
    const int key = first_key + Energies::warp_row(), query = first_query + 16 * k;
    const bool whole = key + 16 <= line.length && query + 16 <= line.length && (line.first_axis || key != query);
#pragma unroll
    for (int j = 4 * k; j < 4 * k + 4; j += 2) {
      const int column = energy.column(j);
      const auto largest = load_shared(reinterpret_cast<const Run<float, 2>*>(numbers.largest + column));
      const auto inverse = load_shared(reinterpret_cast<const Run<float, 2>*>(numbers.inverse + column));
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          energy.x[i][j + e] = exponential<T>(energy.x[i][j + e] - largest.x[e]) * inverse.x[e];
        }
      }
    }
    if (!whole) {
#pragma unroll
      for (int j = 4 * k; j < 4 * k + 4; ++j) {
        const int column = first_query + energy.column(j);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const bool there = column < line.length && line.on_path(column, first_key + energy.row(i));
          energy.x[i][j] = there ? energy.x[i][j] : 0;
        }
      }
    }
  }
};

// grad_value, dP and delta: a block has 64 keys of a line and all of its queries. Every warp makes the weights of 16
// keys. Then two warps share 32 keys, so that what they read of the queries serves more keys: each makes dP of half of the
// queries, and grad_value of half of the channels.
template <class T_, int kQueries_>
struct TensorCoreValueGradient : TensorCoreBackward<T_, kQueries_> {
  using T = T_;
  static constexpr int kQueries = kQueries_, kKeys = 64, kThreads = 2 * kKeys, kWarps = kThreads / 32, kTiles = 2;
  static constexpr int kFragments = kQueries / 16, kHalf = (kFragments + 1) / 2;  // of queries; of them a warp's
  using Energies = Accumulator<TensorCores, T, kKeys, kQueries, kThreads, 1>;
  using Products = Accumulator<TensorCores, T, kKeys, 2 * kHalf * 16, kThreads, 2>;
  using Sums = Accumulator<TensorCores, T, kKeys, kStrip, kThreads, 2>;
  using Weights = WarpRows<T, kTiles, kQueries>;
  using Out = StripTarget<T, kTiles, kStrip / 2>;
  using QueryTile = Tile<T, kQueries, 64>;
  using KeyTile = Tile<T, kKeys, 64>;
  using WeightTile = Tile<T, kKeys, kQueries <= 64 ? 64 : 128>;
  using GradSlice = Tile<T, kQueries, kStrip>;
  using ValueSlice = Tile<T, kKeys, kStrip>;
  static constexpr int kBytes =
      QueryTile::kBytes + KeyTile::kBytes + (2 * kQueries + kWarps * Out::Exchange::kNumbers) * 4;
  static_assert(WeightTile::kBytes <= QueryTile::kBytes + KeyTile::kBytes, "they share memory");

  // A warp's first fragment of queries
  static __device__ __forceinline__ int first_fragment() { return Products::warp_column() / 16; }
  static __device__ __forceinline__ bool has_fragment(int f) {
    return (kFragments % 2 == 0 || f < kHalf - 1) || first_fragment() == 0;
  }

  // dP^T += V dO^T
  static __device__ __forceinline__ void multiply(Products& products, const ValueSlice& values, const GradSlice& grads) {
#pragma unroll
    for (int k = 0; k < kStrip; k += 16) {
      uint32_t left[kTiles][4];
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
        load_left<false>(left[m], values, Products::warp_row() + 16 * m, k);
      }
      const SharedAddress row =
          unknown(right_row<true>(grads, k, 0) + Products::warp_column() * GradSlice::kRowBytes);
#pragma unroll
      for (int f = 0; f < kHalf; ++f) {
        if (has_fragment(f)) {
          uint32_t right[4];
          load_right<true>(right, row + 16 * f * GradSlice::kRowBytes);
#pragma unroll
          for (int m = 0; m < kTiles; ++m) {
            products.add_product(m, f, left[m], right);
          }
        }
      }
    }
  }

  // Each query's sum of weight * dP over the keys of two warps, in `partial` [2, kQueries]
  static __device__ __forceinline__ void sum_keys(const Weights& weights, const Products& products, float* partial) {
    const bool second = first_fragment() > 0;
#pragma unroll
    for (int j = 0; j < Products::kColumns; j += 2) {
      Run<float, 2> sum = {};
      const int own = j / 4, other = own + kHalf < kFragments ? own + kHalf : own;
#pragma unroll
      for (int i = 0; i < Products::kRows; ++i) {
        const auto& rows = weights.x[i / 2];
        const int part = i % 2 + j % 4;
        const float2 weight = numbers_of<T>(unknown(second ? rows[other][part] : rows[own][part]));
        sum.x[0] += weight.x * products.x[i][j];
        sum.x[1] += weight.y * products.x[i][j + 1];
      }
#pragma unroll
      for (int bit = 4; bit < 32; bit *= 2) {
        sum.x[0] += __shfl_xor_sync(~0u, sum.x[0], bit);
        sum.x[1] += __shfl_xor_sync(~0u, sum.x[1], bit);
      }
      float* const to = partial + threadIdx.x / 64 * kQueries + products.column(j);
      store_shared(reinterpret_cast<Run<float, 2>*>(to), sum, threadIdx.x % 32 < 4 && has_fragment(own));
    }
  }

  // dP to scratch memory, of the warp's keys that are of the line
  static __device__ __forceinline__ void store(const Products& products, const AxisScratch<float>& scratch,
                                               const Line& line, int64_t number, int warp_key, int first_query) {
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
      const int key = warp_key + 16 * m;
      float* const to = scratch.products + TensorCoreValueGradient::products_at(line, number, key, first_query) +
                        TensorCoreValueGradient::lane_at(first_fragment(), 0);
#pragma unroll
      for (int f = 0; f < kHalf; ++f) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float(&x)[Products::kColumns] = products.x[2 * m + i];
          const Run<float, 4> four{{x[4 * f], x[4 * f + 1], x[4 * f + 2], x[4 * f + 3]}};
          store_global(reinterpret_cast<Run<float, 4>*>(to + (2 * f + i) * 128), four,
                       key < line.length && has_fragment(f));
        }
      }
    }
  }
};

template <class Work>
__global__ void __launch_bounds__(Work::kThreads, Work::kQueries > 64 ? 2 : 3)
    value_gradient_kernel(const Line line, const LineMap<const typename Work::T> query,
                          const LineMap<const typename Work::T> key, const LineMap<const typename Work::T> value,
                          const LineMap<const typename Work::T> grad_out, const PathSum<const float> path,
                          const float* gamma, const AxisScratch<float> scratch,
                          const LineMap<typename Work::T> grad_value) {
  using T = typename Work::T;
  constexpr int kQueries = Work::kQueries, kThreads = Work::kThreads;
  SharedCarver carver;
  T *const for_queries = carver.take<T>((kQueries + Work::kKeys) * 64), *const for_keys = for_queries + kQueries * 64;
  const QueryNumbers<kQueries> numbers(carver.take<float>(2 * kQueries));
  float* const memory = carver.take<float>(Work::kWarps * Work::Out::Exchange::kNumbers);
  const typename Work::Out::Exchange staging(memory);
  const int parts = (line.length + Work::kKeys - 1) / Work::kKeys;
  const int64_t number = blockIdx.x / parts, pixel = first_pixel(line, number);
  const int part = blockIdx.x % parts, first_key = part * Work::kKeys, warp_key = first_key + Work::Sums::warp_row();
  const auto v = value.rows(line, pixel), g = grad_out.rows(line, pixel);
  const float factor = gamma == nullptr ? 1 : load_global(gamma, true);
  const float scale[2] = {factor, factor}, keep[2] = {1, 1};

  for (int tile = 0; tile < line.length; tile += kQueries) {
    const int first_query = unknown(tile);
    __syncthreads();
    numbers.template load<kThreads>(path, line, pixel, first_query);
    typename Work::Energies energy;  // then weights
    __syncthreads();
    channel_products<kThreads>(energy, typename Work::KeyTile(for_keys), typename Work::QueryTile(for_queries),
                               key.rows(line, pixel), first_key, query.rows(line, pixel), first_query);
    const typename Work::WeightTile weight_tile(for_queries);
    WarpRows<T, 1, kQueries> rows;
#pragma unroll
    for (int k = 0; k < Work::kFragments; ++k) {
      Work::weights(energy, k, numbers, line, first_key, first_query);
      rows.set(k, energy.x, 4 * k);
    }
    __syncthreads();
    rows.store(weight_tile, Work::Energies::warp_row(), 0, kQueries);
    __syncthreads();
    typename Work::Weights weights;
    weights.load(weight_tile, Work::Sums::warp_row());
    typename Work::Products products;
    clear(products);

    // Slices alternate between two places.
    const auto grads = [&](int c) { return typename Work::GradSlice(for_queries + c / kStrip % 2 * kQueries * kStrip); };
    const auto values = [&](int c) { return typename Work::ValueSlice(for_keys + c / kStrip % 2 * Work::kKeys * kStrip); };
    const typename Work::Out target({grad_value.rows(line, pixel), !line.first_axis || first_query > 0}, warp_key);
    __syncthreads();
    const typename Work::GradSlice::template Source<kThreads> of_grads(g, first_query);
    if (v.channels > 0) {
      grads(0).fetch(of_grads, 0);
      values(0).template fetch<kThreads>(v, first_key, 0);
    }
    for (int c = 0; c < v.channels; c += kStrip) {
      copies_wait();
      __syncthreads();
      if (c + kStrip < v.channels) {
        grads(c + kStrip).fetch(of_grads, c + kStrip);
        values(c + kStrip).template fetch<kThreads>(v, first_key, c + kStrip);
      }
      if (warp_key < line.length) {
        const int column = Work::Sums::warp_column();
        Work::multiply(products, values(c), grads(c));
        target.template make<typename Work::Sums>(c + column, staging, scale, keep,
                                                  [&](auto& sums) { weights.multiply(sums, grads(c), column); });
      }
    }

    Work::store(products, scratch, line, number, warp_key, first_query);
    __syncthreads();
    Work::sum_keys(weights, products, memory);
    __syncthreads();
    numbers.template each<kThreads>(line, pixel, first_query, [&](int row, bool valid, int64_t u) {
      // of any row, so that no two lanes read from one bank
      const float sum = load_shared(memory + row) + load_shared(memory + kQueries + row);
      store_global(scratch.parts + part * scratch.pixels + u, sum, valid);
    });
  }
}

// grad_query and grad_key from dP and delta: a block has a line, a warp 16 of its keys, later 16 of its queries.
template <class T_, int kQueries_>
struct TensorCoreQueryKeyGradient : TensorCoreBackward<T_, kQueries_> {
  using T = T_;
  static constexpr int kQueries = kQueries_, kSide = kQueries, kThreads = 2 * kSide, kWarps = kThreads / 32;
  static constexpr int kPart = 64;  // queries whose energies are there at once
  using Energies = Accumulator<TensorCores, T, kSide, kPart, kThreads, 1>;
  using Sums = Accumulator<TensorCores, T, kSide, kStrip, kThreads, 1>;
  using Slice = Tile<T, kSide, 64>;  // of keys, or of dE^T with 64 queries
  using QueryTile = Tile<T, round_up(kSide, kPart), 64>;
  using QueryPart = Tile<T, kPart, 64>;
  using Out = StripTarget<T, 1, kStrip>;
  static constexpr int kBytes = 2 * Slice::kBytes + QueryTile::kBytes;
  static_assert(kWarps * Out::Exchange::kNumbers * 4 <= Slice::kBytes, "they share memory");

  // dP of the warp's keys and of kPart queries, as lanes have it, by fragments. So many are asked for before the energies,
  // as registers allow.
  static constexpr int kPartFragments = kPart / 16, kAhead = kThreads > 224 ? 2 : kPartFragments;
  struct Products {
    Run<float, 4> fours[kPartFragments][2];
    __device__ __forceinline__ void load(const float* of_warp, int first, int begin, int end, bool valid) {
#pragma unroll
      for (int f = begin; f < end; ++f) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int k = first / 16 + f;
          const auto* from = reinterpret_cast<const Run<float, 4>*>(of_warp + TensorCoreQueryKeyGradient::lane_at(k, i));
          fours[f][i] = load_global(from, valid && k < kQueries / 16);
        }
      }
    }
  };
};

template <class Work>
__global__ void __launch_bounds__(Work::kThreads, 2)
    query_key_gradient_kernel(const Line line, const LineMap<const typename Work::T> query,
                              const LineMap<const typename Work::T> key, const PathSum<const float> path,
                              const float* gamma, const AxisScratch<float> scratch, float* delta,
                              const LineMap<typename Work::T> grad_query, const LineMap<typename Work::T> grad_key) {
  using T = typename Work::T;
  using Slice = typename Work::Slice;
  constexpr int kSide = Work::kSide, kThreads = Work::kThreads;
  SharedCarver carver;
  const Slice keys(carver), grads(carver);
  const typename Work::QueryTile queries(carver);
  const QueryNumbers<kSide> numbers(reinterpret_cast<float*>(grads.data));
  const int64_t pixel = first_pixel(line, blockIdx.x);
  const auto q = query.rows(line, pixel), k = key.rows(line, pixel);
  const float factor = gamma == nullptr ? 1 : load_global(gamma, true);
  const float one[2] = {1, 1};

  for (int key_tile = 0; key_tile < line.length; key_tile += kSide) {
    for (int query_tile = 0; query_tile < line.length; query_tile += kSide) {
      const int first_key = unknown(key_tile), first_query = unknown(query_tile);
      const int warp_key = first_key + Work::Sums::warp_row();
      __syncthreads();
      numbers.template load<kThreads>(path, line, pixel, first_query);
      numbers.template each<kThreads>(line, pixel, first_query, [&](int row, bool valid, int64_t u) {
        const float sum = scratch.sum_of_parts(u, valid);
        store_shared(numbers.delta + row, sum, row < kSide);
        store_global(delta + u, sum, valid && line.first_axis && first_key == 0);
      });
      WarpRows<T, 1, kSide> grad_energy;
      grad_energy.clear();
      const float* const products = scratch.products + Work::products_at(line, blockIdx.x, warp_key, first_query);
      __syncthreads();
#pragma unroll
      for (int first = 0; first < kSide; first += Work::kPart) {
        typename Work::Products grad_weight;
        grad_weight.load(products, first, 0, Work::kAhead, warp_key < line.length);
        typename Work::Energies energy;  // then weights, then their gradients
        channel_products<kThreads>(energy, keys, typename Work::QueryPart(queries.data + first * 64), k, first_key, q,
                                   first_query + first);
        grad_weight.load(products, first, Work::kAhead, Work::kPartFragments, warp_key < line.length);
#pragma unroll
        for (int f = 0; f < Work::kPartFragments; ++f) {
          const int number = first / 16 + f;  // of the fragment of queries
          if (number < Work::kFragments && warp_key < line.length) {
            Work::weights(energy, f, numbers.from(first), line, first_key, first_query + first);
#pragma unroll
            for (int i = 0; i < 2; ++i) {
#pragma unroll
              for (int e = 0; e < 4; ++e) {
                const int j = 4 * f + e;
                const float mean = load_shared(numbers.delta + first + energy.column(j));
                energy.x[i][j] *= factor * (grad_weight.fours[f][i].x[e] - mean);
              }
            }
            grad_energy.set(number, energy.x, 4 * f);
          }
        }
      }

      for (int c = 0; c < q.channels; c += 64) {
        __syncthreads();
        if (q.channels > 64) {
          queries.template fetch<kThreads>(q, first_query, c);
          keys.template fetch<kThreads>(k, first_key, c);
          copies_wait();
          __syncthreads();
        }
        const typename Work::Out to_key({grad_key.rows(line, pixel), !line.first_axis || first_query > 0}, warp_key);
        const Target<T> of_query{grad_query.rows(line, pixel), !line.first_axis || first_key > 0};
        const typename Work::Out::Exchange in_grads(reinterpret_cast<float*>(grads.data)),
            in_queries(reinterpret_cast<float*>(queries.data));
#pragma unroll 1
        for (int n = 0; n < 64 && warp_key < line.length && c + n < k.channels; n += kStrip) {
          to_key.template make<typename Work::Sums>(c + n, in_grads, one, one,
                                                    [&](auto& sums) { grad_energy.multiply(sums, queries, n); });
        }
#pragma unroll
        for (int first = 0; first < kSide; first += Work::kPart) {
          __syncthreads();
          grad_energy.store(grads, Work::Sums::warp_row(), first, Work::kPart);
          __syncthreads();
          // A warp makes 16 queries by a strip of channels, of 4 by 2 such parts.
#pragma unroll 1
          for (int i = threadIdx.x / 32; i < 8; i += Work::kWarps) {
            const int m = i / 2 * 16, n = i % 2 * kStrip, query_row = first_query + first + m;
            if (first + m < kSide && query_row < line.length && c + n < q.channels) {
              const typename Work::Out to_query(of_query, query_row);
              to_query.template make<typename Work::Sums>(c + n, in_queries, one, one, [&](auto& sums) {
#pragma unroll 1
                for (int depth = 0; depth < kSide && first_key + depth < line.length; depth += 16) {
                  WarpRows<T, 1, 16> left;
                  load_left<true>(left.x[0][0], grads, m, depth);
                  left.multiply(sums, Slice(keys.data + depth * 64), n);
                }
              });
            }
          }
        }
      }
    }
  }
}

}  // namespace ccnet
