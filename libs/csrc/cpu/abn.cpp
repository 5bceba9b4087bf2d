// Activated batch norm on the CPU: blocks of elements that lie side by side (abn_kernels.h) are shared out among
// threads. How a tensor is cut into blocks, and the order in which their sums are added up, depend on its shape only,
// and so the result does not depend on how many threads there are.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <memory>
#include <numeric>
#include <tuple>
#include <type_traits>
#include <vector>

#include "libs/csrc/abn.h"
#include "libs/csrc/cpu/abn_kernels.h"
#include "libs/csrc/cpu/dtype.h"
#include "libs/csrc/cpu/memory.h"

namespace ccnet {
namespace {

constexpr int64_t kBlockElements = 1 << 17;  // of rows, at most
constexpr int64_t kPlaneElements = 1 << 13;
constexpr int64_t kElementsWorthAThread = 1 << 15;
constexpr int64_t kBytesPastCaches = 8 << 20;

// A tensor of a layout as blocks, numbered in the order of memory.
//
// Planes are cut into equal parts. Of rows many make a block; rows that are short, or not of whole vectors, are taken
// several at a time as one, in which the channels repeat, and those left over are a block of their own.
//
// For sums over channels each block has a slot a number: one, or as many as its rows are long.
class Blocks {
 public:
  struct Place {
    Block block;
    int64_t element, channel, slot;  // the first of each
  };

  explicit Blocks(const Layout& layout) : layout_(layout) {
    if (layout.planes) {
      constexpr int64_t together = 64;
      const int64_t parts = (layout.positions + kPlaneElements - 1) / kPlaneElements;
      length_ = ((layout.positions + parts - 1) / parts + together - 1) / together * together;
      parts_ = (layout.positions + length_ - 1) / length_;
      count_ = slots_ = layout.images * layout.channels * parts_;
    } else {
      const int64_t rows = layout.images * layout.positions;
      const int64_t repeats = rows_as_one(layout.channels);
      length_ = (rows < 4 * repeats ? 1 : repeats) * layout.channels;
      rows_ = rows * layout.channels / std::max<int64_t>(length_, 1);
      block_rows_ = std::max<int64_t>(1, kBlockElements / std::max<int64_t>(length_, 1));
      const int64_t whole = (rows_ + block_rows_ - 1) / block_rows_;
      left_over_ = rows - rows_ * length_ / std::max<int64_t>(layout.channels, 1);
      count_ = layout.channels == 0 ? 0 : whole + (left_over_ > 0 ? 1 : 0);
      slots_ = whole * length_ + (left_over_ > 0 ? layout.channels : 0);
    }
  }

  int64_t count() const { return count_; }
  int64_t slots() const { return slots_; }
  // Numbers of the channels as the kernels read them: repeated as the channels are in a row
  int64_t numbers() const { return layout_.planes ? layout_.channels : length_; }

  Place at(int64_t i) const {
    if (layout_.planes) {
      const int64_t plane = i / parts_, begin = i % parts_ * length_;
      return {{1, std::min(length_, layout_.positions - begin), true},
              plane * layout_.positions + begin, plane % layout_.channels, i};
    }
    const int64_t begin = i * block_rows_;
    if (begin >= rows_) {
      const int64_t whole = count_ - 1;
      return {{left_over_, layout_.channels, false}, rows_ * length_, 0, whole * length_};
    }
    return {{std::min(block_rows_, rows_ - begin), length_, false}, begin * length_, 0, i * length_};
  }

  // f(slot, channel, elements) for every slot, those of a channel always in the same order
  template <class F>
  void each_slot(const F& f) const {
    for (int64_t i = 0; i < count_; ++i) {
      const Place place = at(i);
      if (place.block.one_channel) {
        f(place.slot, place.channel, place.block.length);
        continue;
      }
      for (int64_t first = 0; first < place.block.length; first += layout_.channels) {
        for (int64_t c = 0; c < layout_.channels; ++c) {
          f(place.slot + first + c, c, place.block.rows);
        }
      }
    }
  }

  // f(place) for every block, on several threads: f must not throw.
  template <class F>
  void each(const F& f) const {
    run([&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        f(at(i));
      }
    });
  }

  // The same from the end: a second pass over what the first one read begins with what is still in the cache.
  template <class F>
  void each_backwards(const F& f) const {
    run([&](int64_t begin, int64_t end) {
      for (int64_t i = end - 1; i >= begin; --i) {
        f(at(i));
      }
    });
  }

