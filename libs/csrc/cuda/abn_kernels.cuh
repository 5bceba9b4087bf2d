// Activated batch norm, declared in abn_launchers.h: the kernels, and what launches them. All are bound by memory.
#pragma once

#include <cmath>

#include "libs/csrc/cuda/abn_launchers.h"
#include "libs/csrc/cuda/scalar_types.cuh"

namespace ccnet {

#ifndef __CUDACC__
using std::expm1;
using std::log1p;
#endif
#include "libs/csrc/activation_functions.h"

constexpr int kAbnThreads = 256;

// ---- which elements a thread has ----

// Packs at base, base + stride, ..., count of them; threads of a block take as many steps, some with nothing to do.
struct Walk {
  int64_t base, stride, channel, slot;
  int count;
  int channel_step;       // from one element of a pack to the next
  bool first_of_channel;  // of the block's threads, for the channels of its pack: it is left with their sums

  __device__ __forceinline__ explicit Walk(const Pieces& pieces) {
    const int thread = threadIdx.x;
    const int64_t group = blockIdx.x % pieces.groups, part = blockIdx.x / pieces.groups;
    const int64_t packs = pieces.row_length / pieces.pack;
    const int lanes = kAbnThreads / pieces.columns;  // along the way
    const int64_t first = part * pieces.steps * lanes + thread / pieces.columns;
    int64_t left;
    if (pieces.planes) {
      left = packs - first;
      base = group * pieces.row_length + first * pieces.pack;
      stride = int64_t{lanes} * pieces.pack;
      channel = group % pieces.channels;
      slot = group / pieces.channels * pieces.parts + part;
      channel_step = 0;
      first_of_channel = thread == 0;
    } else {
      const int64_t column = group * pieces.columns + thread % pieces.columns;
      left = column < packs ? pieces.rows - first : 0;
      base = first * pieces.row_length + column * pieces.pack;
      stride = int64_t{lanes} * pieces.row_length;
      channel = column < packs ? column * pieces.pack : 0;
      slot = part;
      channel_step = 1;
      first_of_channel = thread < pieces.columns && column < packs;
    }
    const int64_t steps = (left + lanes - 1) / lanes;
    count = steps < 0 ? 0 : steps < pieces.steps ? static_cast<int>(steps) : pieces.steps;
  }
  __device__ __forceinline__ int64_t at(int step) const { return step < count ? base + step * stride : 0; }
};

// Zeros of a tensor that is not there
template <int kPack, class T>
__device__ __forceinline__ Run<T, kPack> load_pack(const T* p, const Walk& walk, int step) {
  const bool there = p != nullptr && step < walk.count;
  return load_global(reinterpret_cast<const Run<T, kPack>*>(p + (there ? walk.at(step) : 0)), there);
}

// A number of each channel of a pack, or 0 where there are none
template <int kPack, class Real>
__device__ __forceinline__ Run<Real, kPack> load_numbers(const Real* numbers, const Walk& walk) {
  Run<Real, kPack> run;
#pragma unroll
  for (int e = 0; e < kPack; ++e) {
    const bool there = numbers != nullptr;
    run.x[e] = load_global(numbers + (there ? walk.channel + e * walk.channel_step : 0), there);
  }
  return run;
}

// ---- sums over channels ----

// Of some elements: how many, their mean, and the sum of squared deviations from it
struct Moments {
  static constexpr int kWords = 3;
  double words[kWords];
  __device__ __forceinline__ void take_in(const Moments& other) {  // Chan, Golub and LeVeque, 1979
    const double count = words[0] + other.words[0];
    if (other.words[0] > 0) {
      const double apart = other.words[1] - words[1], part = other.words[0] / count;
      words[1] += apart * part;
      words[2] += other.words[2] + apart * apart * words[0] * part;
      words[0] = count;
    }
  }
  __device__ __forceinline__ void divide(double) {}
};

// Of dy and of dy * (y - bias); divided by |weight| + eps the second is that of dy * xhat.
struct GradientSums {
  static constexpr int kWords = 2;
  double words[kWords];
  __device__ __forceinline__ void take_in(const GradientSums& other) {
    words[0] += other.words[0];
    words[1] += other.words[1];
  }
  __device__ __forceinline__ void divide(double gain) { words[1] /= gain; }
};

// The sums of the block's threads for each channel, left with the first thread of the channel and written to
// partial [slots, kWords, C].
template <int kPack, class Sums>
__device__ __forceinline__ void reduce(Sums (&sums)[kPack], const Pieces& pieces, const Walk& walk, double* partial) {
  SharedCarver carver;
  double* const shared = carver.take<double>(kPack * Sums::kWords * kAbnThreads);
  const int thread = threadIdx.x;
  const auto place = [&](int e, int word, int of) { return shared + (e * Sums::kWords + word) * kAbnThreads + of; };
#pragma unroll
  for (int e = 0; e < kPack; ++e) {
#pragma unroll
    for (int word = 0; word < Sums::kWords; ++word) {
      store_shared(place(e, word, thread), sums[e].words[word]);
    }
  }
  __syncthreads();
  for (int half = kAbnThreads / 2; half >= pieces.columns; half /= 2) {
    const bool takes = thread < half;
    const int other_thread = takes ? thread + half : thread;
#pragma unroll
    for (int e = 0; e < kPack; ++e) {
      Sums other;
#pragma unroll
      for (int word = 0; word < Sums::kWords; ++word) {
        other.words[word] = load_shared(place(e, word, other_thread));
      }
      if (takes) {
        sums[e].take_in(other);
      }
#pragma unroll
      for (int word = 0; word < Sums::kWords; ++word) {
        store_shared(place(e, word, thread), sums[e].words[word], takes);
      }
    }
    __syncthreads();
  }
#pragma unroll
  for (int e = 1; e < kPack; ++e) {
    if (pieces.planes) {
      sums[0].take_in(sums[e]);
    }
  }
#pragma unroll
  for (int e = 0; e < kPack; ++e) {
    const bool writes = walk.first_of_channel && (e == 0 || !pieces.planes);
    double* const to = partial + walk.slot * Sums::kWords * pieces.channels + walk.channel + e * walk.channel_step;
#pragma unroll
    for (int word = 0; word < Sums::kWords; ++word) {
      store_global(to + word * pieces.channels, sums[e].words[word], writes);
    }
  }
}

// sums [kWords, C] of partial [slots, kWords, C]; a warp for a channel
template <class Sums, class Real>
__global__ void __launch_bounds__(kAbnThreads) abn_total_kernel(const double* partial, int64_t slots, int64_t channels,
                                                                const Real* weight, double eps, double* sums) {
  const int64_t number = blockIdx.x * int64_t{kAbnThreads / 32} + threadIdx.x / 32;
  const int64_t channel = number < channels ? number : 0;
  const int lane = threadIdx.x % 32;
  Sums total = {};
  for (int64_t first = 0; first < slots; first += 32) {
    const bool valid = first + lane < slots;
    Sums other;
#pragma unroll
    for (int word = 0; word < Sums::kWords; ++word) {
      const int64_t place = valid ? ((first + lane) * Sums::kWords + word) * channels + channel : 0;
      other.words[word] = load_global(partial + place, valid);
    }
    if (valid) {
      total.take_in(other);
    }
  }
#pragma unroll
  for (int bit = 16; bit > 0; bit /= 2) {
    Sums other;
#pragma unroll
    for (int word = 0; word < Sums::kWords; ++word) {
      other.words[word] = __shfl_xor_sync(~0u, total.words[word], bit);
    }
    total.take_in(other);
  }
  const Real of_weight = load_global(weight + (weight != nullptr ? channel : 0), weight != nullptr);
  total.divide(weight != nullptr ? fabs(static_cast<double>(of_weight)) + eps : 1);
#pragma unroll
  for (int word = 0; word < Sums::kWords; ++word) {
    store_global(sums + word * channels + channel, total.words[word], lane == 0 && number < channels);
  }
}

// Deviations are taken from a thread's first elements, so that their squares do not drown what is small beside them.
template <class T, int kPack>
__global__ void __launch_bounds__(kAbnThreads, 2)
    abn_statistics_kernel(const Pieces pieces, const T* x, double* partial) {
  using Real = Accumulate<T>;
  const Walk walk(pieces);
  Real near[kPack], sum[kPack], squares[kPack];
  const auto first = load_pack<kPack>(x, walk, 0);
#pragma unroll
  for (int e = 0; e < kPack; ++e) {
    near[e] = up(first.x[e]);
    sum[e] = squares[e] = 0;
  }
#pragma unroll 4
  for (int step = 1; step < pieces.steps; ++step) {
    const auto run = load_pack<kPack>(x, walk, step);
#pragma unroll
    for (int e = 0; e < kPack; ++e) {
      const Real deviation = step < walk.count ? up(run.x[e]) - near[e] : 0;
      sum[e] += deviation;
      squares[e] += deviation * deviation;
    }
  }
  Moments moments[kPack];
#pragma unroll
  for (int e = 0; e < kPack; ++e) {
    const double count = walk.count, mean = walk.count > 0 ? sum[e] / count : 0;
    const double rest = squares[e] - mean * sum[e];
    moments[e] = {{count, near[e] + mean, rest < 0 ? 0 : rest}};
  }
  reduce(moments, pieces, walk, partial);
}

template <class T, int kPack, class Activate>
__global__ void __launch_bounds__(kAbnThreads, 2)
    abn_backward_sums_kernel(const Pieces pieces, const T* z, const T* grad_z, const T* residual,
                             const Accumulate<T>* bias_numbers, const Activate activate, double* partial) {
  using Real = Accumulate<T>;
  const Walk walk(pieces);
  const auto bias = load_numbers<kPack>(bias_numbers, walk);
  Real sum[kPack] = {}, product_sum[kPack] = {};
#pragma unroll 2
  for (int step = 0; step < pieces.steps; ++step) {
    const auto out = load_pack<kPack>(z, walk, step), grad = load_pack<kPack>(grad_z, walk, step);
    const auto rest = load_pack<kPack>(residual, walk, step);
#pragma unroll
    for (int e = 0; e < kPack; ++e) {
      const Real grad_y = up(grad.x[e]) * activate.derivative(up(out.x[e]));
      const Real product = grad_y * (activate.inverse(up(out.x[e])) - up(rest.x[e]) - bias.x[e]);
      sum[e] += step < walk.count ? grad_y : 0;
      product_sum[e] += step < walk.count ? product : 0;
    }
  }
  GradientSums sums[kPack];
#pragma unroll
  for (int e = 0; e < kPack; ++e) {
    sums[e] = {{sum[e], product_sum[e]}};
  }
  reduce(sums, pieces, walk, partial);
}

// ---- what the elements are multiplied with and moved by: arrays of C numbers ----

struct ChannelStatistics {
  double count, mean, inverse_deviation, gain, bias;
};
template <class Real>
__device__ __forceinline__ ChannelStatistics of_channel(const double* statistics, const Real* weight, const Real* bias,
                                                        double eps, int64_t channel, int64_t channels, bool valid) {
  const double count = load_global(statistics + channel, valid);
  const double mean = load_global(statistics + channels + channel, valid);
  const double squares = load_global(statistics + 2 * channels + channel, valid);
  const bool has_weight = valid && weight != nullptr, has_bias = valid && bias != nullptr;
  const Real of_weight = load_global(weight + (has_weight ? channel : 0), has_weight);
  const Real of_bias = load_global(bias + (has_bias ? channel : 0), has_bias);
  return {count, mean, 1 / sqrt((count > 0 ? squares / count : 0) + eps),
          weight != nullptr ? fabs(static_cast<double>(of_weight)) + eps : 1, of_bias};
}

// y = (x - shift) * scale + offset. Taking off the mean first, rounded to shift, loses nothing where x is near it; what
// the rounding left out is in offset. numbers: [3, C]
template <class Real>
__global__ void __launch_bounds__(kAbnThreads, 2)
    abn_affine_numbers_kernel(const double* statistics, const Real* weight, const Real* bias, double eps,
                              int64_t channels, Real* numbers) {
  const int64_t number = blockIdx.x * int64_t{kAbnThreads} + threadIdx.x;
  const bool valid = number < channels;
  const int64_t channel = valid ? number : 0;
  const auto of = of_channel(statistics, weight, bias, eps, channel, channels, valid);
  const Real shift = static_cast<Real>(of.mean);
  const double scale = of.gain * of.inverse_deviation, offset = of.bias - (of.mean - shift) * scale;
  store_global(numbers + channel, shift, valid);
  store_global(numbers + channels + channel, static_cast<Real>(scale), valid);
  store_global(numbers + 2 * channels + channel, static_cast<Real>(offset), valid);
}

// dx = (dy - sum(dy) / n - xhat * sum(dy * xhat) / n) * gain * inverse deviation, xhat = (y - bias) / gain, as
// dy * of_grad + (y - bias) * of_deviation + constant. numbers: [4, C], these after bias
template <class Real>
__global__ void __launch_bounds__(kAbnThreads, 2)
    abn_gradient_numbers_kernel(const double* statistics, const double* sums, const Real* weight, const Real* bias,
                                double eps, int64_t channels, Real* numbers) {
  const int64_t number = blockIdx.x * int64_t{kAbnThreads} + threadIdx.x;
  const bool valid = number < channels, has_sums = valid && sums != nullptr;
  const int64_t channel = valid ? number : 0;
  const auto of = of_channel(statistics, weight, bias, eps, channel, channels, valid);
  const double sum = load_global(sums + (has_sums ? channel : 0), has_sums);
  const double product_sum = load_global(sums + (has_sums ? channels + channel : 0), has_sums);
  const double scale = of.gain * of.inverse_deviation, share = of.count > 0 ? 1 / of.count : 0;
  store_global(numbers + channel, static_cast<Real>(of.bias), valid);
  store_global(numbers + channels + channel, static_cast<Real>(scale), valid);
  store_global(numbers + 2 * channels + channel, static_cast<Real>(-of.inverse_deviation * product_sum * share), valid);
  store_global(numbers + 3 * channels + channel, static_cast<Real>(-scale * sum * share), valid);
}

template <class Real>
__global__ void __launch_bounds__(kAbnThreads, 2)
    abn_update_running_kernel(const double* statistics, double momentum, int64_t channels, Real* running_mean,
                              Real* running_var) {
  const int64_t number = blockIdx.x * int64_t{kAbnThreads} + threadIdx.x;
  const bool valid = number < channels;
  const int64_t channel = valid ? number : 0;
  const double count = load_global(statistics + channel, valid);
  const double mean = load_global(statistics + channels + channel, valid);
  const double squares = load_global(statistics + 2 * channels + channel, valid);
  const bool writes = valid && count > 0;
  const double before_mean = load_global(running_mean + channel, valid);
  const double before_var = load_global(running_var + channel, valid);
  const double var = squares / (count > 1 ? count - 1 : 1);
  store_global(running_mean + channel, static_cast<Real>(before_mean + momentum * (mean - before_mean)), writes);
  store_global(running_var + channel, static_cast<Real>(before_var + momentum * (var - before_var)), writes);
}

// ---- elements ----

constexpr int kAtOnce = 2;  // packs of a tensor that a thread asks for before it writes any: z may be x

template <class T, int kPack, class Activate>
__global__ void __launch_bounds__(kAbnThreads, 2)
    abn_forward_kernel(const Pieces pieces, const T* x, const T* residual, const Accumulate<T>* numbers,
                       const Activate activate, T* z) {
  using Real = Accumulate<T>;
  const Walk walk(pieces);
  const auto shift = load_numbers<kPack>(numbers, walk);
  const auto scale = load_numbers<kPack>(numbers + pieces.channels, walk);
  const auto offset = load_numbers<kPack>(numbers + 2 * pieces.channels, walk);
  for (int first = 0; first < pieces.steps; first += kAtOnce) {
    Run<T, kPack> runs[kAtOnce], rest[kAtOnce];
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      runs[k] = load_pack<kPack>(x, walk, first + k);
      rest[k] = load_pack<kPack>(residual, walk, first + k);
    }
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
#pragma unroll
      for (int e = 0; e < kPack; ++e) {
        const Real y = (up(runs[k].x[e]) - shift.x[e]) * scale.x[e] + offset.x[e];
        runs[k].x[e] = down<T>(activate(y + up(rest[k].x[e])));
      }
      store_global(reinterpret_cast<Run<T, kPack>*>(z + walk.at(first + k)), runs[k], first + k < walk.count);
    }
  }
}

