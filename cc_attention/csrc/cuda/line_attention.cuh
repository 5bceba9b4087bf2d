// Attention along lines: the explicit form, and attention itself without tensor cores or as TF32.
//
// A block has a tile of a line's weights, [queries, keys], in shared memory, and everything is a product with it:
//   energy = Q K^T, out = P V;  dV = P^T dO, dP = dO V^T, dE = P * (dP - delta), dQ = dE K, dK = dE^T Q
// Queries are the rows, keys the columns. Channels pass by in slices. A tile merges into what the tiles before it have
// left, of its own line or of an earlier axis's, so a line may have any length; one that fits into a tile has all its
// data read once.
#pragma once

#include <type_traits>

#include "cc_attention/csrc/cuda/line_map.cuh"
#include "libs/csrc/cuda/matmul.cuh"

namespace ccnet {

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
  static constexpr int kSlice = sizeof(T) == 2 && kTensorCores ? 64 : 32, kGradSlice = 32;
  using Weights = Accumulator<Cores, T, kTile, kTile, kThreads>;
  using Sums = Accumulator<Cores, T, kTile, kSlice, kThreads>;
  using GradSums = Accumulator<Cores, T, kTile, kGradSlice, kThreads>;
  using WeightTile = Tile<T, kTile, kTile>;
  using Slice = Tile<T, kTile, kSlice>;
  using GradSlice = Tile<T, kTile, kGradSlice>;
  static constexpr int kRowNumbers = 3 + 2 * Weights::kColumnWarps;
  static constexpr int kMapBytes = WeightTile::kBytes + 2 * Slice::kBytes;
  static constexpr int kForwardBytes = kMapBytes + kRowNumbers * kTile * static_cast<int>(sizeof(Real));
  static constexpr int kMapBackwardBytes = WeightTile::kBytes + 2 * GradSlice::kBytes;
  static constexpr int kValueGradientBytes =
      kMapBackwardBytes + Weights::kColumnWarps * kTile * static_cast<int>(sizeof(Real));

