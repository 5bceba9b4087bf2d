// Sums over the elements of each channel: among the threads of a block, and of what blocks left. Always in the same order.
#pragma once

#include <type_traits>

#include "libs/csrc/cuda/abn_launchers.h"

namespace ccnet {

#include "libs/csrc/channel.h"

__device__ __forceinline__ int thread_number() { return static_cast<int>(threadIdx.x); }

constexpr int kMostBlockChannels = 64;  // 8 columns of packs of 8

__device__ __forceinline__ int64_t first_channel(const Pieces& pieces, int column) {
  const int64_t group = blockIdx.x % pieces.groups;
  return pieces.planes ? group : (group * pieces.columns + column) * pieces.pack;
}

// The numbers of a channel, zeros where there is none
template <class Real>
__device__ __forceinline__ Channel<Real> channel_of(const ChannelSources<Real>& sources, int64_t channel,
                                                    int64_t channels, bool valid) {
  const auto load = [&](const Real* p, int64_t row) {
    const bool there = valid && p != nullptr;
    return load_global(p + (there ? row * channels + channel : 0), there);
  };
  const Real mean = load(sources.normaliser, 0), rest = load(sources.normaliser, 1);
  const Real inverse_deviation = load(sources.normaliser, 2), share = load(sources.normaliser, 3);
  const Real weight = load(sources.weight, 0), bias = load(sources.bias, 0);
  const Real gain = sources.weight == nullptr ? 1 : (weight < 0 ? -weight : weight) + sources.eps;
  return {mean, rest, inverse_deviation, share, gain, bias};
}
// The channel of the block that has the thread's number
template <class Real>
__device__ __forceinline__ Channel<Real> channel_of(const ChannelSources<Real>& sources, const Pieces& pieces) {
  const int64_t channel = first_channel(pieces, 0) + thread_number();
  return channel_of(sources, channel, pieces.channels,
                    thread_number() < pieces.block_channels() && channel < pieces.channels);
}

// Sums of kCount numbers, in shared memory: first each thread's own, then over those threads of the block that are a
// multiple of `width` apart, a power of two.
template <class Real, int kCount>
struct ThreadSums {
  static constexpr int kBytes = kCount * kAbnThreads * static_cast<int>(sizeof(Real));
  Real* data;
  int width;

  __device__ __forceinline__ ThreadSums(SharedCarver& carver, int width)
      : data(carver.take<Real>(kCount * kAbnThreads)), width(width) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      store_shared(own(i), Real{0});
    }
  }
  __device__ __forceinline__ Real* own(int i) const { return data + i * kAbnThreads + thread_number(); }
  __device__ __forceinline__ void add(const Real (&numbers)[kCount]) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      store_shared(own(i), load_shared(own(i)) + numbers[i]);
    }
  }
  // After the last add(): then any thread can ask for the sums.
  __device__ __forceinline__ void finish() const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      Real sum = load_shared(own(i));
      for (int bit = 16; bit >= width; bit /= 2) {
        sum += __shfl_xor_sync(~0u, sum, bit);
      }
      store_shared(own(i), sum);
    }
    __syncthreads();
  }
  // Number i of threads column, column + width, ...
  __device__ __forceinline__ Real at(int i, int column) const {
    const int apart = width < 32 ? 32 : width;
    Real sum = 0;
    for (int thread = column; thread < kAbnThreads; thread += apart) {
      sum += load_shared(data + i * kAbnThreads + thread);
    }
    return sum;
  }
};

// To partial [parts, kWords, C], from word `first_word` on, two words that the threads have for each element of a pack
template <int kWords, int kPack, class Real>
__device__ __forceinline__ void write_partial(const Pieces& pieces, const ThreadSums<Real, 2 * kPack>& totals,
                                              int first_word, Real* partial) {
  const int channels = pieces.block_channels();
  const int thread = thread_number(), word = thread / channels, channel_of_block = thread % channels;
  const bool has_word = word < 2;
  const int first = has_word ? word * kPack : 0;
  Real sum = 0;
  if (pieces.planes) {
#pragma unroll
    for (int e = 0; e < kPack; ++e) {
      sum += totals.at(first + e, 0);
    }
  } else {
    sum = totals.at(first + channel_of_block % kPack, channel_of_block / kPack);
  }
  const int64_t channel = first_channel(pieces, 0) + channel_of_block;
  const bool writes = has_word && channel < pieces.channels;
  const int64_t row = blockIdx.x / pieces.groups * kWords + first_word + word;
  store_global(partial + (writes ? row * pieces.channels + channel : 0), sum, writes);
}

// The totals of GradientSums for the thread's channel, `first` and on, of `width`; threads beyond have those of others.
template <class Real>
struct TotalSums {
  Real sum, deviation_sum;
  __device__ __forceinline__ TotalSums(SharedCarver& carver, const GradientSums<Real>& sums, int64_t first,
                                       int64_t channels, int width) {
    constexpr int at_once = 4;
    const int column = thread_number() % width, lanes = kAbnThreads / width, lane = thread_number() / width;
    const bool there = first + column < channels;
    Real totals[2] = {};
    for (int64_t part = 0; part < sums.parts; part += at_once * lanes) {
      Real numbers[2 * at_once];
#pragma unroll
      for (int k = 0; k < at_once; ++k) {
        const int64_t mine = part + k * lanes + lane;
        const bool valid = there && mine < sums.parts;
        const Real* const p = sums.data + (valid ? 2 * mine * channels + first + column : 0);
        numbers[2 * k] = load_global(p, valid);
        numbers[2 * k + 1] = load_global(p + (valid ? channels : 0), valid);
      }
#pragma unroll
      for (int k = 0; k < at_once; ++k) {
        totals[0] += numbers[2 * k];
        totals[1] += numbers[2 * k + 1];
      }
    }
    const ThreadSums<Real, 2> of_threads(carver, width);
    of_threads.add(totals);
    of_threads.finish();
    sum = of_threads.at(0, column);
    deviation_sum = of_threads.at(1, column);
  }
};

template <class Real>
__device__ __forceinline__ void write_parameter_gradients(const ChannelSources<Real>& sources,
                                                          const ChannelGradient<Real>& gradient,
                                                          const TotalSums<Real>& total, int64_t channel,
                                                          int64_t channels, bool is_mine, Real* grad_weight,
                                                          Real* grad_bias) {
  const bool writes = is_mine && channel < channels && grad_weight != nullptr;
  const bool has_weight = writes && sources.weight != nullptr;
  const Real weight = load_global(sources.weight + (has_weight ? channel : 0), has_weight);
  const Real sign = has_weight ? Real((weight > 0) - (weight < 0)) : 1;
  store_global(grad_weight + (writes ? channel : 0), gradient.of_weight * sign, writes);
  store_global(grad_bias + (writes ? channel : 0), total.sum, writes);
}

}  // namespace ccnet
