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

// |weight| + eps and bias of each channel, or 1 and 0
struct Affine {
  std::vector<double> gain, bias;
};

std::vector<double> doubles_of(const OptionalTensor& numbers, int64_t channels, double otherwise) {
  std::vector<double> values(channels, otherwise);
  if (numbers) {
    for_type("weight or bias", *numbers, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      if constexpr (std::is_floating_point_v<T>) {
        const T* from = static_cast<const T*>(numbers->const_data_ptr());
        std::copy(from, from + channels, values.begin());
      }
    });
  }
  return values;
}

Affine affine_of(int64_t channels, const OptionalTensor& weight, const OptionalTensor& bias, double eps) {
  Affine affine{doubles_of(weight, channels, 1), doubles_of(bias, channels, 0)};
  if (weight) {
    for (double& gain : affine.gain) {
      gain = std::abs(gain) + eps;
    }
  }
  return affine;
}

// [3, C] of `abn_statistics`
struct Statistics {
  const double *count, *mean, *squares;
  Statistics(const Tensor& x, const Tensor& statistics) {
    check_statistics(x, statistics);
    count = static_cast<const double*>(statistics.const_data_ptr());
    mean = count + x.size(1);
    squares = mean + x.size(1);
  }
  double inverse_deviation(int64_t c, double eps) const {
    const double variance = count[c] > 0 ? squares[c] / count[c] : 0;
    return 1 / std::sqrt(variance + eps);
  }
};

// kCount arrays of numbers as the kernels read them, from what of_channel(c, number of the array) says
template <class Real, int kCount>
class Numbers {
 public:
  template <class F>
  Numbers(const Blocks& blocks, int64_t channels, const F& of_channel)
      : row_(blocks.numbers() + kNumbersBeyond), numbers_(kCount * row_) {
    for (int64_t c = 0; c < channels; ++c) {
      const auto values = of_channel(c);
      for (int k = 0; k < kCount; ++k) {
        for (int64_t i = c; i < blocks.numbers(); i += channels) {
          numbers_[k * row_ + i] = values[k];
        }
      }
    }
  }
  const Real* operator[](int k) const { return numbers_.data() + k * row_; }

 private:
  int64_t row_;
  std::vector<Real> numbers_;
};

Tensor empty_doubles(const Tensor& x, int64_t rows) {
  return torch::stable::new_empty(x, {rows, x.size(1)}, ScalarType::Double);
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
  Tensor statistics = empty_doubles(x, 3);
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

void abn_update_running_(Tensor running_mean, Tensor running_var, const Tensor& statistics, double momentum) {
  check_running(running_mean, running_var, statistics);
  const int64_t channels = running_mean.numel();
  const double* count = static_cast<const double*>(statistics.const_data_ptr());
  const double *mean = count + channels, *squares = mean + channels;
  for_type("running_mean", running_mean, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    T *to_mean = static_cast<T*>(running_mean.mutable_data_ptr());
    T* to_var = static_cast<T*>(running_var.mutable_data_ptr());
    if constexpr (std::is_floating_point_v<T>) {
      for (int64_t c = 0; c < channels; ++c) {
        if (count[c] > 0) {
          const double var = squares[c] / std::max(count[c] - 1, 1.0);
          to_mean[c] += momentum * (mean[c] - to_mean[c]);
          to_var[c] += momentum * (var - to_var[c]);
        }
      }
    }
  });
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
void forward(const Tensor& x, const Tensor& statistics_, const OptionalTensor& weight, const OptionalTensor& bias,
             const OptionalTensor& residual_, double eps, const std::string& activation, double slope, Tensor& z) {
  check_parameters(x, weight, bias);
  const OptionalTensor residual = residual_as(x, residual_);
  const Statistics statistics(x, statistics_);
  const int64_t channels = x.size(1);
  const Affine affine = affine_of(channels, weight, bias, eps);
  const Blocks blocks(*layout_of(x));
  const ActivationOf activate{activation_of(activation), slope};
  for_type("x", x, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using Real = Accumulate<T>;
    const Numbers<Real, 3> numbers(blocks, channels, [&](int64_t c) {
      const Real shift = statistics.mean[c];
      const double scale = affine.gain[c] * statistics.inverse_deviation(c, eps);
      return std::array<double, 3>{shift, scale, affine.bias[c] - (statistics.mean[c] - shift) * scale};
    });
    const AffineNumbers<Real> affine_numbers{numbers[0], numbers[1], numbers[2]};
    const T *in = static_cast<const T*>(x.const_data_ptr()), *rest = data_of<T>(residual);
    T* out = static_cast<T*>(z.mutable_data_ptr());
    const auto kernel = abn_kernels<T>().forward;
    blocks.each_backwards([&](const Blocks::Place& place) {
      kernel(place.block, activate, in + place.element, affine_numbers.from(place.channel), from(rest, place.element),
             out + place.element);
    });
  });
}