  // Of queries and keys of a tile that begins at first_query and first_key
  struct Corner {
    const Line& line;
    int first_query, first_key;
    __device__ __forceinline__ bool has_query(int row) const { return first_query + row < line.length; }
    // Whether the key is on the query's path: each pixel is on its own only once, in the first axis.
    __device__ __forceinline__ bool has(int row, int column) const {
      return has_query(row) && line.on_path(first_query + row, first_key + column);
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

  // Where dP of a tile is, of the line of that number
  static __host__ __device__ __forceinline__ int64_t products_at(const Line& line, int64_t number, int first_key,
                                                                 int first_query) {
    const int tiles = (line.length + kTile - 1) / kTile;
    return ((number * tiles + first_key / kTile) * tiles + first_query / kTile) * kTile * kTile;
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

    __device__ __forceinline__ void begin(const PathSum<const Real>& path, const Corner& corner, int64_t pixel) const {
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
        largest = greater(largest, energy.x[i][j]);  // NaN does not stay here, but it does in the sum
      }
#pragma unroll
      for (int bit = 1; bit < Weights::kRowLanes; bit *= 2) {
        largest = greater(largest, __shfl_xor_sync(~0u, largest, bit));
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
        largest = greater(largest, load_shared(numbers.largest_here + w * kTile + row));
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

  // target becomes scale * P V, merged with what is there. The first slice of values has been asked for in `first`.
  template <class Scale, class Keep>
  static __device__ __forceinline__ void weigh_values(const WeightTile& weight, const Slice& first, const Slice& second,
                                                      const Rows<const T>& value, const Target<T>& target,
                                                      const Corner& corner, const Scale& scale, const Keep& keep) {
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
      write_rows(sums, target, corner.first_query, c, scale, keep);
      T* const read = slice.data;
      slice.data = next.data;
      next.data = read;
    }
  }

  static __device__ __forceinline__ Real one(int) { return 1; }

  // grad_weight = dO V^T; grad_value = gamma * P^T dO, or with add, takes it in.
  static __device__ __forceinline__ void value_gradients(Weights& grad_weight, const WeightTile& weight,
                                                         const GradSlice& grads, const GradSlice& values,
                                                         const Rows<const T>& grad_out, const Rows<const T>& value,
                                                         const Target<T>& grad_value, const Corner& corner,
                                                         Real gamma) {
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
      write_rows(sums, grad_value, corner.first_key, c, [&](int) { return gamma; }, one);
    }
    __syncthreads();
  }

  // Each query's sum of weight * dP over the tile's keys, to the column warps' sums in `partial` [kColumnWarps, kTile]
  static __device__ __forceinline__ void sum_keys(const Weights& products, const WeightTile& weight, Real* partial) {
#pragma unroll
    for (int i = 0; i < Weights::kRows; ++i) {
      const int row = products.row(i);
      Real sum = 0;
#pragma unroll
      for (int j = 0; j < Weights::kColumns; j += Weights::kGroup) {
        const auto run = weight.template load<Weights::kGroup>(row, products.column(j));
#pragma unroll
        for (int e = 0; e < Weights::kGroup; ++e) {
          sum += up(run.x[e]) * products.x[i][j + e];
        }
      }
#pragma unroll
      for (int bit = 1; bit < Weights::kRowLanes; bit *= 2) {
        sum += __shfl_xor_sync(~0u, sum, bit);
      }
      Real* const to = partial + threadIdx.x / 32 % Weights::kColumnWarps * kTile + row;
      store_shared(to, sum, threadIdx.x % Weights::kRowLanes == 0);
    }
  }

  // f(i, column, Run of numbers that are moved at once) for the numbers of a tile that a thread has, those of x.row(i)
  template <class F>
  static __device__ __forceinline__ void each_run(Weights& x, const F& f) {
    constexpr int kCount = 16 / sizeof(Real) < Weights::kGroup ? 16 / sizeof(Real) : Weights::kGroup;
#pragma unroll
    for (int i = 0; i < Weights::kRows; ++i) {
#pragma unroll
      for (int j = 0; j < Weights::kColumns; j += kCount) {
        f(i, x.column(j), *reinterpret_cast<Run<Real, kCount>*>(&x.x[i][j]));
      }
    }
  }

  // grad_query and grad_key from the gradient of the energies. The slices are there if there is only one.
  static __device__ __forceinline__ void query_key_gradients(const WeightTile& grad_energy, const Slice& queries,
                                                             const Slice& keys, const Rows<const T>& query,
                                                             const Rows<const T>& key, const Target<T>& grad_query,
                                                             const Target<T>& grad_key, const Corner& corner,
                                                             bool there) {
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
      write_rows(sums, grad_query, corner.first_query, c, one, one);
      clear(sums);
      multiply<true, false>(sums, grad_energy, queries, round_up(corner.queries(), 16));
      write_rows(sums, grad_key, corner.first_key, c, one, one);
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
    tiled_attention_kernel(const Line line, const typename Work::In query, const typename Work::In key,
                           const typename Work::In value, const typename Work::Element* residual,
                           const typename Work::Real* gamma, const typename Work::Out out,
                           const PathSum<const typename Work::Real> path_before,
                           const PathSum<typename Work::Real> path) {
  using Real = typename Work::Real;
  constexpr int kTile = Work::kSide;
  SharedCarver carver;
  const typename Work::WeightTile weight(carver);
  const typename Work::Slice first(carver), second(carver);
  const typename Work::RowNumbers numbers(carver);
  const int tiles = (line.length + kTile - 1) / kTile;
  const int64_t pixel = first_pixel(line, blockIdx.x / tiles);
  const int first_query = blockIdx.x % tiles * kTile;
  const auto q = query.rows(line, pixel), k = key.rows(line, pixel), v = value.rows(line, pixel);
  numbers.begin(path_before, {line, first_query, 0}, pixel);
  for (int first_key = 0; first_key < line.length; first_key += kTile) {
    const typename Work::Corner corner{line, unknown(first_query), unknown(first_key)};
    const bool last = line.last_axis && first_key + kTile >= line.length, scaled = last && residual != nullptr;
    typename Work::Weights energy;
    Work::energies(energy, first, second, q, k, corner);
    __syncthreads();
    if (v.channels > 0) {
      first.template fetch<Work::kThreads>(v, first_key, 0);
    }
    Work::softmax(energy, numbers, corner, last);
    Work::store(energy, weight);
    const Real factor = scaled ? load_global(gamma, true) : 1;
    Work::weigh_values(
        weight, first, second, v,
        {out.rows(line, pixel), !line.first_axis || first_key > 0, scaled ? residual + pixel * v.channels : nullptr},
        corner, [&](int) { return factor; }, [&](int row) { return factor * load_shared(numbers.keep + row); });
  }
  __syncthreads();
  numbers.end(path, {line, first_query, 0}, pixel);
}

template <class Work>
__device__ __forceinline__ void weights_of(typename Work::Weights& weight, const typename Work::Slice& queries,
                                           const typename Work::Slice& keys, const Rows<const typename Work::Element>& q,
                                           const Rows<const typename Work::Element>& k,
                                           const PathSum<const typename Work::Real>& path,
                                           const typename Work::Corner& corner, int64_t pixel) {
  Work::energies(weight, queries, keys, q, k, corner);
  Work::weights_again(weight, path, corner, pixel);
}

// grad_value, dP and delta, a block for a line
template <class Work>
__global__ void __launch_bounds__(Work::kThreads, 2)
    tiled_value_gradient_kernel(const Line line, const typename Work::In query, const typename Work::In key,
                                const typename Work::In value, const typename Work::In grad_out,
                                const PathSum<const typename Work::Real> path, const typename Work::Real* gamma,
                                const AxisScratch<typename Work::Real> scratch, const typename Work::Out grad_value) {
  using Real = typename Work::Real;
  constexpr int kTile = Work::kSide;
  SharedCarver carver;
  const typename Work::WeightTile weight(carver);
  const typename Work::Slice first(carver), second(carver);
  Real* const partial = carver.take<Real>(Work::Weights::kColumnWarps * kTile);
  const int64_t pixel = first_pixel(line, blockIdx.x);
  const Real factor = gamma == nullptr ? 1 : load_global(gamma, true);
  for (int first_key = 0; first_key < line.length; first_key += kTile) {
    for (int first_query = 0; first_query < line.length; first_query += kTile) {
      const auto corner = [&] { return typename Work::Corner{line, unknown(first_query), unknown(first_key)}; };
      typename Work::Weights x;  // weights, then dP
      weights_of<Work>(x, first, second, query.rows(line, pixel), key.rows(line, pixel), path, corner(), pixel);
      Work::store(x, weight);
      Work::value_gradients(x, weight, first, second, grad_out.rows(line, pixel), value.rows(line, pixel),
                            {grad_value.rows(line, pixel), !line.first_axis || first_query > 0}, corner(), factor);
      Real* const products = scratch.products + Work::products_at(line, blockIdx.x, first_key, first_query);
      Work::each_run(x, [&](int i, int column, auto& run) {
        using Numbers = std::remove_reference_t<decltype(run)>;
        store_global(reinterpret_cast<Numbers*>(products + x.row(i) * kTile + column), run, true);
      });
      Work::sum_keys(x, weight, partial);
      __syncthreads();
      const int row = threadIdx.x % kTile;
      const bool valid = threadIdx.x < kTile && first_query + row < line.length;
      Real* const to = scratch.parts + pixel + (valid ? (first_query + row) * line.step : 0);
      Real sum = load_global(to, valid && first_key > 0);
#pragma unroll
      for (int warp = 0; warp < Work::Weights::kColumnWarps; ++warp) {
        sum += load_shared(partial + warp * kTile + row);
      }
      store_global(to, sum, valid);
    }
  }
}

// grad_query and grad_key from dP and delta, a block for a line
template <class Work>
__global__ void __launch_bounds__(Work::kThreads, 2)
    tiled_query_key_gradient_kernel(const Line line, const typename Work::In query, const typename Work::In key,
                                    const PathSum<const typename Work::Real> path, const typename Work::Real* gamma,
                                    const AxisScratch<typename Work::Real> scratch, typename Work::Real* delta,
                                    const typename Work::Out grad_query, const typename Work::Out grad_key) {
  using Real = typename Work::Real;
  constexpr int kTile = Work::kSide;
  SharedCarver carver;
  const typename Work::WeightTile grad_energy(carver);
  const typename Work::Slice queries(carver), keys(carver);
  const int64_t pixel = first_pixel(line, blockIdx.x);
  const Real factor = gamma == nullptr ? 1 : load_global(gamma, true);
  for (int first_key = 0; first_key < line.length; first_key += kTile) {
    for (int first_query = 0; first_query < line.length; first_query += kTile) {
      const auto corner = [&] { return typename Work::Corner{line, unknown(first_query), unknown(first_key)}; };
      typename Work::Weights x;  // weights, then gradients of energies
      weights_of<Work>(x, queries, keys, query.rows(line, pixel), key.rows(line, pixel), path, corner(), pixel);
      const Real* const products = scratch.products + Work::products_at(line, blockIdx.x, first_key, first_query);
      Real sums[Work::Weights::kRows];
#pragma unroll
      for (int i = 0; i < Work::Weights::kRows; ++i) {
        const bool valid = first_query + x.row(i) < line.length;
        const int64_t u = pixel + (valid ? (first_query + x.row(i)) * line.step : 0);
        sums[i] = scratch.sum_of_parts(u, valid);
        store_global(delta + u, sums[i], valid && line.first_axis && first_key == 0 && x.column(0) == 0);
      }
      Work::each_run(x, [&](int i, int column, auto& run) {
        using Numbers = std::remove_reference_t<decltype(run)>;
        const auto grad = load_global(reinterpret_cast<const Numbers*>(products + x.row(i) * kTile + column), true);
#pragma unroll
        for (int e = 0; e < static_cast<int>(sizeof(run.x) / sizeof(Real)); ++e) {
          run.x[e] *= factor * (grad.x[e] - sums[i]);
        }
      });
      Work::store(x, grad_energy);
      Work::query_key_gradients(grad_energy, queries, keys, query.rows(line, pixel), key.rows(line, pixel),
                                {grad_query.rows(line, pixel), !line.first_axis || first_key > 0},
                                {grad_key.rows(line, pixel), !line.first_axis || first_query > 0}, corner(), true);
      __syncthreads();
    }
  }
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
                                {grad_query.rows(line, pixel), !line.first_axis || first_key > 0},
                                {grad_key.rows(line, pixel), !line.first_axis || first_query > 0}, corner, false);
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
    Work::weigh_values(weight, first, second, v, {out.rows(line, pixel), !line.first_axis || first_key > 0}, corner,
                       Work::one, Work::one);
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
                            {grad_value.rows(line, pixel), !line.first_axis || first_query > 0}, corner, 1);
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
