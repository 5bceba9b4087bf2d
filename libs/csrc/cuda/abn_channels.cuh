// The kernels of activated batch norm that compute a few numbers for each channel, and their launchers.
#pragma once

#include "libs/csrc/cuda/abn_sums.cuh"

namespace ccnet {

// A part of the elements of a channel: how many, their mean less that of the origin, and the sum of squared deviations
// from it
template <class Number>
struct Moments {
  Number count, mean, squares;
};

// Of the moments that blocks left. They are taken relative to a number that is near all means, so that Real will do:
// GPUs that are not for computing centres have few units for float64.
template <class Real>
struct PartsOfBlocks {
  using Number = Real;
  const Real* partial;
  int64_t parts;
  Real count, count_of_last, share, share_of_last;  // of elements in a part, and 1 / count
  double total;
  __device__ __forceinline__ double count_of(Real) const { return total; }
  __device__ __forceinline__ Real origin(int64_t channel, bool valid) const {
    const bool there = valid && parts > 0;
    return load_global(partial + (there ? channel : 0), there);
  }
  __device__ __forceinline__ Moments<Real> at(int64_t part, int64_t channel, int64_t channels, Real origin,
                                              bool valid) const {
    const Real* const p = partial + (valid ? part * 3 * channels + channel : 0);
    const Real near = load_global(p, valid);
    const Real sum = load_global(p + (valid ? channels : 0), valid);
    const Real squares = load_global(p + (valid ? 2 * channels : 0), valid);
    const bool is_last = part + 1 == parts;
    const Real apart = sum * (is_last ? share_of_last : share), rest = squares - sum * apart;
    return {!valid ? 0 : is_last ? count_of_last : count, near - origin + apart, rest < 0 ? 0 : rest};
  }
};

struct PartsOfProcesses {
  using Number = double;
  const double* statistics;
  int64_t parts;
  __device__ __forceinline__ double count_of(double sum) const { return sum; }
  __device__ __forceinline__ double origin(int64_t, bool) const { return 0; }
  __device__ __forceinline__ Moments<double> at(int64_t part, int64_t channel, int64_t channels, double,
                                                bool valid) const {
    const double* const p = statistics + (valid ? part * 3 * channels + channel : 0);
    const double count = load_global(p, valid);
    const double mean = load_global(p + (valid ? channels : 0), valid);
    return {count, mean, load_global(p + (valid ? 2 * channels : 0), valid)};
  }
};

template <class Real>
__device__ __forceinline__ void write_normaliser(double mean, double var, double share, double eps, int64_t channel,
                                                 int64_t channels, bool writes, Real* normaliser) {
  const Real rounded = static_cast<Real>(mean);
  const Real numbers[4] = {rounded, static_cast<Real>(mean - rounded), static_cast<Real>(1 / sqrt(var + eps)),
                           static_cast<Real>(share)};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    store_global(normaliser + (writes ? i * channels + channel : 0), numbers[i], writes);
  }
}

constexpr int kMergedChannels = 32;  // of a block; each warp has a part of the parts

// Merges the parts of each channel around their common mean, which is accurate even if theirs differ much. Writes the
// statistics, if there is where to; otherwise the normaliser, and the running statistics take them in.
template <class Real, class Parts>
__global__ void __launch_bounds__(kAbnThreads)
    abn_merge_kernel(const Parts parts, int64_t channels, double* statistics, const RunningStatistics<Real> running,
                     double eps, Real* normaliser) {
  SharedCarver carver;
  constexpr int warps = kAbnThreads / 32;
  const int warp = thread_number() / 32, column = thread_number() % 32;
  const int64_t number = blockIdx.x * int64_t{kMergedChannels} + column;
  const bool there = number < channels, writes = there && warp == 0;
  const int64_t channel = there ? number : 0;
  using Number = typename Parts::Number;
  const Number origin = parts.origin(channel, there);
  Number of_mean[2] = {}, of_squares[1] = {};
#pragma unroll 4
  for (int64_t first = 0; first < parts.parts; first += warps) {
    const bool valid = there && first + warp < parts.parts;
    const Moments<Number> part = parts.at(first + warp, channel, channels, origin, valid);
    of_mean[0] += part.count;
    of_mean[1] += part.count > 0 ? part.count * part.mean : 0;
  }
  const ThreadSums<Number, 2> sums(carver, 32);
  sums.add(of_mean);
  sums.finish();
  const Number elements = sums.at(0, column), apart = sums.at(1, column) / (elements > 0 ? elements : 1);
#pragma unroll 4
  for (int64_t first = 0; first < parts.parts; first += warps) {
    const bool valid = there && first + warp < parts.parts;
    const Moments<Number> part = parts.at(first + warp, channel, channels, origin, valid);
    const Number further = part.mean - apart;
    of_squares[0] += part.count > 0 ? part.squares + part.count * further * further : 0;
  }
  const ThreadSums<Number, 1> total(carver, 32);
  total.add(of_squares);
  total.finish();
  const double count = parts.count_of(elements), squares = total.at(0, column);
  const double mean = static_cast<double>(origin) + apart;
  const bool as_statistics = writes && statistics != nullptr, as_normaliser = writes && statistics == nullptr;
  store_global(statistics + (as_statistics ? channel : 0), count, as_statistics);
  store_global(statistics + (as_statistics ? channels + channel : 0), mean, as_statistics);
  store_global(statistics + (as_statistics ? 2 * channels + channel : 0), squares, as_statistics);
  const bool updates = as_normaliser && count > 0;
  const double before_mean = load_global(running.mean + (updates ? channel : 0), updates);
  const double before_var = load_global(running.var + (updates ? channel : 0), updates);
  const double unbiased = squares / (count > 1 ? count - 1 : 1);
  store_global(running.mean + (updates ? channel : 0),
               static_cast<Real>(before_mean + running.momentum * (mean - before_mean)), updates);
  store_global(running.var + (updates ? channel : 0),
               static_cast<Real>(before_var + running.momentum * (unbiased - before_var)), updates);
  const double share = count > 0 ? 1 / count : 0;
  write_normaliser(mean, squares * share, share, eps, channel, channels, as_normaliser, normaliser);
}