Tensor abn_forward(const Tensor& x_, const Tensor& statistics, const OptionalTensor& weight,
                   const OptionalTensor& bias, const OptionalTensor& residual, double eps,
                   const std::string& activation, double slope) {
  check_images("x", x_);
  const Tensor x = in_some_layout(x_);
  Tensor z = empty_as(x);
  forward(x, statistics, weight, bias, residual, eps, activation, slope, z);
  return z;
}

void abn_forward_(Tensor x, const Tensor& statistics, const OptionalTensor& weight, const OptionalTensor& bias,
                  const OptionalTensor& residual, double eps, const std::string& activation, double slope) {
  check_images("x", x);
  Tensor z = in_some_layout(x);
  forward(z, statistics, weight, bias, residual, eps, activation, slope, z);
  if (!layout_of(x)) {
    torch::stable::copy_(x, z);
  }
}

Tensor abn_backward_sums(const Tensor& z_, const Tensor& grad_z_, const OptionalTensor& weight,
                         const OptionalTensor& bias, const OptionalTensor& residual_, double eps,
                         const std::string& activation, double slope) {
  check_images("z", z_);
  check_like("grad_z", grad_z_, z_);
  check_parameters(z_, weight, bias);
  const Tensor z = in_some_layout(z_), grad_z = in_layout_of(z, grad_z_);
  const OptionalTensor residual = residual_as(z, residual_);
  const int64_t channels = z.size(1);
  const Affine affine = affine_of(channels, weight, bias, eps);
  const Blocks blocks(*layout_of(z));
  const ActivationOf activate{activation_of(activation), slope};
  const std::unique_ptr<double[]> sum_of(new double[blocks.slots()]), product_sum_of(new double[blocks.slots()]);
  for_type("z", z, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using Real = Accumulate<T>;
    const Numbers<Real, 1> numbers(blocks, channels, [&](int64_t c) { return std::array<double, 1>{affine.bias[c]}; });
    const Real* biases = numbers[0];
    const T *out = static_cast<const T*>(z.const_data_ptr()), *grad = static_cast<const T*>(grad_z.const_data_ptr());
    const T* rest = data_of<T>(residual);
    const auto kernel = abn_kernels<T>().backward_sums;
    blocks.each([&](const Blocks::Place& place) {
      kernel(place.block, activate, out + place.element, grad + place.element, from(rest, place.element),
             biases + place.channel, sum_of.get() + place.slot, product_sum_of.get() + place.slot);
    });
  });
  Tensor sums = empty_doubles(z, 2);
  double* sum = static_cast<double*>(sums.mutable_data_ptr());
  double* product_sum = sum + channels;
  std::fill(sum, sum + 2 * channels, 0.0);
  blocks.each_slot([&](int64_t slot, int64_t c, int64_t) {
    sum[c] += sum_of[slot];
    product_sum[c] += product_sum_of[slot];
  });
  for (int64_t c = 0; c < channels; ++c) {
    product_sum[c] /= affine.gain[c];  // y - bias = xhat * gain
  }
  return sums;
}