template <class T, int kPack, class Activate>
__global__ void __launch_bounds__(kAbnThreads, 2)
    abn_backward_kernel(const Pieces pieces, const T* z, const T* grad_z, const T* residual,
                        const Accumulate<T>* numbers, const Activate activate, T* grad_x, T* grad_residual) {
  using Real = Accumulate<T>;
  const Walk walk(pieces);
  const auto bias = load_numbers<kPack>(numbers, walk);
  const auto of_grad = load_numbers<kPack>(numbers + pieces.channels, walk);
  const auto of_deviation = load_numbers<kPack>(numbers + 2 * pieces.channels, walk);
  const auto constant = load_numbers<kPack>(numbers + 3 * pieces.channels, walk);
  for (int first = 0; first < pieces.steps; first += kAtOnce) {
    Run<T, kPack> outs[kAtOnce], grads[kAtOnce], rest[kAtOnce];
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      outs[k] = load_pack<kPack>(z, walk, first + k);
      grads[k] = load_pack<kPack>(grad_z, walk, first + k);
      rest[k] = load_pack<kPack>(residual, walk, first + k);
    }
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
#pragma unroll
      for (int e = 0; e < kPack; ++e) {
        const Real out = up(outs[k].x[e]), grad_y = up(grads[k].x[e]) * activate.derivative(out);
        const Real deviation = activate.inverse(out) - up(rest[k].x[e]) - bias.x[e];
        grads[k].x[e] = down<T>(grad_y * of_grad.x[e] + (deviation * of_deviation.x[e] + constant.x[e]));
        rest[k].x[e] = down<T>(grad_y);
      }
      const bool valid = first + k < walk.count, has_residual = valid && grad_residual != nullptr;
      store_global(reinterpret_cast<Run<T, kPack>*>(grad_x + walk.at(first + k)), grads[k], valid);
      T* const to_residual = grad_residual + (has_residual ? walk.at(first + k) : 0);
      store_global(reinterpret_cast<Run<T, kPack>*>(to_residual), rest[k], has_residual);
    }
  }
}

