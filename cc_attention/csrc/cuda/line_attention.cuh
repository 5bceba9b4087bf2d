// Attention along lines, declared in line.h: the kernels.
//
// A block has a tile of a line's weights, [queries, keys], and everything is a product with it:
//   energy = Q K^T, out = P V;  dV = P^T dO, dP = dO V^T, dE = P * (dP - delta), dQ = dE K, dK = dE^T Q
// Queries are the rows, keys the columns. Channels pass by in slices. A tile merges into what the tiles before it have
// left, of its own line or of an earlier axis's, so a line may have any length; one that fits into a tile has all its
// data read once.
#pragma once

#include <type_traits>

#include "cc_attention/csrc/cuda/line.h"
#include "libs/csrc/cuda/matmul.cuh"

namespace ccnet {

template <class T>
__device__ __forceinline__ T larger(T a, T b) {
  return b > a || b != b ? b : a;  // NaN stays
}
__device__ __forceinline__ int at_most(int limit, int x) { return x < limit ? x : limit; }

// Of the line of that number
__device__ __forceinline__ int64_t first_pixel(const Line& line, int64_t number) {
  return number / line.step * line.step * line.length + number % line.step;
}

// A map, as one block sees it: the rows of one line
template <class T>
struct LineMap {
  T* data;
  int channels;
  bool aligned;
  explicit LineMap(const Pixels<T>& x) : data(x.data), channels(x.channels) {
    constexpr int pack = 16 / sizeof(T);
    aligned = channels % pack == 0 && reinterpret_cast<uintptr_t>(data) % 16 == 0;
  }
  __device__ __forceinline__ Rows<T> rows(const Line& line, int64_t first_pixel) const {
    return {data + first_pixel * channels, line.step * channels, line.length, channels, aligned};
  }
};

template <class Cores, class T, int kTile>
struct LineAttention {
  using Element = T;
  using Real = Accumulate<T>;
  using In = LineMap<const T>;
  using Out = LineMap<T>;
  static constexpr int kSide = kTile;
  static constexpr bool kTensorCores = std::is_same_v<Cores, TensorCores>;
  static constexpr int kThreads = kTensorCores ? 2 * kTile : 256;
  // Channels at a time: of queries and keys, and of values forward; and of values backward
  static constexpr int kSlice = kTensorCores ? 64 : 32, kGradSlice = 32;
  using Weights = Accumulator<Cores, T, kTile, kTile, kThreads>;
  using Sums = Accumulator<Cores, T, kTile, kSlice, kThreads>;
  using GradSums = Accumulator<Cores, T, kTile, kGradSlice, kThreads>;
  using WeightTile = Tile<T, kTile, kTile>;
  using Slice = Tile<T, kTile, kSlice>;
  using GradSlice = Tile<T, kTile, kGradSlice>;
  static constexpr int kRowNumbers = 3 + 2 * Weights::kColumnWarps;
  static constexpr int kMapBytes = WeightTile::kBytes + 2 * Slice::kBytes;
  static constexpr int kForwardBytes = kMapBytes + kRowNumbers * kTile * static_cast<int>(sizeof(Real));
  static constexpr int kBackwardBytes = kMapBytes + 2 * GradSlice::kBytes;
  static constexpr int kMapBackwardBytes = WeightTile::kBytes + 2 * GradSlice::kBytes;
  static constexpr int kMostBytes = kForwardBytes > kBackwardBytes ? kForwardBytes : kBackwardBytes;