 private:
  template <class F>
  void run(const F& range) const {
    const int64_t elements = layout_.planes ? length_ : block_rows_ * length_;
    torch::stable::parallel_for(0, count_, 1 + kElementsWorthAThread / std::max<int64_t>(elements, 1), range);
  }

  static int64_t rows_as_one(int64_t channels) {
    constexpr int64_t lanes = 16, enough = 128;
    const int64_t for_whole_vectors = lanes / std::gcd(channels, lanes);
    const int64_t length = std::max<int64_t>(channels, 1) * for_whole_vectors;
    return for_whole_vectors * ((enough + length - 1) / length);
  }

  Layout layout_;
  int64_t count_ = 0, slots_ = 0;
  int64_t length_ = 0;                            // of a part of a plane, or of a row
  int64_t parts_ = 0;                             // of a plane
  int64_t rows_ = 0, block_rows_ = 0, left_over_ = 0;
};

#include "libs/csrc/channel.h"

// [rows, C] of a dtype that numbers of channels have, in double
std::vector<double> doubles_of(const Tensor& numbers) {
  std::vector<double> values(numbers.numel());
  for_type("numbers", numbers, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if constexpr (std::is_floating_point_v<T>) {
      const T* from = static_cast<const T*>(numbers.const_data_ptr());
      std::copy(from, from + numbers.numel(), values.begin());
    }
  });
  return values;
}

std::vector<Channel<double>> channels_of(const Tensor& x, const Tensor& normaliser, const OptionalTensor& weight,
                                         const OptionalTensor& bias, double eps) {
  check_numbers(x, normaliser, weight, bias);
  const int64_t count = x.size(1);
  const std::vector<double> of = doubles_of(normaliser), none;
  const std::vector<double> weights = weight ? doubles_of(*weight) : none, biases = bias ? doubles_of(*bias) : none;
  std::vector<Channel<double>> channels(count);
  for (int64_t c = 0; c < count; ++c) {
    channels[c] = {of[c],     of[count + c], of[2 * count + c], of[3 * count + c], weight ? std::abs(weights[c]) + eps : 1,
                   bias ? biases[c] : 0};
  }
  return channels;
}

// ChannelNumbers as the kernels read them, from what of_channel(c) says
template <class Real>
class Numbers {
 public:
  template <class F>
  Numbers(const Blocks& blocks, int64_t channels, const F& of_channel)
      : row_(blocks.numbers() + kNumbersBeyond), numbers_(kCount * row_) {
    for (int64_t c = 0; c < channels; ++c) {
      const std::array<double, kCount> values = of_channel(c);
      for (int k = 0; k < kCount; ++k) {
        for (int64_t i = c; i < blocks.numbers(); i += channels) {
          numbers_[k * row_ + i] = values[k];
        }
      }
    }
  }
  operator ChannelNumbers<Real>() const {
    const Real* p = numbers_.data();
    return {p, p + row_, p + 2 * row_, p + 3 * row_, p + 4 * row_};
  }

 private:
  static constexpr int kCount = 5;
  int64_t row_;
  std::vector<Real> numbers_;
};

// [C], or [rows, C]
Tensor empty_numbers(const Tensor& x, ScalarType dtype, int64_t rows = 0) {
  const int64_t channels = x.size(1);
  return rows == 0 ? torch::stable::new_empty(x, {channels}, dtype) : torch::stable::new_empty(x, {rows, channels}, dtype);
}

Tensor empty_as(const Tensor& like) {
  Tensor x = torch::stable::empty_like(like);
  prefer_huge_pages(x.mutable_data_ptr(), x.numel() * x.element_size());
  return x;
}

// ---- the operators ----

Tensor abn_statistics(const Tensor& x_) {
  check_images("x", x_);
  const Tensor x = in_some_layout(x_);
  const Blocks blocks(*layout_of(x));
  const int64_t channels = x.size(1);
  const std::unique_ptr<double[]> mean_of(new double[blocks.slots()]), squares_of(new double[blocks.slots()]);
  for_type("x", x, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* data = static_cast<const T*>(x.const_data_ptr());
    const auto kernel = abn_kernels<T>().statistics;
    blocks.each([&](const Blocks::Place& place) {
      kernel(place.block, data + place.element, mean_of.get() + place.slot, squares_of.get() + place.slot);
    });
  });
  Tensor statistics = empty_numbers(x, ScalarType::Double, 3);
  double* count = static_cast<double*>(statistics.mutable_data_ptr());
  double *mean = count + channels, *squares = mean + channels;
  std::fill(count, count + 3 * channels, 0.0);
  blocks.each_slot([&](int64_t slot, int64_t c, int64_t elements) {
    count[c] += elements;
    mean[c] += elements * mean_of[slot];
  });
  for (int64_t c = 0; c < channels; ++c) {
    mean[c] = count[c] > 0 ? mean[c] / count[c] : 0;
  }
  blocks.each_slot([&](int64_t slot, int64_t c, int64_t elements) {
    const double apart = mean_of[slot] - mean[c];
    squares[c] += squares_of[slot] + elements * apart * apart;
  });
  return statistics;
}

