// Activated batch norm, declared in abn_launchers.h: the kernels, and what launches them. All are bound by memory.
#pragma once

#include <cmath>

#include "libs/csrc/cuda/abn_launchers.h"
#include "libs/csrc/cuda/abn_sums.cuh"
#include "libs/csrc/cuda/scalar_types.cuh"

namespace ccnet {

#ifndef __CUDACC__
using std::expm1;
using std::log1p;
#endif
#include "libs/csrc/activation_functions.h"

// ---- which elements a thread has ----

// The packs of a thread, as many steps for all threads of a block, some with nothing to do. In rows each step goes down
// the column; in planes it goes on in the plane, or in the next one of the channel.
struct Walk {
  int64_t offset, stride;             // of the next pack, and to the one after it
  int64_t place, place_step, places;  // of the pack in its plane, and how many there are; rows: always the first
  int64_t to_next_plane;              // added to the offset at the end of a plane
  int count;
  int64_t first_of_block;  // packs along the column before those of the block

  __device__ __forceinline__ explicit Walk(const Pieces& pieces) {
    const int64_t group = blockIdx.x % pieces.groups, part = blockIdx.x / pieces.groups;
    const int64_t packs = pieces.row_packs();
    const int lanes = kAbnThreads / pieces.columns;  // along the way
    const int column_of_block = thread_number() % pieces.columns, lane = thread_number() / pieces.columns;
    first_of_block = part * pieces.along_block();
    const int64_t first = first_of_block + lane;
    int64_t left = pieces.along() - first;
    if (pieces.planes) {
      const int64_t of_image = pieces.channels * pieces.row_length;
      place = first % packs, place_step = lanes % packs, places = packs;
      offset = first / packs * of_image + group * pieces.row_length + place * pieces.pack;
      stride = lanes / packs * of_image + place_step * pieces.pack;
      to_next_plane = of_image - pieces.row_length;
    } else {
      const int64_t column = group * pieces.columns + column_of_block;
      place = place_step = to_next_plane = 0, places = 1;
      offset = first * pieces.row_length + column * pieces.pack;
      stride = int64_t{lanes} * pieces.row_length;
      left = column < packs ? left : 0;
    }
    const int64_t steps = (left + lanes - 1) / lanes;
    count = steps < 0 ? 0 : steps < pieces.steps ? static_cast<int>(steps) : pieces.steps;
  }
  __device__ __forceinline__ void go_on() {
    offset += stride;
    place += place_step;
    if (place >= places) {
      place -= places;
      offset += to_next_plane;
    }
  }
};

// kCount steps of a walk, whose packs are asked for before any of them is used: z may be x.
template <int kCount>
struct Steps {
  int64_t offset[kCount];
  bool valid[kCount];
  __device__ __forceinline__ Steps(Walk& walk, int step) {
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      valid[k] = step + k < walk.count;
      offset[k] = valid[k] ? walk.offset : 0;
      walk.go_on();
    }
  }
  // Zeros of a tensor that is not there
  template <int kPack, class T>
  __device__ __forceinline__ void load(Run<T, kPack> (&runs)[kCount], const T* p) const {
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      const bool there = p != nullptr && valid[k];
      runs[k] = load_global(reinterpret_cast<const Run<T, kPack>*>(p + (there ? offset[k] : 0)), there);
    }
  }
  template <int kPack, class T>
  __device__ __forceinline__ void store(T* p, int k, const Run<T, kPack>& run) const {
    const bool there = p != nullptr && valid[k];
    store_global(reinterpret_cast<Run<T, kPack>*>(p + (there ? offset[k] : 0)), run, there);
  }
};

// ---- the numbers of a block's channels ----

