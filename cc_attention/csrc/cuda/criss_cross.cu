// The criss-cross attention operators on the GPU: each runs its kernel (line.h) over all rows, then all columns (then
// all lines along depth). No two blocks of a launch write to the same place, so results are the same in every run.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/MemoryFormat.h>

#include <limits>
#include <tuple>
#include <type_traits>

#include "cc_attention/csrc/criss_cross.h"
#include "cc_attention/csrc/cuda/line.h"
#include "libs/csrc/cuda/operators.h"

namespace ccnet {
namespace {

// The kernels' tensors are channels_last: others are copied, and results are copied back.
MemoryFormat channels_last_format(const Tensor& x) {
  return x.dim() == 5 ? MemoryFormat::ChannelsLast3d : MemoryFormat::ChannelsLast;
}
Tensor in_channels_last(const Tensor& x) {
  return is_channels_last(x) ? x : torch::stable::contiguous(x, channels_last_format(x));
}
Tensor in_format_of(const Tensor& like, const Tensor& x) {
  if (format_of(like) != MemoryFormat::Contiguous) {
    return x;
  }
  Tensor copy = torch::stable::empty(shape_of(x), x.scalar_type(), std::nullopt, x.device(), std::nullopt,
                                     MemoryFormat::Contiguous);
  torch::stable::copy_(copy, x);
  return copy;
}

// Uninitialised, of that shape and otherwise as `like`
Tensor empty_channels_last(const Tensor& like, const Shape& shape) {
  return torch::stable::empty(shape, like.scalar_type(), std::nullopt, like.device(), std::nullopt,
                              channels_last_format(like));
}

template <class T>
Pixels<const T> read(const Tensor& x) {
  return {static_cast<const T*>(x.const_data_ptr()), static_cast<int>(x.size(1))};
}
template <class T>
Pixels<T> write(const Tensor& x) {
  return {static_cast<T*>(x.mutable_data_ptr()), static_cast<int>(x.size(1))};
}
// The numbers of empty_per_pixel
template <class T>
Accumulate<T>* numbers(const Tensor& x) {
  return static_cast<Accumulate<T>*>(x.mutable_data_ptr());
}
template <class T>
PathSum<const Accumulate<T>> read_path(const Tensor& largest, const Tensor& sum) {
  using Real = Accumulate<T>;
  return {static_cast<const Real*>(largest.const_data_ptr()), static_cast<const Real*>(sum.const_data_ptr())};
}

// The axes of x: its rows, columns, and lines along depth
Axes axes_of(const Tensor& x) {
  Axes axes{};
  axes.pixels = x.size(0);
  int64_t path = 0;
  for (int64_t d = x.dim() - 1, step = 1; d >= 2; step *= x.size(d--)) {
    const int64_t length = x.size(d);
    STD_TORCH_CHECK(length <= std::numeric_limits<int>::max() / 4, "expected sides of less than 2^29 pixels");
    axes.pixels *= length;
    const bool first = axes.count == 0;
    if (first || length > 1) {  // a line of one pixel has, but for the first axis, nobody to attend to
      axes.lines[axes.count++] = {step, static_cast<int>(length), first, false, 0, static_cast<int>(path)};
    }
    path += first ? length : length - 1;
  }
  axes.lines[axes.count - 1].last_axis = true;
  for (Line& line : axes.lines) {
    line.path = static_cast<int>(path);
  }
  return axes;
}

template <class T>
using Launchers = LineAttentionLaunchers<T, Accumulate<T>>;

// ---- the operators ----

std::tuple<Tensor, Tensor, Tensor> criss_cross_attention(const Tensor& query_, const Tensor& key_,
                                                         const Tensor& value_) {
  check_query_key_and_value(query_, key_, value_);
  const OnDeviceOf device(query_);
  const Tensor query = in_channels_last(query_), key = in_channels_last(key_), value = in_channels_last(value_);
  Tensor out = empty_channels_last(value, shape_of(value));
  Tensor largest = empty_per_pixel(query), sum = empty_per_pixel(query);
  run_for_type("criss_cross_attention", query, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    return Launchers<T>::attention(axes_of(query), read<T>(query), read<T>(key), read<T>(value), write<T>(out),
                                   {numbers<T>(largest), numbers<T>(sum)}, device.stream());
  });
  return {in_format_of(value_, out), largest, sum};
}

std::tuple<Tensor, Tensor, Tensor> criss_cross_attention_backward(const Tensor& grad_out_, const Tensor& query_,
                                                                  const Tensor& key_, const Tensor& value_,
                                                                  const Tensor& out_, const Tensor& largest_,
                                                                  const Tensor& sum_) {
  check_query_key_and_value(query_, key_, value_);
  check("grad_out", grad_out_, query_, shape_of(value_));
  check("out", out_, query_, shape_of(value_));
  const OnDeviceOf device(query_);
  Tensor delta = empty_per_pixel(query_);
  check("largest", largest_, delta, shape_of(delta));
  check("sum", sum_, delta, shape_of(delta));
  const Tensor query = in_channels_last(query_), key = in_channels_last(key_), value = in_channels_last(value_);
  const Tensor out = in_channels_last(out_), grad_out = in_channels_last(grad_out_);
  const Tensor largest = torch::stable::contiguous(largest_), sum = torch::stable::contiguous(sum_);
  Tensor grad_query = empty_channels_last(query, shape_of(query)), grad_key = empty_channels_last(key, shape_of(key));
  Tensor grad_value = empty_channels_last(value, shape_of(value));
  run_for_type("criss_cross_attention_backward", query, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    return Launchers<T>::attention_backward(axes_of(query), read<T>(query), read<T>(key), read<T>(value), read<T>(out),
                                            read<T>(grad_out), read_path<T>(largest, sum), numbers<T>(delta),
                                            write<T>(grad_query), write<T>(grad_key), write<T>(grad_value),
                                            device.stream());
  });
  return {in_format_of(query_, grad_query), in_format_of(key_, grad_key), in_format_of(value_, grad_value)};
}