// ---- launching ----

// From 1 to the next larger number of the type
template <class T>
constexpr double kEpsilon = sizeof(T) == 8            ? 0x1p-52
                            : sizeof(T) == 4          ? 0x1p-23
                            : std::is_same_v<T, Half> ? 0x1p-10
                                                      : 0x1p-7;

// f(constant of the pack's size)
template <class T, class F>
cudaError_t with_pack(const Pieces& pieces, const F& f) {
  constexpr int whole = 16 / sizeof(T);
  return pieces.pack == 1 ? f(std::integral_constant<int, 1>()) : f(std::integral_constant<int, whole>());
}

template <class... P, class... A>
cudaError_t launch_for_channels(void (*kernel)(P...), int64_t channels, int a_block, cudaStream_t stream,
                                const A&... arguments) {
  return launch(kernel, (channels + a_block - 1) / a_block, kAbnThreads, 0, stream, arguments...);
}

template <class T, class Real>
cudaError_t AbnLaunchers<T, Real>::statistics(const Pieces& pieces, const T* x, double* partial, double* statistics,
                                              cudaStream_t stream) {
  cudaError_t error = cudaSuccess;
  if (pieces.blocks() > 0) {
    error = with_pack<T>(pieces, [&](auto pack) {
      const int shared_bytes = pack * Moments::kWords * kAbnThreads * static_cast<int>(sizeof(double));
      return launch(abn_statistics_kernel<T, pack>, pieces.blocks(), kAbnThreads, shared_bytes, stream, pieces, x,
                    partial);
    });
  }
  return error != cudaSuccess
             ? error
             : launch_for_channels(abn_total_kernel<Moments, Real>, pieces.channels, kAbnThreads / 32, stream, partial,
                                   pieces.slots(), pieces.channels, static_cast<const Real*>(nullptr), 0.0, statistics);
}