std::tuple<Tensor, Tensor> abn_backward(const Tensor& z_, const Tensor& grad_z_, const Tensor& statistics_,
                                        const OptionalTensor& sums, const OptionalTensor& weight,
                                        const OptionalTensor& bias, const OptionalTensor& residual_, double eps,
                                        const std::string& activation, double slope) {
  check_images("z", z_);
  check_like("grad_z", grad_z_, z_);
  check_parameters(z_, weight, bias);
  const Statistics statistics(z_, statistics_);
  const int64_t channels = z_.size(1);
  const double *sum = nullptr, *product_sum = nullptr;
  if (sums) {
    check_per_channel("sums", *sums, z_, 2, ScalarType::Double);
    sum = static_cast<const double*>(sums->const_data_ptr());
    product_sum = sum + channels;
  }
  const Tensor z = in_some_layout(z_), grad_z = in_layout_of(z, grad_z_);
  const OptionalTensor residual = residual_as(z, residual_);
  Tensor grad_x = empty_as(z), grad_residual = residual ? empty_as(z) : torch::stable::new_empty(z, {0});
  const Affine affine = affine_of(channels, weight, bias, eps);
  const Blocks blocks(*layout_of(z));
  const ActivationOf activate{activation_of(activation), slope};
  for_type("z", z, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using Real = Accumulate<T>;
    // dx = (dy - sum(dy) / n - xhat * sum(dy * xhat) / n) * gain * inverse deviation, xhat = (y - bias) / gain
    const Numbers<Real, 4> numbers(blocks, channels, [&](int64_t c) {
      const double inverse = statistics.inverse_deviation(c, eps), scale = affine.gain[c] * inverse;
      if (sum == nullptr || statistics.count[c] == 0) {
        return std::array<double, 4>{affine.bias[c], scale, 0, 0};
      }
      const double n = statistics.count[c];
      return std::array<double, 4>{affine.bias[c], scale, -inverse * product_sum[c] / n, -scale * sum[c] / n};
    });
    const GradientNumbers<Real> gradient{numbers[0], numbers[1], numbers[2], numbers[3]};
    const T *out = static_cast<const T*>(z.const_data_ptr()), *grad = static_cast<const T*>(grad_z.const_data_ptr());
    const T* rest = data_of<T>(residual);
    T* to_x = static_cast<T*>(grad_x.mutable_data_ptr());
    T* to_residual = residual ? static_cast<T*>(grad_residual.mutable_data_ptr()) : nullptr;
    const bool past_caches = grad_x.numel() * static_cast<int64_t>(sizeof(T)) >= kBytesPastCaches;
    const auto kernel = abn_kernels<T>().backward;
    blocks.each_backwards([&](const Blocks::Place& place) {
      kernel(place.block, activate, out + place.element, grad + place.element, from(rest, place.element),
             gradient.from(place.channel), to_x + place.element, from(to_residual, place.element), past_caches);
    });
  });
  return {grad_x, grad_residual};
}

}  // namespace
}  // namespace ccnet

STABLE_TORCH_LIBRARY_IMPL(ccnet, CPU, m) {
  m.impl("abn_statistics", TORCH_BOX(&ccnet::abn_statistics));
  m.impl("abn_update_running_", TORCH_BOX(&ccnet::abn_update_running_));
  m.impl("abn_forward", TORCH_BOX(&ccnet::abn_forward));
  m.impl("abn_forward_", TORCH_BOX(&ccnet::abn_forward_));
  m.impl("abn_backward_sums", TORCH_BOX(&ccnet::abn_backward_sums));
  m.impl("abn_backward", TORCH_BOX(&ccnet::abn_backward));
}