Tensor ca_weight(const Tensor& query_, const Tensor& key_) {
  check_query_and_key(query_, key_, false);
  const OnDeviceOf device(query_);
  const Tensor query = in_channels_last(query_), key = in_channels_last(key_);
  Tensor energy = empty_channels_last(query, path_shape(query));
  run_for_type("ca_weight", query, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    return Launchers<T>::energy(axes_of(query), read<T>(query), read<T>(key), write<T>(energy), device.stream());
  });
  return in_format_of(query_, energy);
}

std::tuple<Tensor, Tensor> ca_weight_backward(const Tensor& grad_energy_, const Tensor& query_, const Tensor& key_) {
  check_query_and_key(query_, key_, false);
  check("grad_energy", grad_energy_, query_, path_shape(query_));
  const OnDeviceOf device(query_);
  const Tensor query = in_channels_last(query_), key = in_channels_last(key_);
  const Tensor grad_energy = in_channels_last(grad_energy_);
  Tensor grad_query = empty_channels_last(query, shape_of(query)), grad_key = empty_channels_last(key, shape_of(key));
  run_for_type("ca_weight_backward", query, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    return Launchers<T>::energy_backward(axes_of(query), read<T>(query), read<T>(key), read<T>(grad_energy),
                                         write<T>(grad_query), write<T>(grad_key), device.stream());
  });
  return {in_format_of(query_, grad_query), in_format_of(key_, grad_key)};
}

Tensor ca_map(const Tensor& weight_, const Tensor& value_) {
  check_dimensions("value", value_, false);
  check("weight", weight_, value_, path_shape(value_));
  const OnDeviceOf device(value_);
  const Tensor weight = in_channels_last(weight_), value = in_channels_last(value_);
  Tensor out = empty_channels_last(value, shape_of(value));
  run_for_type("ca_map", value, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    return Launchers<T>::map(axes_of(value), read<T>(weight), read<T>(value), write<T>(out), device.stream());
  });
  return in_format_of(value_, out);
}

std::tuple<Tensor, Tensor> ca_map_backward(const Tensor& grad_out_, const Tensor& weight_, const Tensor& value_) {
  check_dimensions("value", value_, false);
  check("weight", weight_, value_, path_shape(value_));
  check("grad_out", grad_out_, value_, shape_of(value_));
  const OnDeviceOf device(value_);
  const Tensor weight = in_channels_last(weight_), value = in_channels_last(value_);
  const Tensor grad_out = in_channels_last(grad_out_);
  Tensor grad_weight = empty_channels_last(value, path_shape(value));
  Tensor grad_value = empty_channels_last(value, shape_of(value));
  run_for_type("ca_map_backward", value, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    return Launchers<T>::map_backward(axes_of(value), read<T>(weight), read<T>(value), read<T>(grad_out),
                                      write<T>(grad_weight), write<T>(grad_value), device.stream());
  });
  return {in_format_of(weight_, grad_weight), in_format_of(value_, grad_value)};
}

}  // namespace
}  // namespace ccnet

STABLE_TORCH_LIBRARY_IMPL(CCNET_CUDA_LIBRARY, CCNET_CUDA_KEY, m) {
  m.impl("criss_cross_attention", TORCH_BOX(&ccnet::criss_cross_attention));
  m.impl("criss_cross_attention_backward", TORCH_BOX(&ccnet::criss_cross_attention_backward));
  m.impl("ca_weight", TORCH_BOX(&ccnet::ca_weight));
  m.impl("ca_weight_backward", TORCH_BOX(&ccnet::ca_weight_backward));
  m.impl("ca_map", TORCH_BOX(&ccnet::ca_map));
  m.impl("ca_map_backward", TORCH_BOX(&ccnet::ca_map_backward));
}