// What the threads of a block's channels have, as the threads of packs want it: each number of a channel for the channels
// of the pack. Through shared memory.
template <class Real, int kPack, int kNumbers>
__device__ __forceinline__ void share(SharedCarver& carver, const Pieces& pieces, const Real (&of_channel)[kNumbers],
                                      Run<Real, kPack> (&of_pack)[kNumbers]) {
  Real* const data = carver.take<Real>(kNumbers * kMostBlockChannels);
  const bool writes = thread_number() < pieces.block_channels();
  const int first = pieces.planes ? 0 : thread_number() % pieces.columns * pieces.pack, step = pieces.planes ? 0 : 1;
#pragma unroll
  for (int n = 0; n < kNumbers; ++n) {
    store_shared(data + n * kMostBlockChannels + (writes ? thread_number() : 0), of_channel[n], writes);
  }
  __syncthreads();
#pragma unroll
  for (int n = 0; n < kNumbers; ++n) {
#pragma unroll
    for (int e = 0; e < kPack; ++e) {
      of_pack[n].x[e] = load_shared(data + n * kMostBlockChannels + first + e * step);
    }
  }
}

// ---- the kernels ----

constexpr int kSumsAtOnce = 4, kProductsAtOnce = 1, kElementsAtOnce = 2;  // packs of a tensor
constexpr int kChain = 64;  // numbers that are added up one after the other, before their sum is

// Deviations are taken from the mean of some first elements of the block, so that their squares do not drown what is
// small beside it. One of these can be far off, but then it makes the variance as large.
template <class T, int kPack>
__device__ __forceinline__ void first_means(const Pieces& pieces, const Walk& walk, const T* x,
                                            Accumulate<T> (&near)[kPack]) {
  constexpr int some = 8;
  const int64_t group = blockIdx.x % pieces.groups;
  const int64_t packs = pieces.row_packs(), first = walk.first_of_block;
  const int64_t column = pieces.planes ? 0 : group * pieces.columns + thread_number() % pieces.columns;
  const int64_t place = pieces.planes ? first % packs : 0;
  const int64_t left = pieces.planes ? packs - place : column < packs ? pieces.along() - first : 0;
  const int64_t offset = pieces.planes
                             ? (first / packs * pieces.channels + group) * pieces.row_length + place * kPack
                             : first * pieces.row_length + column * kPack;
  const int64_t stride = pieces.planes ? kPack : pieces.row_length;
  Run<T, kPack> runs[some];
#pragma unroll
  for (int k = 0; k < some; ++k) {
    const bool valid = k < left;
    runs[k] = load_global(reinterpret_cast<const Run<T, kPack>*>(x + (valid ? offset + k * stride : 0)), valid);
  }
  const Accumulate<T> share = Accumulate<T>{1} / (left < 1 ? 1 : left < some ? static_cast<int>(left) : some);
  Accumulate<T> mean = 0;  // of a plane's: of all its elements
#pragma unroll
  for (int e = 0; e < kPack; ++e) {
    Accumulate<T> sum = 0;
#pragma unroll
    for (int k = 0; k < some; ++k) {
      sum += up(runs[k].x[e]);
    }
    near[e] = sum * share;
    mean += near[e] / kPack;
  }
#pragma unroll
  for (int e = 0; e < kPack; ++e) {
    near[e] = pieces.planes ? mean : near[e];
  }
}

template <class T, int kPack>
__global__ void __launch_bounds__(kAbnThreads, 2)
    abn_moments_kernel(const Pieces pieces, const T* x, Accumulate<T>* partial) {
  using Real = Accumulate<T>;
  SharedCarver carver;
  Walk walk(pieces);
  Real near[kPack];
  first_means<T, kPack>(pieces, walk, x, near);
  const ThreadSums<Real, 2 * kPack> sums(carver, pieces.columns);  // of deviations, and of their squares
  for (int begin = 0; begin < pieces.steps; begin += kChain) {
    const int end = begin + kChain < pieces.steps ? begin + kChain : pieces.steps;
    Real chain[2 * kPack] = {};
    for (int step = begin; step < end; step += kSumsAtOnce) {
      const Steps<kSumsAtOnce> steps(walk, step);
      Run<T, kPack> runs[kSumsAtOnce];
      steps.load(runs, x);
#pragma unroll
      for (int k = 0; k < kSumsAtOnce; ++k) {
#pragma unroll
        for (int e = 0; e < kPack; ++e) {
          const Real deviation = steps.valid[k] ? up(runs[k].x[e]) - near[e] : 0;
          chain[e] += deviation;
          chain[kPack + e] += deviation * deviation;
        }
      }
    }
    sums.add(chain);
  }
  sums.finish();
  write_partial<3, kPack>(pieces, sums, 1, partial);
  const int64_t channel = first_channel(pieces, thread_number() % pieces.columns);
#pragma unroll
  for (int e = 0; e < kPack; ++e) {
    const bool writes = thread_number() < pieces.columns && channel < pieces.channels && (e == 0 || !pieces.planes);
    const int64_t place = blockIdx.x / pieces.groups * 3 * pieces.channels + channel + e;
    store_global(partial + (writes ? place : 0), near[e], writes);
  }
}