template <class Real>
__global__ void __launch_bounds__(kAbnThreads)
    abn_running_kernel(const Real* running_mean, const Real* running_var, int64_t channels, double eps,
                       Real* normaliser) {
  const int64_t number = blockIdx.x * int64_t{kAbnThreads} + thread_number();
  const bool there = number < channels;
  const int64_t channel = there ? number : 0;
  const double mean = load_global(running_mean + channel, there), var = load_global(running_var + channel, there);
  write_normaliser(mean, var, 0, eps, channel, channels, there, normaliser);
}

template <class Real>
__global__ void __launch_bounds__(kAbnThreads)
    abn_total_kernel(const GradientSums<Real> sums, int64_t channels, const ChannelSources<Real> sources, bool has_x,
                     Real* to_sums, Real* grad_weight, Real* grad_bias) {
  SharedCarver carver;
  const int64_t first = blockIdx.x * int64_t{kMergedChannels}, channel = first + thread_number();
  const TotalSums<Real> total(carver, sums, first, channels, kMergedChannels);
  const bool writes = thread_number() < kMergedChannels && channel < channels;
  const ChannelGradient<Real> gradient(channel_of(sources, channel, channels, writes), has_x, total.sum,
                                       total.deviation_sum);
  store_global(to_sums + (writes ? channel : 0), total.sum, writes);
  store_global(to_sums + (writes ? channels + channel : 0), total.deviation_sum, writes);
  write_parameter_gradients(sources, gradient, total, channel, channels, writes, grad_weight, grad_bias);
}

// ---- launching ----

template <class Real, class Parts>
cudaError_t launch_merge(const Parts& parts, int64_t channels, double* statistics,
                         const RunningStatistics<Real>& running, double eps, Real* normaliser, cudaStream_t stream) {
  using Number = typename Parts::Number;
  constexpr int shared_bytes = ThreadSums<Number, 2>::kBytes + ThreadSums<Number, 1>::kBytes;
  return launch(abn_merge_kernel<Real, Parts>, (channels + kMergedChannels - 1) / kMergedChannels, kAbnThreads,
                shared_bytes, stream, parts, channels, statistics, running, eps, normaliser);
}

template <class Real>
PartsOfBlocks<Real> parts_of(const Pieces& pieces, const Real* partial) {
  const double pack = pieces.planes ? pieces.pack : 1;  // elements of a channel that are moved at once
  const double of_each = pieces.along_block() * pack, total = pieces.along() * pack;
  const double of_last = total - (pieces.parts - 1) * of_each;
  const auto real = [](double x) { return static_cast<Real>(x); };
  return {partial, pieces.parts, real(of_each), real(of_last), real(1 / of_each), real(1 / of_last), total};
}

template <class Real>
cudaError_t AbnChannels<Real>::statistics(const Pieces& pieces, const Real* partial, double* statistics,
                                          cudaStream_t stream) {
  return launch_merge(parts_of(pieces, partial), pieces.channels, statistics, RunningStatistics<Real>{}, 0.0,
                      static_cast<Real*>(nullptr), stream);
}

template <class Real>
cudaError_t AbnChannels<Real>::normaliser(const Pieces& pieces, const Real* partial,
                                          const RunningStatistics<Real>& running, double eps, Real* normaliser,
                                          cudaStream_t stream) {
  return launch_merge(parts_of(pieces, partial), pieces.channels, nullptr, running, eps, normaliser, stream);
}

template <class Real>
cudaError_t AbnChannels<Real>::normaliser(const double* statistics, int64_t parts, int64_t channels,
                                          const RunningStatistics<Real>& running, double eps, Real* normaliser,
                                          cudaStream_t stream) {
  return launch_merge(PartsOfProcesses{statistics, parts}, channels, nullptr, running, eps, normaliser, stream);
}

template <class Real>
cudaError_t AbnChannels<Real>::normaliser(int64_t channels, const Real* running_mean, const Real* running_var,
                                          double eps, Real* normaliser, cudaStream_t stream) {
  return launch(abn_running_kernel<Real>, (channels + kAbnThreads - 1) / kAbnThreads, kAbnThreads, 0, stream,
                running_mean, running_var, channels, eps, normaliser);
}

template <class Real>
cudaError_t AbnChannels<Real>::gradient_sums(const GradientSums<Real>& sums, int64_t channels,
                                             const ChannelSources<Real>& sources, bool has_x, Real* to_sums,
                                             Real* grad_weight, Real* grad_bias, cudaStream_t stream) {
  return launch(abn_total_kernel<Real>, (channels + kMergedChannels - 1) / kMergedChannels, kAbnThreads,
                ThreadSums<Real, 2>::kBytes, stream, sums, channels, sources, has_x, to_sums, grad_weight, grad_bias);
}

}  // namespace ccnet