template <class Real>
cudaError_t update_running_statistics(const double* statistics, double momentum, int64_t channels, Real* running_mean,
                                      Real* running_var, cudaStream_t stream) {
  return launch_for_channels(abn_update_running_kernel<Real>, channels, kAbnThreads, stream, statistics, momentum,
                             channels, running_mean, running_var);
}

template <class T, class Real>
cudaError_t AbnLaunchers<T, Real>::forward(const Pieces& pieces, const T* x, const double* statistics,
                                           const Affine& affine, const T* residual, Real* numbers, T* z,
                                           cudaStream_t stream) {
  if (pieces.blocks() == 0) {
    return cudaSuccess;
  }
  const cudaError_t error =
      launch_for_channels(abn_affine_numbers_kernel<Real>, pieces.channels, kAbnThreads, stream, statistics,
                          affine.weight, affine.bias, affine.eps, pieces.channels, numbers);
  if (error != cudaSuccess) {
    return error;
  }
  return with_activation<Real>(affine.activation, kEpsilon<T>, [&](auto activate) {
    return with_pack<T>(pieces, [&](auto pack) {
      return launch(abn_forward_kernel<T, pack, decltype(activate)>, pieces.blocks(), kAbnThreads, 0, stream, pieces, x,
                    residual, numbers, activate, z);
    });
  });
}