// y = (x - shift) * scale + offset
template <class T, int kPack, class Activate>
__global__ void __launch_bounds__(kAbnThreads, 2)
    abn_forward_kernel(const Pieces pieces, const T* x, const T* residual, const ChannelSources<Accumulate<T>> sources,
                       const Activate activate, T* z) {
  using Real = Accumulate<T>;
  SharedCarver carver;
  const Channel<Real> channel = channel_of(sources, pieces);
  Run<Real, kPack> of_pack[3];
  share(carver, pieces, {channel.mean, channel.scale(), channel.offset()}, of_pack);
  const auto &shift = of_pack[0], &scale = of_pack[1], &offset = of_pack[2];
  Walk walk(pieces);
  for (int step = 0; step < pieces.steps; step += kElementsAtOnce) {
    const Steps<kElementsAtOnce> steps(walk, step);
    Run<T, kPack> runs[kElementsAtOnce], rest[kElementsAtOnce];
    steps.load(runs, x);
    steps.load(rest, residual);
#pragma unroll
    for (int k = 0; k < kElementsAtOnce; ++k) {
#pragma unroll
      for (int e = 0; e < kPack; ++e) {
        const Real y = (up(runs[k].x[e]) - shift.x[e]) * scale.x[e] + offset.x[e];
        runs[k].x[e] = down<T>(activate(y + up(rest[k].x[e])));
      }
      steps.store(z, k, runs[k]);
    }
  }
}

// dy and the deviation of an element: see channel.h, and KeptData for first and second
template <class Real>
struct ElementGradient {
  Real grad_y, deviation;
  template <class Activate>
  __device__ __forceinline__ ElementGradient(const Activate& activate, Real first, Real second, bool has_second,
                                             Real grad_z, Real shift, Real scale, Real offset) {
    if constexpr (std::is_same_v<Activate, Relu<Real>>) {
      deviation = first - shift;
      const Real y = deviation * scale + offset;  // as the forward pass computes it
      grad_y = activate.gradient(has_second ? second : y, grad_z);
    } else {
      deviation = activate.inverse(first) - second - shift;
      grad_y = activate.gradient(first, grad_z);
    }
  }
};

template <class Activate, class Real>
constexpr bool kKeepsX = std::is_same_v<Activate, Relu<Real>>;