  // Of queries and keys of a tile that begins at first_query and first_key
  struct Corner {
    const Line& line;
    int first_query, first_key;
    __device__ __forceinline__ bool has_query(int row) const { return first_query + row < line.length; }
    // Whether the key is on the query's path: each pixel is on its own only once, in the first axis.
    __device__ __forceinline__ bool has(int row, int column) const {
      const int query = first_query + row, key = first_key + column;
      return query < line.length && key < line.length && (line.first_axis || query != key);
    }
    // Explicit form: where the key is among the query's weights
    __device__ __forceinline__ int place(int row, int column) const {
      const int query = first_query + row, key = first_key + column;
      return line.path_begin + key - (!line.first_axis && key > query);
    }
    __device__ __forceinline__ int queries() const { return at_most(kTile, line.length - first_query); }
    __device__ __forceinline__ int keys() const { return at_most(kTile, line.length - first_key); }
  };

  // ---- steps that the kernels have in common ----

  static __device__ __forceinline__ void store(const Weights& x, const WeightTile& tile) {
#pragma unroll
    for (int i = 0; i < Weights::kRows; ++i) {
#pragma unroll
      for (int j = 0; j < Weights::kColumns; j += Weights::kGroup) {
        Run<T, Weights::kGroup> run;
#pragma unroll
        for (int k = 0; k < Weights::kGroup; ++k) {
          run.x[k] = down<T>(x.x[i][j + k]);
        }
        tile.store(x.row(i), x.column(j), run);
      }
    }
  }

  // energy = Q K^T. The slices hold the last channels afterwards.
  static __device__ __forceinline__ void energies(Weights& energy, const Slice& queries, const Slice& keys,
                                                  const Rows<const T>& query, const Rows<const T>& key,
                                                  const Corner& corner) {
    clear(energy);
    for (int c = 0; c < query.channels; c += kSlice) {
      __syncthreads();
      queries.template fetch<kThreads>(query, corner.first_query, c);
      keys.template fetch<kThreads>(key, corner.first_key, c);
      copies_wait();
      __syncthreads();
      multiply<false, true>(energy, queries, keys, round_up(at_most(kSlice, query.channels - c), 16));
    }
  }

  // energy becomes the weights that softmax gave it over the whole path.
  static __device__ __forceinline__ void weights_again(Weights& energy, const PathSum<const Real>& path,
                                                       const Corner& corner, int64_t pixel) {
#pragma unroll
    for (int i = 0; i < Weights::kRows; ++i) {
      const int row = energy.row(i);
      const bool valid = corner.has_query(row);
      const int64_t u = valid ? pixel + (corner.first_query + row) * corner.line.step : 0;
      const Real largest = load_global(path.largest + u, valid);
      const Real inverse = 1 / load_global(path.sum + u, valid);
#pragma unroll
      for (int j = 0; j < Weights::kColumns; ++j) {
        const bool on_path = corner.has(row, energy.column(j));
        energy.x[i][j] = on_path ? exponential<T>(energy.x[i][j] - largest) * inverse : 0;
      }
    }
  }

  // What softmax needs of a tile's rows between threads. largest and sum are those of each query's path so far.
  struct RowNumbers {
    Real *largest, *sum, *keep;     // [kTile]
    Real *largest_here, *sum_here;  // [kColumnWarps, kTile]
    __device__ __forceinline__ explicit RowNumbers(SharedCarver& carver)
        : largest(carver.take<Real>(kTile)),
          sum(carver.take<Real>(kTile)),
          keep(carver.take<Real>(kTile)),
          largest_here(carver.take<Real>(Weights::kColumnWarps * kTile)),
          sum_here(carver.take<Real>(Weights::kColumnWarps * kTile)) {}

    __device__ __forceinline__ void begin(const PathSum<Real>& path, const Corner& corner, int64_t pixel) const {
      const int row = threadIdx.x;
      const bool earlier = row < kTile && corner.has_query(row) && !corner.line.first_axis;
      const int64_t u = earlier ? pixel + (corner.first_query + row) * corner.line.step : 0;
      const Real before = load_global(path.largest + u, earlier), its_sum = load_global(path.sum + u, earlier);
      store_shared(largest + row, earlier ? before : -static_cast<Real>(INFINITY), row < kTile);
      store_shared(sum + row, earlier ? its_sum : 0, row < kTile);
    }
    __device__ __forceinline__ void end(const PathSum<Real>& path, const Corner& corner, int64_t pixel) const {
      const int row = threadIdx.x;
      const bool valid = row < kTile && corner.has_query(row);
      const int64_t u = valid ? pixel + (corner.first_query + row) * corner.line.step : 0;
      store_global(path.largest + u, load_shared(largest + row % kTile), valid);
      store_global(path.sum + u, load_shared(sum + row % kTile), valid);
    }
  };