// Writes `values`, which has as many numbers as `numbers`
void write(Tensor& numbers, const std::vector<double>& values) {
  for_type("numbers", numbers, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if constexpr (std::is_floating_point_v<T>) {
      std::copy(values.begin(), values.end(), static_cast<T*>(numbers.mutable_data_ptr()));
    }
  });
}

// Of mean and variance of each channel, for a batch of so many elements; 0: they are constants
Tensor normaliser_of(const Tensor& running_mean, const std::vector<double>& mean, const std::vector<double>& var,
                     const double* count, double eps) {
  const int64_t channels = running_mean.numel();
  const bool is_float = running_mean.scalar_type() == ScalarType::Float;
  std::vector<double> numbers(4 * channels);
  for (int64_t c = 0; c < channels; ++c) {
    const double rounded = is_float ? static_cast<float>(mean[c]) : mean[c];
    numbers[c] = rounded;
    numbers[channels + c] = mean[c] - rounded;
    numbers[2 * channels + c] = 1 / std::sqrt(var[c] + eps);
    numbers[3 * channels + c] = count != nullptr && count[c] > 0 ? 1 / count[c] : 0;
  }
  Tensor normaliser = torch::stable::new_empty(running_mean, {4, channels});
  write(normaliser, numbers);
  return normaliser;
}

Tensor abn_normaliser_of_parts_(const Tensor& parts, Tensor running_mean, Tensor running_var, double momentum,
                                double eps) {
  check_running(running_mean, running_var);
  check_parts(parts, running_mean);
  const int64_t channels = running_mean.numel();
  std::vector<double> count(channels), mean(channels), var(channels);
  std::vector<double> new_mean = doubles_of(running_mean), new_var = doubles_of(running_var);
  const double* const data = static_cast<const double*>(parts.const_data_ptr());
  // f(c, count, mean, sum of squared deviations) of each part
  const auto each = [&](const auto& f) {
    for (const double* part = data; part < data + parts.numel(); part += 3 * channels) {
      for (int64_t c = 0; c < channels; ++c) {
        f(c, part[c], part[channels + c], part[2 * channels + c]);
      }
    }
  };
  each([&](int64_t c, double n, double part_mean, double) {
    count[c] += n;
    mean[c] += n * part_mean;
  });
  for (int64_t c = 0; c < channels; ++c) {
    mean[c] /= std::max(count[c], 1.0);
  }
  each([&](int64_t c, double n, double part_mean, double squares) {
    var[c] += squares + n * (part_mean - mean[c]) * (part_mean - mean[c]);
  });
  for (int64_t c = 0; c < channels; ++c) {
    if (count[c] > 0) {
      new_mean[c] += momentum * (mean[c] - new_mean[c]);
      new_var[c] += momentum * (var[c] / std::max(count[c] - 1, 1.0) - new_var[c]);
      var[c] /= count[c];
    }
  }
  write(running_mean, new_mean);
  write(running_var, new_var);
  return normaliser_of(running_mean, mean, var, count.data(), eps);
}

Tensor abn_normaliser_of_batch_(const Tensor& x, Tensor running_mean, Tensor running_var, double momentum, double eps) {
  const Tensor statistics = abn_statistics(x);
  return abn_normaliser_of_parts_(torch::stable::unsqueeze(statistics, 0), running_mean, running_var, momentum, eps);
}

Tensor abn_normaliser_of_running(const Tensor& running_mean, const Tensor& running_var, double eps) {
  check_running(running_mean, running_var);
  return normaliser_of(running_mean, doubles_of(running_mean), doubles_of(running_var), nullptr, eps);
}

template <class T>
const T* data_of(const OptionalTensor& x) {
  return x ? static_cast<const T*>(x->const_data_ptr()) : nullptr;
}

template <class T>
T* from(T* data, int64_t element) {
  return data == nullptr ? nullptr : data + element;
}