template <class T, int kPack, class Activate>
__global__ void __launch_bounds__(kAbnThreads, 2)
    abn_backward_sums_kernel(const Pieces pieces, const KeptData<T> kept, const ChannelSources<Accumulate<T>> sources,
                             const Activate activate, Accumulate<T>* partial) {
  using Real = Accumulate<T>;
  SharedCarver carver;
  const Channel<Real> channel = channel_of(sources, pieces);
  Run<Real, kPack> of_pack[3];
  share(carver, pieces, {channel.shift(kKeepsX<Activate, Real>), channel.scale(), channel.offset()}, of_pack);
  const auto &shift = of_pack[0], &scale = of_pack[1], &offset = of_pack[2];
  Walk walk(pieces);
  const ThreadSums<Real, 2 * kPack> sums(carver, pieces.columns);
  for (int begin = 0; begin < pieces.steps; begin += kChain) {
    const int end = begin + kChain < pieces.steps ? begin + kChain : pieces.steps;
    Real chain[2 * kPack] = {};
    for (int step = begin; step < end; step += kProductsAtOnce) {
      const Steps<kProductsAtOnce> steps(walk, step);
      Run<T, kPack> firsts[kProductsAtOnce], seconds[kProductsAtOnce], grads[kProductsAtOnce];
      steps.load(firsts, kept.first);
      steps.load(grads, kept.grad_z);
      steps.load(seconds, kept.second);
#pragma unroll
      for (int k = 0; k < kProductsAtOnce; ++k) {
#pragma unroll
        for (int e = 0; e < kPack; ++e) {
          const ElementGradient<Real> element(activate, up(firsts[k].x[e]), up(seconds[k].x[e]), kept.second != nullptr,
                                              up(grads[k].x[e]), shift.x[e], scale.x[e], offset.x[e]);
          chain[e] += element.grad_y;  // 0 where there is no element
          chain[kPack + e] += element.grad_y * element.deviation;
        }
      }
    }
    sums.add(chain);
  }
  sums.finish();
  write_partial<2, kPack>(pieces, sums, 0, partial);
}

// dx = dy * scale + deviation * of_deviation + constant; and the gradients of the parameters
template <class T, int kPack, class Activate>
__global__ void __launch_bounds__(kAbnThreads, 2)
    abn_backward_kernel(const Pieces pieces, const KeptData<T> kept, const ChannelSources<Accumulate<T>> sources,
                        const Activate activate, const GradientSums<Accumulate<T>> sums, T* grad_x, T* grad_residual,
                        Accumulate<T>* grad_weight, Accumulate<T>* grad_bias) {
  using Real = Accumulate<T>;
  constexpr bool keeps_x = kKeepsX<Activate, Real>;
  SharedCarver carver;
  const int64_t group_channel = first_channel(pieces, 0);
  const TotalSums<Real> total(carver, sums, group_channel, pieces.channels, pieces.block_channels());
  const Channel<Real> channel = channel_of(sources, pieces);
  const ChannelGradient<Real> gradient(channel, keeps_x, total.sum, total.deviation_sum);
  write_parameter_gradients(sources, gradient, total, group_channel + thread_number(), pieces.channels,
                            blockIdx.x < pieces.groups && thread_number() < pieces.block_channels(), grad_weight, grad_bias);
  Run<Real, kPack> of_pack[5];
  share(carver, pieces,
        {channel.shift(keeps_x), channel.scale(), channel.offset(), gradient.of_deviation, gradient.constant}, of_pack);
  const auto &shift = of_pack[0], &scale = of_pack[1], &offset = of_pack[2];
  const auto &of_deviation = of_pack[3], &constant = of_pack[4];
  Walk walk(pieces);
  for (int step = 0; step < pieces.steps; step += kElementsAtOnce) {
    const Steps<kElementsAtOnce> steps(walk, step);
    Run<T, kPack> firsts[kElementsAtOnce], seconds[kElementsAtOnce], grads[kElementsAtOnce];
    steps.load(firsts, kept.first);
    steps.load(grads, kept.grad_z);
    steps.load(seconds, kept.second);
#pragma unroll
    for (int k = 0; k < kElementsAtOnce; ++k) {
#pragma unroll
      for (int e = 0; e < kPack; ++e) {
        const ElementGradient<Real> element(activate, up(firsts[k].x[e]), up(seconds[k].x[e]), kept.second != nullptr,
                                            up(grads[k].x[e]), shift.x[e], scale.x[e], offset.x[e]);
        const Real grad = element.grad_y * scale.x[e] + (element.deviation * of_deviation.x[e] + constant.x[e]);
        grads[k].x[e] = down<T>(grad);
        seconds[k].x[e] = down<T>(element.grad_y);
      }
      steps.store(grad_x, k, grads[k]);
      steps.store(grad_residual, k, seconds[k]);
    }
  }
}

// ---- launching ----