  // energy becomes weights among those of the path so far; `keep` is what earlier weights are to be multiplied by.
  static __device__ __forceinline__ void softmax(Weights& energy, const RowNumbers& numbers, const Corner& corner,
                                                 bool last) {
    const int part = threadIdx.x / 32 % Weights::kColumnWarps * kTile;
    const bool first_lane = threadIdx.x % Weights::kRowLanes == 0;
    Real before[Weights::kRows], merged[Weights::kRows];
#pragma unroll
    for (int i = 0; i < Weights::kRows; ++i) {
      Real largest = -static_cast<Real>(INFINITY);
#pragma unroll
      for (int j = 0; j < Weights::kColumns; ++j) {
        const bool on_path = corner.has(energy.row(i), energy.column(j));
        energy.x[i][j] = on_path ? energy.x[i][j] : -static_cast<Real>(INFINITY);
        largest = larger(largest, energy.x[i][j]);
      }
#pragma unroll
      for (int bit = 1; bit < Weights::kRowLanes; bit *= 2) {
        largest = larger(largest, __shfl_xor_sync(~0u, largest, bit));
      }
      store_shared(numbers.largest_here + part + energy.row(i), largest, first_lane);
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < Weights::kRows; ++i) {
      const int row = energy.row(i);
      const Real earlier = load_shared(numbers.largest + row);
      Real largest = earlier;
#pragma unroll
      for (int w = 0; w < Weights::kColumnWarps; ++w) {
        largest = larger(largest, load_shared(numbers.largest_here + w * kTile + row));
      }
      merged[i] = largest;
      // Where every energy is -inf, so that -inf - -inf does not make NaN of a sum that is 0
      const Real base = largest == -static_cast<Real>(INFINITY) ? 0 : largest;
      before[i] = load_shared(numbers.sum + row) * exponential<T>(earlier - base);
      Real sum = 0;
#pragma unroll
      for (int j = 0; j < Weights::kColumns; ++j) {
        energy.x[i][j] = exponential<T>(energy.x[i][j] - base);
        sum += energy.x[i][j];
      }
#pragma unroll
      for (int bit = 1; bit < Weights::kRowLanes; bit *= 2) {
        sum += __shfl_xor_sync(~0u, sum, bit);
      }
      store_shared(numbers.sum_here + part + row, sum, first_lane);
    }
    __syncthreads();
    const bool writes = first_lane && part == 0;
#pragma unroll
    for (int i = 0; i < Weights::kRows; ++i) {
      const int row = energy.row(i);
      Real total = before[i];
#pragma unroll
      for (int w = 0; w < Weights::kColumnWarps; ++w) {
        total += load_shared(numbers.sum_here + w * kTile + row);
      }
      // All -inf so far: 0, and NaN only if it stays so to the end
      const Real inverse = total == 0 && !last ? 0 : 1 / total;
#pragma unroll
      for (int j = 0; j < Weights::kColumns; ++j) {
        energy.x[i][j] *= inverse;
      }
      store_shared(numbers.largest + row, merged[i], writes);
      store_shared(numbers.sum + row, total, writes);
      store_shared(numbers.keep + row, before[i] * inverse, writes);
    }
  }