template <class T, class Real>
cudaError_t AbnLaunchers<T, Real>::backward_sums(const Pieces& pieces, const T* z, const T* grad_z,
                                                 const Affine& affine, const T* residual, double* partial, double* sums,
                                                 cudaStream_t stream) {
  cudaError_t error = cudaSuccess;
  if (pieces.blocks() > 0) {
    error = with_activation<Real>(affine.activation, kEpsilon<T>, [&](auto activate) {
      return with_pack<T>(pieces, [&](auto pack) {
        const int shared_bytes = pack * GradientSums::kWords * kAbnThreads * static_cast<int>(sizeof(double));
        return launch(abn_backward_sums_kernel<T, pack, decltype(activate)>, pieces.blocks(), kAbnThreads, shared_bytes,
                      stream, pieces, z, grad_z, residual, affine.bias, activate, partial);
      });
    });
  }
  return error != cudaSuccess
             ? error
             : launch_for_channels(abn_total_kernel<GradientSums, Real>, pieces.channels, kAbnThreads / 32, stream,
                                   partial, pieces.slots(), pieces.channels, affine.weight, affine.eps, sums);
}

template <class T, class Real>
cudaError_t AbnLaunchers<T, Real>::backward(const Pieces& pieces, const T* z, const T* grad_z, const double* statistics,
                                            const double* sums, const Affine& affine, const T* residual, Real* numbers,
                                            T* grad_x, T* grad_residual, cudaStream_t stream) {
  if (pieces.blocks() == 0) {
    return cudaSuccess;
  }
  const cudaError_t error =
      launch_for_channels(abn_gradient_numbers_kernel<Real>, pieces.channels, kAbnThreads, stream, statistics, sums,
                          affine.weight, affine.bias, affine.eps, pieces.channels, numbers);
  if (error != cudaSuccess) {
    return error;
  }
  return with_activation<Real>(affine.activation, kEpsilon<T>, [&](auto activate) {
    return with_pack<T>(pieces, [&](auto pack) {
      return launch(abn_backward_kernel<T, pack, decltype(activate)>, pieces.blocks(), kAbnThreads, 0, stream, pieces,
                    z, grad_z, residual, numbers, activate, grad_x, grad_residual);
    });
  });
}

}  // namespace ccnet