template <class T>
constexpr Rounding kRounding = sizeof(T) == 8            ? Rounding{0x1p-52, 0}
                               : sizeof(T) == 4          ? Rounding{0x1p-23, 0}
                               : std::is_same_v<T, Half> ? Rounding{0x1p-10, 0x1p-25}
                                                         : Rounding{0x1p-7, 0x1p-134};

// f(constant of the pack's size)
template <class T, class F>
cudaError_t with_pack(const Pieces& pieces, const F& f) {
  constexpr int whole = 16 / sizeof(T);
  return pieces.pack == 1 ? f(std::integral_constant<int, 1>()) : f(std::integral_constant<int, whole>());
}

// f(the activation, constant of the pack's size)
template <class T, class F>
cudaError_t with_activation_and_pack(const ActivationOf& activation, const Pieces& pieces, const F& f) {
  return with_activation<Accumulate<T>>(activation, kRounding<T>, [&](auto activate) {
    return with_pack<T>(pieces, [&](auto pack) { return f(activate, pack); });
  });
}

template <class Real>
constexpr int array_bytes(int arrays) {
  return arrays * kMostBlockChannels * static_cast<int>(sizeof(Real));
}

template <class T, class Real>
cudaError_t AbnLaunchers<T, Real>::moments(const Pieces& pieces, const T* x, Real* partial, cudaStream_t stream) {
  if (pieces.blocks() == 0) {
    return cudaSuccess;
  }
  return with_pack<T>(pieces, [&](auto pack) {
    return launch(abn_moments_kernel<T, pack>, pieces.blocks(), kAbnThreads, ThreadSums<Real, 2 * pack>::kBytes, stream,
                  pieces, x, partial);
  });
}

template <class T, class Real>
cudaError_t AbnLaunchers<T, Real>::forward(const Pieces& pieces, const T* x, const ChannelSources<Real>& sources,
                                           const ActivationOf& activation, const T* residual, T* z,
                                           cudaStream_t stream) {
  if (pieces.blocks() == 0) {
    return cudaSuccess;
  }
  return with_activation_and_pack<T>(activation, pieces, [&](auto activate, auto pack) {
    return launch(abn_forward_kernel<T, pack, decltype(activate)>, pieces.blocks(), kAbnThreads, array_bytes<Real>(3),
                  stream, pieces, x, residual, sources, activate, z);
  });
}

template <class T, class Real>
cudaError_t AbnLaunchers<T, Real>::backward_sums(const Pieces& pieces, const KeptData<T>& kept,
                                                 const ChannelSources<Real>& sources, const ActivationOf& activation,
                                                 Real* partial, cudaStream_t stream) {
  if (pieces.blocks() == 0) {
    return cudaSuccess;
  }
  return with_activation_and_pack<T>(activation, pieces, [&](auto activate, auto pack) {
    return launch(abn_backward_sums_kernel<T, pack, decltype(activate)>, pieces.blocks(), kAbnThreads,
                  array_bytes<Real>(3) + ThreadSums<Real, 2 * pack>::kBytes, stream, pieces, kept, sources, activate,
                  partial);
  });
}

template <class T, class Real>
cudaError_t AbnLaunchers<T, Real>::backward(const Pieces& pieces, const KeptData<T>& kept,
                                            const ChannelSources<Real>& sources, const ActivationOf& activation,
                                            const GradientSums<Real>& sums, T* grad_x, T* grad_residual,
                                            Real* grad_weight, Real* grad_bias, cudaStream_t stream) {
  if (pieces.blocks() == 0) {
    return cudaSuccess;
  }
  return with_activation_and_pack<T>(activation, pieces, [&](auto activate, auto pack) {
    return launch(abn_backward_kernel<T, pack, decltype(activate)>, pieces.blocks(), kAbnThreads,
                  array_bytes<Real>(5) + ThreadSums<Real, 2>::kBytes, stream, pieces, kept, sources, activate, sums,
                  grad_x, grad_residual, grad_weight, grad_bias);
  });
}

}  // namespace ccnet