  // out = P V, or with add: keep * out + P V. The first slice of values has been asked for in `first`.
  template <class Keep>
  static __device__ __forceinline__ void weigh_values(const WeightTile& weight, const Slice& first, const Slice& second,
                                                      const Rows<const T>& value, const Rows<T>& out,
                                                      const Corner& corner, bool add, const Keep& keep) {
    Slice slice = first, next = second;
    for (int c = 0; c < value.channels; c += kSlice) {
      copies_wait();
      __syncthreads();
      if (c + kSlice < value.channels) {
        next.template fetch<kThreads>(value, corner.first_key, c + kSlice);
      }
      Sums sums;
      clear(sums);
      multiply<false, false>(sums, weight, slice, round_up(corner.keys(), 16));
      write_rows(sums, out, corner.first_query, c, add, keep);
      T* const read = slice.data;
      slice.data = next.data;
      next.data = read;
    }
  }

  // grad_weight = dO V^T; grad_value = P^T dO, or with add, takes it in.
  static __device__ __forceinline__ void value_gradients(Weights& grad_weight, const WeightTile& weight,
                                                         const GradSlice& grads, const GradSlice& values,
                                                         const Rows<const T>& grad_out, const Rows<const T>& value,
                                                         const Rows<T>& grad_value, const Corner& corner, bool add) {
    clear(grad_weight);
    for (int c = 0; c < value.channels; c += kGradSlice) {
      __syncthreads();
      grads.template fetch<kThreads>(grad_out, corner.first_query, c);
      values.template fetch<kThreads>(value, corner.first_key, c);
      copies_wait();
      __syncthreads();
      multiply<false, true>(grad_weight, grads, values, round_up(at_most(kGradSlice, value.channels - c), 16));
      GradSums sums;
      clear(sums);
      multiply<true, false>(sums, weight, grads, round_up(corner.queries(), 16));
      write_rows(sums, grad_value, corner.first_key, c, add, [](int) { return Real(1); });
    }
    __syncthreads();
  }

  // weight becomes the gradient of the energies.
  static __device__ __forceinline__ void energy_gradients(const Weights& grad_weight, const WeightTile& weight,
                                                          const Real* delta, const Corner& corner, int64_t pixel) {
#pragma unroll
    for (int i = 0; i < Weights::kRows; ++i) {
      const int row = grad_weight.row(i);
      const bool valid = corner.has_query(row);
      const int64_t u = valid ? pixel + (corner.first_query + row) * corner.line.step : 0;
      const Real d = load_global(delta + u, valid);
#pragma unroll
      for (int j = 0; j < Weights::kColumns; j += Weights::kGroup) {
        auto run = weight.template load<Weights::kGroup>(row, grad_weight.column(j));
#pragma unroll
        for (int e = 0; e < Weights::kGroup; ++e) {
          const bool on_path = corner.has(row, grad_weight.column(j + e));
          run.x[e] = down<T>(on_path ? up(run.x[e]) * (grad_weight.x[i][j + e] - d) : 0);
        }
        weight.template store<Weights::kGroup>(row, grad_weight.column(j), run);
      }
    }
  }

  // grad_query and grad_key from the gradient of the energies. The slices are there if there is only one.
  static __device__ __forceinline__ void query_key_gradients(const WeightTile& grad_energy, const Slice& queries,
                                                             const Slice& keys, const Rows<const T>& query,
                                                             const Rows<const T>& key, const Rows<T>& grad_query,
                                                             const Rows<T>& grad_key, const Corner& corner, bool there,
                                                             bool add_query, bool add_key) {
    const auto one = [](int) { return Real(1); };
    for (int c = 0; c < query.channels; c += kSlice) {
      __syncthreads();
      if (!there || query.channels > kSlice) {
        queries.template fetch<kThreads>(query, corner.first_query, c);
        keys.template fetch<kThreads>(key, corner.first_key, c);
        copies_wait();
        __syncthreads();
      }
      Sums sums;
      clear(sums);
      multiply<false, false>(sums, grad_energy, keys, round_up(corner.keys(), 16));
      write_rows(sums, grad_query, corner.first_query, c, add_query, one);
      clear(sums);
      multiply<true, false>(sums, grad_energy, queries, round_up(corner.queries(), 16));
      write_rows(sums, grad_key, corner.first_key, c, add_key, one);
    }
  }

