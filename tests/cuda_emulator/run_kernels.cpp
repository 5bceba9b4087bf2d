// Runs every kernel of the dtype DTYPE (Half, BFloat16, float or double) once, for sanitizers to watch.
//
// Buffers are of exactly the size that the kernels may touch and hold NaN where they have to be written. Results are
// compared with the reference elsewhere; here none may be NaN.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>

#include "cc_attention/csrc/cuda/line.h"
#include "libs/csrc/cuda/abn_launchers.h"
#include "libs/csrc/cuda/scalar_types.cuh"

namespace {

using namespace ccnet;

template <class T>
struct Buffer {
  Buffer(int64_t pixels, int channels, std::mt19937* random = nullptr)
      : size(pixels * channels),
        channels(channels),
        data(static_cast<T*>(std::aligned_alloc(16, (size * sizeof(T) + 15) / 16 * 16)), std::free) {
    std::normal_distribution<float> normal(0, 0.5f);
    std::memset(static_cast<void*>(data.get()), 0xff, size * sizeof(T));
    for (int64_t i = 0; random != nullptr && i < size; ++i) {
      data.get()[i] = down<T>(normal(*random));
    }
  }
  operator Pixels<const T>() const { return {data.get(), channels}; }
  operator Pixels<T>() const { return {data.get(), channels}; }
  void check(const char* name) const {
    for (int64_t i = 0; i < size; ++i) {
      if (up(data.get()[i]) != up(data.get()[i])) {
        std::printf("%s: element %ld of %ld is NaN\n", name, static_cast<long>(i), static_cast<long>(size));
        std::exit(1);
      }
    }
  }
  const int64_t size;
  const int channels;
  const std::unique_ptr<T, void (*)(void*)> data;
};

void check(cudaError_t error) {
  if (error != cudaSuccess) {
    std::puts(emulator::last_error.c_str());
    std::exit(1);
  }
}

struct Sizes {
  int images, height, width, c, cv;
  int path_length() const { return height + width - 1; }
  int64_t pixels() const { return int64_t{images} * height * width; }
  Axes axes(bool allow_tf32) const {
    return {{{1, width, true, height == 1, path_length(), 0}, {width, height, false, true, path_length(), width}},
            height == 1 ? 1 : 2,
            images,
            height * width,
            allow_tf32};
  }
};

template <class T>
void run_attention(const Sizes& sizes, bool allow_tf32 = false) {
  using Real = Accumulate<T>;
  using Launchers = LineAttentionLaunchers<T, Real>;
  const auto [images, height, width, c, cv] = sizes;
  const int64_t pixels = sizes.pixels();
  const Axes axes = sizes.axes(allow_tf32);
  std::mt19937 random(7);
  const Buffer<T> query(pixels, c, &random), key(pixels, c, &random), value(pixels, cv, &random);
  const Buffer<T> grad_out(pixels, cv, &random);
  const Buffer<T> out(pixels, cv), grad_query(pixels, c), grad_key(pixels, c), grad_value(pixels, cv);
  const Buffer<Real> largest(pixels, 1), sum(pixels, 1), other_largest(pixels, 1), other_sum(pixels, 1);
  const Buffer<Real> delta(pixels, 1), gamma(1, 1, &random);
  const PathSum<Real> path{largest.data.get(), sum.data.get()};
  const PathSum<const Real> read_path{path.largest, path.sum};
  for (const T* residual : {static_cast<const T*>(nullptr), static_cast<const T*>(grad_out.data.get())}) {
    check(Launchers::attention(axes, query, key, value, residual, gamma.data.get(), out, path,
                               {other_largest.data.get(), other_sum.data.get()}, nullptr));
  }
  GradScratchSize size;
  check(Launchers::scratch_size(axes, c, cv, size));
  const Buffer<Real> products(size.products, 1), parts(size.slots * size.images * height * width, 1);
  check(Launchers::attention_backward(axes, query, key, value, grad_out, read_path, gamma.data.get(),
                                      {size, products.data.get(), parts.data.get()}, delta.data.get(), grad_query,
                                      grad_key, grad_value, nullptr));
  for (const auto* x : {&out, &grad_query, &grad_key, &grad_value}) {
    x->check("attention");
  }
  largest.check("largest"), sum.check("sum"), delta.check("delta");
}

template <class T>
void run_explicit_form(const Sizes& sizes, bool allow_tf32) {
  using Launchers = LineAttentionLaunchers<T, Accumulate<T>>;
  const int64_t pixels = sizes.pixels();
  const int c = sizes.c, cv = sizes.cv, path_length = sizes.path_length();
  const Axes axes = sizes.axes(allow_tf32);
  std::mt19937 random(7);
  const Buffer<T> query(pixels, c, &random), key(pixels, c, &random), value(pixels, cv, &random);
  const Buffer<T> grad_out(pixels, cv, &random), grad_energy(pixels, path_length, &random);
  const Buffer<T> grad_query(pixels, c), grad_key(pixels, c), grad_value(pixels, cv);
  const Buffer<T> energy(pixels, path_length), weight_grad(pixels, path_length), mapped(pixels, cv);
  check(Launchers::energy(axes, query, key, energy, nullptr));
  check(Launchers::energy_backward(axes, query, key, grad_energy, grad_query, grad_key, nullptr));
  check(Launchers::map(axes, energy, value, mapped, nullptr));
  check(Launchers::map_backward(axes, energy, value, grad_out, weight_grad, grad_value, nullptr));
  for (const auto* x : {&energy, &grad_query, &grad_key, &mapped, &weight_grad, &grad_value}) {
    x->check("explicit form");
  }
}

template <class T>
void run_abn(bool planes, int64_t rows, int channels, int row_length, Activation activation) {
  using Real = Accumulate<T>;
  using Abn = AbnLaunchers<T, Real>;
  std::mt19937 random(7);
  const Buffer<T> x(rows, row_length, &random), grad_z(rows, row_length, &random);
  const Buffer<T> residual(rows, row_length, &random);
  const Buffer<T> z(rows, row_length), grad_x(rows, row_length), grad_residual(rows, row_length);
  const Buffer<Real> weight(1, channels, &random), bias(1, channels, &random), normaliser(4, channels, &random);
  const Pieces pieces = Pieces::cut(planes, channels, rows, row_length, sizeof(T),
                                    {x.data.get(), z.data.get(), grad_z.data.get(), grad_x.data.get()});
  const Buffer<Real> moments(3 * pieces.parts, channels), partial(2 * pieces.parts, channels), sums(2, channels);
  const Buffer<Real> grad_weight(1, channels), grad_bias(1, channels), of_total(2, channels);
  const ChannelSources<Real> sources{normaliser.data.get(), weight.data.get(), bias.data.get(), Real(1e-5)};
  const ActivationOf activate{activation, 0.1};
  const bool has_x = !activate.is_invertible();
  check(Abn::moments(pieces, x.data.get(), moments.data.get(), nullptr));
  if constexpr (std::is_same_v<T, Real>) {  // other types use those of float
    using Channels = AbnChannels<Real>;
    const Buffer<Real> mean(1, channels, &random), var(1, channels);
    std::fill_n(var.data.get(), channels, Real(1));
    const RunningStatistics<Real> running{mean.data.get(), var.data.get(), 0.1};
    const Buffer<double> statistics(3, channels);
    const Buffer<Real> of_blocks(4, channels), of_processes(4, channels), of_running(4, channels);
    check(Channels::statistics(pieces, moments.data.get(), statistics.data.get(), nullptr));
    check(Channels::normaliser(pieces, moments.data.get(), running, 1e-5, of_blocks.data.get(), nullptr));
    check(Channels::normaliser(statistics.data.get(), 1, channels, running, 1e-5, of_processes.data.get(), nullptr));
    check(Channels::normaliser(channels, running.mean, running.var, 1e-5, of_running.data.get(), nullptr));
    statistics.check("statistics");
    for (const auto* buffer : {&mean, &var, &of_blocks, &of_processes, &of_running}) {
      buffer->check("normalisers");
    }
  }
  check(Abn::forward(pieces, x.data.get(), sources, activate, residual.data.get(), z.data.get(), nullptr));
  const KeptData<T> kept{has_x ? x.data.get() : z.data.get(), has_x ? z.data.get() : residual.data.get(),
                         grad_z.data.get()};
  check(Abn::backward_sums(pieces, kept, sources, activate, partial.data.get(), nullptr));
  if constexpr (std::is_same_v<T, Real>) {
    check(AbnChannels<Real>::gradient_sums({partial.data.get(), pieces.parts}, channels, sources, has_x,
                                           sums.data.get(), of_total.data.get(), of_total.data.get() + channels,
                                           nullptr));
    sums.check("sums"), of_total.check("gradients of the parameters");
  }
  check(Abn::backward(pieces, kept, sources, activate, {partial.data.get(), pieces.parts}, grad_x.data.get(),
                      grad_residual.data.get(), grad_weight.data.get(), grad_bias.data.get(), nullptr));
  for (const auto* buffer : {&z, &grad_x, &grad_residual}) {
    buffer->check("activated batch norm");
  }
  grad_weight.check("gradient of weight"), grad_bias.check("gradient of bias");
}

template <class T>
void run(const Sizes& sizes, bool allow_tf32 = false) {
  run_attention<T>(sizes, allow_tf32);
  run_explicit_form<T>(sizes, allow_tf32);
}

template <class T>
void run_all() {
  emulator::options.order = emulator::Order::random;
  run<T>({1, 1, 33, 8, 72});                   // small tiles; a slice and a part of one
  run_attention<T>({2, 3, 7, 8, 264});         // values that several blocks share
  run_attention<T>({1, 1, 97, 64, 72});        // 7 warps, on the first axis
  run_attention<T>({1, 65, 1, 8, 8});          // and on the second
  run<T>({1, 1, 133, 72, 8});                  // two tiles, two slices of query and key
  run_attention<T>({1, 1, 260, 8, 8});         // keys that do not all fit
  if (std::is_same_v<T, float>) {
    run<T>({1, 1, 75, 40, 72}, true);  // TF32: two tiles, two slices, the second one a part
  }
  emulator::options.cache_bytes = 1;           // image after image
  run<T>({2, 3, 5, 8, 8});
  emulator::options.shared_bytes = 64 * 1024;  // as on sm_75
  emulator::options.architecture = 75;
  run<T>({1, 1, 97, 8, 40});
  for (const auto activation : {Activation::leaky_relu, Activation::relu}) {  // which keep the result, and the input
    run_abn<T>(false, 75, 40, 40, activation);     // channels_last
    run_abn<T>(false, 21, 19, 19, activation);     // rows that are no multiple of 16 bytes
    run_abn<T>(true, 2 * 3, 3, 1040, activation);  // NCHW
    run_abn<T>(true, 2 * 3, 3, 35, activation);
    run_abn<T>(false, 4200, 8, 8, activation);  // several blocks, whose sums are added up
    run_abn<T>(true, 2 * 3, 3, 9000, activation);
  }
}

}  // namespace

int main() {
  run_all<DTYPE>();
  std::puts("done");
}