// z of x, both of one of the layouts, maybe the same
void forward(const Tensor& x, const Tensor& normaliser, const OptionalTensor& weight, const OptionalTensor& bias,
             const OptionalTensor& residual_, double eps, const std::string& activation, double slope, Tensor& z) {
  const std::vector<Channel<double>> channels = channels_of(x, normaliser, weight, bias, eps);
  const OptionalTensor residual = in_layout_of("residual", x, residual_);
  const Blocks blocks(*layout_of(x));
  const ActivationOf activate{activation_of(activation), slope};
  for_type("x", x, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const Numbers<Accumulate<T>> numbers(blocks, x.size(1), [&](int64_t c) {
      return std::array<double, 5>{channels[c].mean, channels[c].scale(), channels[c].offset()};
    });
    const ChannelNumbers<Accumulate<T>> of_channels = numbers;
    const T *in = static_cast<const T*>(x.const_data_ptr()), *rest = data_of<T>(residual);
    T* out = static_cast<T*>(z.mutable_data_ptr());
    const auto kernel = abn_kernels<T>().forward;
    blocks.each_backwards([&](const Blocks::Place& place) {
      kernel(place.block, activate, in + place.element, of_channels.from(place.channel), from(rest, place.element),
             out + place.element);
    });
  });
}

Tensor abn_forward(const Tensor& x_, const Tensor& normaliser, const OptionalTensor& weight,
                   const OptionalTensor& bias, const OptionalTensor& residual, double eps,
                   const std::string& activation, double slope) {
  check_images("x", x_);
  const Tensor x = in_some_layout(x_);
  Tensor z = empty_as(x);
  forward(x, normaliser, weight, bias, residual, eps, activation, slope, z);
  return z;
}

void abn_forward_(Tensor x, const Tensor& normaliser, const OptionalTensor& weight, const OptionalTensor& bias,
                  const OptionalTensor& residual, double eps, const std::string& activation, double slope) {
  check_images("x", x);
  Tensor z = in_some_layout(x);
  forward(z, normaliser, weight, bias, residual, eps, activation, slope, z);
  if (!layout_of(x)) {
    torch::stable::copy_(x, z);
  }
}

template <class T>
KeptData<T> kept_from(const KeptTensors& kept, int64_t element) {
  return {from(data_of<T>(kept.x), element), from(data_of<T>(kept.z), element), from(data_of<T>(kept.residual), element)};
}

// What deviations are taken from, and the numbers of channel.h
std::array<double, 5> backward_numbers(const KeptTensors& kept, const Channel<double>& channel, double sum,
                                       double deviation_sum) {
  const bool has_x = kept.x.has_value();
  const ChannelGradient<double> gradient(channel, has_x, sum, deviation_sum);
  return {has_x ? channel.mean : channel.bias, channel.scale(), channel.offset(), gradient.of_deviation,
          gradient.constant};
}

std::tuple<Tensor, Tensor, Tensor> abn_backward_sums(
    const OptionalTensor& x, const OptionalTensor& z, const Tensor& grad_z, const Tensor& normaliser,
    const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& residual, double eps,
    const std::string& activation, double slope) {
  const KeptTensors kept(x, z, grad_z, residual, activation, slope);
  const Tensor& like = kept.like();
  const std::vector<Channel<double>> channels = channels_of(like, normaliser, weight, bias, eps);
  const Blocks blocks(*layout_of(like));
  const std::unique_ptr<double[]> sum_of(new double[blocks.slots()]), product_sum_of(new double[blocks.slots()]);
  for_type("z", like, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const Numbers<Accumulate<T>> numbers(
        blocks, like.size(1), [&](int64_t c) { return backward_numbers(kept, channels[c], 0, 0); });
    const ChannelNumbers<Accumulate<T>> of_channels = numbers;
    const T* grad = static_cast<const T*>(kept.grad_z.const_data_ptr());
    const auto kernel = abn_kernels<T>().backward_sums;
    blocks.each([&](const Blocks::Place& place) {
      kernel(place.block, kept.activation, kept_from<T>(kept, place.element), grad + place.element,
             of_channels.from(place.channel), sum_of.get() + place.slot, product_sum_of.get() + place.slot);
    });
  });
  const int64_t count = like.size(1);
  std::vector<double> totals(2 * count), of_weight(count);
  blocks.each_slot([&](int64_t slot, int64_t c, int64_t) {
    totals[c] += sum_of[slot];
    totals[count + c] += product_sum_of[slot];
  });
  const std::vector<double> weights = weight ? doubles_of(*weight) : std::vector<double>(count, 1);
  for (int64_t c = 0; c < count; ++c) {
    const ChannelGradient<double> gradient(channels[c], kept.x.has_value(), totals[c], totals[count + c]);
    of_weight[c] = gradient.of_weight * ((weights[c] > 0) - (weights[c] < 0));
  }
  Tensor sums = empty_numbers(like, numbers_type(like), 2);
  Tensor grad_weight = empty_numbers(like, numbers_type(like)), grad_bias = empty_numbers(like, numbers_type(like));
  write(sums, totals);
  write(grad_weight, of_weight);
  totals.resize(count);
  write(grad_bias, totals);
  return {sums, grad_weight, grad_bias};
}