  // f(row, column, number of the weight in its map, whether it is on the path) for a tile's weights of the explicit
  // form
  template <class U, class F>
  static __device__ __forceinline__ void each_weight(const Rows<U>& weight, const Corner& corner, const F& f) {
    for (int k = threadIdx.x; k < kTile * kTile; k += kThreads) {
      const int row = k / kTile, column = k % kTile;
      const bool valid = corner.has(row, column);
      f(row, column, valid ? (corner.first_query + row) * weight.stride + corner.place(row, column) : 0, valid);
    }
  }
};

// ---- kernels: a block has the tiles of one line that have the same queries, or all tiles of a line ----

template <class Work>
__global__ void __launch_bounds__(Work::kThreads, 2)
    attention_kernel(const Line line, const typename Work::In query, const typename Work::In key,
                     const typename Work::In value, const typename Work::Out out,
                     const PathSum<typename Work::Real> path) {
  constexpr int kTile = Work::kSide;
  SharedCarver carver;
  const typename Work::WeightTile weight(carver);
  const typename Work::Slice first(carver), second(carver);
  const typename Work::RowNumbers numbers(carver);
  const int tiles = (line.length + kTile - 1) / kTile;
  const int64_t pixel = first_pixel(line, blockIdx.x / tiles);
  const int first_query = blockIdx.x % tiles * kTile;
  const auto q = query.rows(line, pixel), k = key.rows(line, pixel), v = value.rows(line, pixel);
  numbers.begin(path, {line, first_query, 0}, pixel);
  for (int first_key = 0; first_key < line.length; first_key += kTile) {
    const typename Work::Corner corner{line, unknown(first_query), unknown(first_key)};
    typename Work::Weights energy;
    Work::energies(energy, first, second, q, k, corner);
    __syncthreads();
    if (v.channels > 0) {
      first.template fetch<Work::kThreads>(v, first_key, 0);
    }
    Work::softmax(energy, numbers, corner, line.last_axis && first_key + kTile >= line.length);
    Work::store(energy, weight);
    Work::weigh_values(weight, first, second, v, out.rows(line, pixel), corner, !line.first_axis || first_key > 0,
                       [&](int row) { return load_shared(numbers.keep + row); });
  }
  __syncthreads();
  numbers.end(path, {line, first_query, 0}, pixel);
}

template <class Work>
__global__ void __launch_bounds__(Work::kThreads, 2)
    attention_backward_kernel(const Line line, const typename Work::In query, const typename Work::In key,
                              const typename Work::In value, const typename Work::In grad_out,
                              const PathSum<const typename Work::Real> path, const typename Work::Real* delta,
                              const typename Work::Out grad_query, const typename Work::Out grad_key,
                              const typename Work::Out grad_value) {
  constexpr int kTile = Work::kSide;
  using Weights = typename Work::Weights;
  SharedCarver carver;
  const typename Work::WeightTile weight(carver);
  const typename Work::Slice queries(carver), keys(carver);
  const typename Work::GradSlice grads(carver), values(carver);
  const int64_t pixel = first_pixel(line, blockIdx.x);
  for (int first_key = 0; first_key < line.length; first_key += kTile) {
    for (int first_query = 0; first_query < line.length; first_query += kTile) {
      const auto corner = [&] { return typename Work::Corner{line, unknown(first_query), unknown(first_key)}; };
      Weights x;  // energies, then weights, then their gradients
      Work::energies(x, queries, keys, query.rows(line, pixel), key.rows(line, pixel), corner());
      Work::weights_again(x, path, corner(), pixel);
      Work::store(x, weight);
      Work::value_gradients(x, weight, grads, values, grad_out.rows(line, pixel), value.rows(line, pixel),
                            grad_value.rows(line, pixel), corner(), !line.first_axis || first_query > 0);
      Work::energy_gradients(x, weight, delta, corner(), pixel);
      Work::query_key_gradients(weight, queries, keys, query.rows(line, pixel), key.rows(line, pixel),
                                grad_query.rows(line, pixel), grad_key.rows(line, pixel), corner(), true,
                                !line.first_axis || first_key > 0, !line.first_axis || first_query > 0);
      __syncthreads();
    }
  }
}

// delta[u] = sum of a[u] * b[u] over channels; a warp for a pixel
template <class T>
__global__ void __launch_bounds__(256)
    dot_product_kernel(const LineMap<const T> a, const LineMap<const T> b, int64_t pixels, Accumulate<T>* delta) {
  constexpr int kPack = 16 / sizeof(T);
  const int64_t pixel = blockIdx.x * int64_t{8} + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const bool aligned = a.aligned && b.aligned;
  const T *x = a.data + (pixel < pixels ? pixel * a.channels : 0), *y = b.data + (x - a.data);
  Accumulate<T> sum = 0;
  if (aligned) {
    for (int c = lane * kPack; c < round_up(a.channels, 32 * kPack); c += 32 * kPack) {
      const bool valid = pixel < pixels && c < a.channels;
      const auto p = load_global(reinterpret_cast<const Run<T, kPack>*>(x + (valid ? c : 0)), valid);
      const auto q = load_global(reinterpret_cast<const Run<T, kPack>*>(y + (valid ? c : 0)), valid);
#pragma unroll
      for (int e = 0; e < kPack; ++e) {
        sum += valid ? up(p.x[e]) * up(q.x[e]) : 0;
      }
    }
  } else {
    for (int c = lane; c < round_up(a.channels, 32); c += 32) {
      const bool valid = pixel < pixels && c < a.channels;
      const T p = load_global(x + (valid ? c : 0), valid), q = load_global(y + (valid ? c : 0), valid);
      sum += valid ? up(p) * up(q) : 0;
    }
  }
#pragma unroll
  for (int bit = 16; bit > 0; bit /= 2) {
    sum += __shfl_xor_sync(~0u, sum, bit);
  }
  store_global(delta + (pixel < pixels ? pixel : 0), sum, lane == 0 && pixel < pixels);
}

template <class Work>
__global__ void __launch_bounds__(Work::kThreads, 2)
    energy_kernel(const Line line, const typename Work::In query, const typename Work::In key,
                  const typename Work::Out energy_map) {
  constexpr int kTile = Work::kSide;
  SharedCarver carver;
  const typename Work::WeightTile energy(carver);
  const typename Work::Slice queries(carver), keys(carver);
  const int tiles = (line.length + kTile - 1) / kTile;
  const int64_t pixel = first_pixel(line, blockIdx.x / tiles);
  const int first_query = blockIdx.x % tiles * kTile;
  const auto rows = energy_map.rows(line, pixel);
  for (int first_key = 0; first_key < line.length; first_key += kTile) {
    const typename Work::Corner corner{line, unknown(first_query), unknown(first_key)};
    typename Work::Weights x;
    Work::energies(x, queries, keys, query.rows(line, pixel), key.rows(line, pixel), corner);
    __syncthreads();
    Work::store(x, energy);
    __syncthreads();
    Work::each_weight(rows, corner, [&](int row, int column, int64_t place, bool valid) {
      store_global(rows.data + place, load_shared(energy.at(row, column)), valid);
    });
  }
}

template <class Work>
__global__ void __launch_bounds__(Work::kThreads, 2)
    energy_backward_kernel(const Line line, const typename Work::In query, const typename Work::In key,
                           const typename Work::In grad_energy_map, const typename Work::Out grad_query,
                           const typename Work::Out grad_key) {
  constexpr int kTile = Work::kSide;
  SharedCarver carver;
  const typename Work::WeightTile grad_energy(carver);
  const typename Work::Slice queries(carver), keys(carver);
  const int64_t pixel = first_pixel(line, blockIdx.x);
  const auto grads = grad_energy_map.rows(line, pixel);
  for (int first_key = 0; first_key < line.length; first_key += kTile) {
    for (int first_query = 0; first_query < line.length; first_query += kTile) {
      const typename Work::Corner corner{line, unknown(first_query), unknown(first_key)};
      Work::each_weight(grads, corner, [&](int row, int column, int64_t place, bool valid) {
        store_shared(grad_energy.at(row, column), load_global(grads.data + place, valid));
      });
      Work::query_key_gradients(grad_energy, queries, keys, query.rows(line, pixel), key.rows(line, pixel),
                                grad_query.rows(line, pixel), grad_key.rows(line, pixel), corner, false,
                                !line.first_axis || first_key > 0, !line.first_axis || first_query > 0);
      __syncthreads();
    }
  }
}

template <class Work>
__global__ void __launch_bounds__(Work::kThreads, 2)
    map_kernel(const Line line, const typename Work::In weight_map, const typename Work::In value,
               const typename Work::Out out) {
  constexpr int kTile = Work::kSide;
  SharedCarver carver;
  const typename Work::WeightTile weight(carver);
  const typename Work::Slice first(carver), second(carver);
  const int tiles = (line.length + kTile - 1) / kTile;
  const int64_t pixel = first_pixel(line, blockIdx.x / tiles);
  const int first_query = blockIdx.x % tiles * kTile;
  const auto weights = weight_map.rows(line, pixel), v = value.rows(line, pixel);
  for (int first_key = 0; first_key < line.length; first_key += kTile) {
    const typename Work::Corner corner{line, unknown(first_query), unknown(first_key)};
    __syncthreads();
    if (v.channels > 0) {
      first.template fetch<Work::kThreads>(v, first_key, 0);
    }
    Work::each_weight(weights, corner, [&](int row, int column, int64_t place, bool valid) {
      store_shared(weight.at(row, column), load_global(weights.data + place, valid));
    });
    Work::weigh_values(weight, first, second, v, out.rows(line, pixel), corner, !line.first_axis || first_key > 0,
                       [](int) { return typename Work::Real(1); });
  }
}

template <class Work>
__global__ void __launch_bounds__(Work::kThreads, 2)
    map_backward_kernel(const Line line, const typename Work::In weight_map, const typename Work::In value,
                        const typename Work::In grad_out, const typename Work::Out grad_weight_map,
                        const typename Work::Out grad_value) {
  constexpr int kTile = Work::kSide;
  SharedCarver carver;
  const typename Work::WeightTile weight(carver);
  const typename Work::GradSlice grads(carver), values(carver);
  const int64_t pixel = first_pixel(line, blockIdx.x);
  const auto weights = weight_map.rows(line, pixel);
  const auto grad_weights = grad_weight_map.rows(line, pixel);
  for (int first_key = 0; first_key < line.length; first_key += kTile) {
    for (int first_query = 0; first_query < line.length; first_query += kTile) {
      const typename Work::Corner corner{line, unknown(first_query), unknown(first_key)};
      Work::each_weight(weights, corner, [&](int row, int column, int64_t place, bool valid) {
        store_shared(weight.at(row, column), load_global(weights.data + place, valid));
      });
      typename Work::Weights grad_weight;
      Work::value_gradients(grad_weight, weight, grads, values, grad_out.rows(line, pixel), value.rows(line, pixel),
                            grad_value.rows(line, pixel), corner, !line.first_axis || first_query > 0);
      Work::store(grad_weight, weight);
      __syncthreads();
      Work::each_weight(grad_weights, corner, [&](int row, int column, int64_t place, bool valid) {
        store_global(grad_weights.data + place, load_shared(weight.at(row, column)), valid);
      });
      __syncthreads();
    }
  }
}

}  // namespace ccnet