std::tuple<Tensor, Tensor> abn_backward(const OptionalTensor& x, const OptionalTensor& z, const Tensor& grad_z,
                                        const Tensor& normaliser, const OptionalTensor& sums,
                                        const OptionalTensor& weight, const OptionalTensor& bias,
                                        const OptionalTensor& residual, double eps, const std::string& activation,
                                        double slope) {
  const KeptTensors kept(x, z, grad_z, residual, activation, slope);
  const Tensor& like = kept.like();
  const std::vector<Channel<double>> channels = channels_of(like, normaliser, weight, bias, eps);
  const int64_t count = like.size(1);
  std::vector<double> totals(2 * count);
  if (sums) {
    check_per_channel("sums", *sums, like, 2, numbers_type(like));
    totals = doubles_of(*sums);
  }
  const bool had_residual = kept.had_residual();
  Tensor grad_x = empty_as(like), grad_residual = had_residual ? empty_as(like) : torch::stable::new_empty(like, {0});
  const Blocks blocks(*layout_of(like));
  for_type("z", like, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const Numbers<Accumulate<T>> numbers(
        blocks, count, [&](int64_t c) { return backward_numbers(kept, channels[c], totals[c], totals[count + c]); });
    const ChannelNumbers<Accumulate<T>> of_channels = numbers;
    const T* grad = static_cast<const T*>(kept.grad_z.const_data_ptr());
    T* to_x = static_cast<T*>(grad_x.mutable_data_ptr());
    T* to_residual = had_residual ? static_cast<T*>(grad_residual.mutable_data_ptr()) : nullptr;
    const bool past_caches = grad_x.numel() * static_cast<int64_t>(sizeof(T)) >= kBytesPastCaches;
    const auto kernel = abn_kernels<T>().backward;
    blocks.each_backwards([&](const Blocks::Place& place) {
      kernel(place.block, kept.activation, kept_from<T>(kept, place.element), grad + place.element,
             of_channels.from(place.channel), to_x + place.element, from(to_residual, place.element), past_caches);
    });
  });
  return {grad_x, grad_residual};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> abn_backward_of_batch(
    const OptionalTensor& x, const OptionalTensor& z, const Tensor& grad_z, const Tensor& normaliser,
    const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& residual, double eps,
    const std::string& activation, double slope) {
  const auto [sums, grad_weight, grad_bias] =
      abn_backward_sums(x, z, grad_z, normaliser, weight, bias, residual, eps, activation, slope);
  const auto [grad_x, grad_residual] =
      abn_backward(x, z, grad_z, normaliser, sums, weight, bias, residual, eps, activation, slope);
  return {grad_x, grad_residual, grad_weight, grad_bias};
}

}  // namespace
}  // namespace ccnet

STABLE_TORCH_LIBRARY_IMPL(ccnet, CPU, m) {
  m.impl("abn_statistics", TORCH_BOX(&ccnet::abn_statistics));
  m.impl("abn_normaliser_of_batch_", TORCH_BOX(&ccnet::abn_normaliser_of_batch_));
  m.impl("abn_normaliser_of_parts_", TORCH_BOX(&ccnet::abn_normaliser_of_parts_));
  m.impl("abn_normaliser_of_running", TORCH_BOX(&ccnet::abn_normaliser_of_running));
  m.impl("abn_forward", TORCH_BOX(&ccnet::abn_forward));
  m.impl("abn_forward_", TORCH_BOX(&ccnet::abn_forward_));
  m.impl("abn_backward_sums", TORCH_BOX(&ccnet::abn_backward_sums));
  m.impl("abn_backward", TORCH_BOX(&ccnet::abn_backward));
  m.impl("abn_backward_of_batch", TORCH_BOX(&ccnet::abn_backward_of_batch));
}
