// The criss-cross attention operators on the GPU: each runs its kernel (line.h) over all rows, then all columns (then
// all lines along depth). No two blocks of a launch write to the same place, so results are the same in every run.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/MemoryFormat.h>

#include <limits>
#include <optional>
#include <tuple>
#include <type_traits>

#include "cc_attention/csrc/criss_cross.h"
#include "cc_attention/csrc/cuda/change_layout.h"
#include "cc_attention/csrc/cuda/line.h"
#include "libs/csrc/cuda/operators.h"

namespace ccnet {
namespace {

MemoryFormat channels_last_format(const Tensor& x) {
  return x.dim() == 5 ? MemoryFormat::ChannelsLast3d : MemoryFormat::ChannelsLast;
}
// Uninitialised, of that shape and otherwise as `like`
Tensor empty_as(const Tensor& like, const Shape& shape, MemoryFormat format) {
  return torch::stable::empty(shape, like.scalar_type(), std::nullopt, like.device(), std::nullopt, format);
}
Tensor empty_channels_last(const Tensor& like, int64_t channels) {
  return empty_as(like, shape_with(like, channels), channels_last_format(like));
}

// ---- layouts: the kernels' tensors are channels_last, and those that they move in packs of 16 bytes are whole ones ----

Layout layout_of(const Tensor& x) {
  return is_channels_last(x) ? channels_last_layout(x.size(1)) : planes_layout(x.size(1), pixels_of(x));
}
void copy(const Tensor& from, const Tensor& to, cudaStream_t stream) {
  const cudaError_t error =
      change_layout(static_cast<int>(from.element_size()), from.size(0), pixels_of(from), from.const_data_ptr(),
                    layout_of(from), to.mutable_data_ptr(), layout_of(to), stream);
  STD_TORCH_CHECK(error == cudaSuccess, "criss-cross attention: ", text_of(error));
}
int64_t whole_packs(const Tensor& x) {
  return round_up(static_cast<int>(x.size(1)), 16 / static_cast<int>(x.element_size()));
}

// A copy in channels_last, with that many channels
Tensor copied(const Tensor& x, int64_t channels, cudaStream_t stream) {
  const Tensor result = empty_channels_last(x, channels);
  copy(is_channels_last(x) || x.is_contiguous() ? x : torch::stable::contiguous(x), result, stream);
  return result;
}
Tensor in_channels_last(const Tensor& x, cudaStream_t stream) {
  return is_channels_last(x) ? x : copied(x, x.size(1), stream);
}
// With as many channels more as make whole packs. They are 0, which changes no other result.
Tensor in_packs(const Tensor& x, cudaStream_t stream) {
  const bool is_whole = whole_packs(x) == x.size(1) && reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0;
  return is_channels_last(x) && is_whole ? x : copied(x, whole_packs(x), stream);
}
// Uninitialised, for what has the shape of x
Tensor empty_packs(const Tensor& x) { return empty_channels_last(x, whole_packs(x)); }

// A result that was made in channels_last, perhaps in packs, in the shape and format of `like`
Tensor in_format_of(const Tensor& like, const Shape& shape, const Tensor& result, cudaStream_t stream) {
  const MemoryFormat format = format_of(like);
  if (format != MemoryFormat::Contiguous && shape[1] == result.size(1)) {
    return result;
  }
  Tensor to = empty_as(like, shape, format);
  copy(result, to, stream);
  return to;
}
Tensor in_format_of(const Tensor& like, const Tensor& result, cudaStream_t stream) {
  return in_format_of(like, shape_of(like), result, stream);
}

template <class T>
Pixels<const T> read(const Tensor& x) {
  return {static_cast<const T*>(x.const_data_ptr()), static_cast<int>(x.size(1))};
}
template <class T>
Pixels<T> write(const Tensor& x) {
  return {static_cast<T*>(x.mutable_data_ptr()), static_cast<int>(x.size(1))};
}
// Numbers of the type that sums are made in
template <class T>
Accumulate<T>* numbers(const Tensor& x) {
  return static_cast<Accumulate<T>*>(x.mutable_data_ptr());
}
template <class T>
const Accumulate<T>* read_numbers(const std::optional<Tensor>& x) {
  return x ? static_cast<const Accumulate<T>*>(x->const_data_ptr()) : nullptr;
}

// The axes of x: its rows, columns, and lines along depth
Axes axes_of(const Tensor& x, bool allow_tf32) {
  Axes axes{};
  axes.allow_tf32 = allow_tf32;
  axes.images = x.size(0);
  axes.pixels = pixels_of(x);
  int64_t path = 0;
  for (int64_t d = x.dim() - 1, step = 1; d >= 2; step *= x.size(d--)) {
    const int64_t length = x.size(d);
    STD_TORCH_CHECK(length <= std::numeric_limits<int>::max() / 4, "expected sides of less than 2^29 pixels");
    STD_TORCH_CHECK(step <= std::numeric_limits<int>::max(), "expected planes of less than 2^31 pixels");
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
                                                         const Tensor& value_, std::optional<Tensor> residual_,
                                                         std::optional<Tensor> gamma, bool allow_tf32) {
  check_query_key_and_value(query_, key_, value_);
  Tensor largest = empty_per_pixel(query_), sum = empty_per_pixel(query_);
  check_residual(residual_, gamma, value_, largest);
  const OnDeviceOf device(query_);
  const cudaStream_t stream = device.stream();
  const Tensor query = in_packs(query_, stream), key = in_packs(key_, stream), value = in_packs(value_, stream);
  const std::optional<Tensor> residual = residual_ ? std::optional(in_packs(*residual_, stream)) : std::nullopt;
  const Tensor out = empty_packs(value_);
  // Not both of the whole path: an axis reads one while it writes the other.
  const Tensor other_largest = empty_per_pixel(query_), other_sum = empty_per_pixel(query_);
  run_for_type("criss_cross_attention", query, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    return Launchers<T>::attention(axes_of(query, allow_tf32), read<T>(query), read<T>(key), read<T>(value),
                                   residual ? read<T>(*residual).data : nullptr, read_numbers<T>(gamma), write<T>(out),
                                   {numbers<T>(largest), numbers<T>(sum)},
                                   {numbers<T>(other_largest), numbers<T>(other_sum)}, stream);
  });
  return {in_format_of(value_, out, stream), largest, sum};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> criss_cross_attention_backward(
    const Tensor& grad_out_, const Tensor& query_, const Tensor& key_, const Tensor& value_, const Tensor& largest_,
    const Tensor& sum_, std::optional<Tensor> gamma, bool allow_tf32) {
  check_query_key_and_value(query_, key_, value_);
  check("grad_out", grad_out_, query_, shape_of(value_));
  Tensor delta = empty_per_pixel(query_);
  check("largest", largest_, delta, shape_of(delta));
  check("sum", sum_, delta, shape_of(delta));
  check_gamma(gamma, delta);
  const OnDeviceOf device(query_);
  const cudaStream_t stream = device.stream();
  const Tensor query = in_packs(query_, stream), key = in_packs(key_, stream), value = in_packs(value_, stream);
  const Tensor grad_out = in_packs(grad_out_, stream);
  const Tensor largest = torch::stable::contiguous(largest_), sum = torch::stable::contiguous(sum_);
  const Tensor grad_query = empty_packs(query_), grad_key = empty_packs(key_), grad_value = empty_packs(value_);
  const Axes axes = axes_of(query, allow_tf32);
  run_for_type("criss_cross_attention_backward", query, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    GradScratchSize size;
    const cudaError_t error =
        Launchers<T>::scratch_size(axes, read<T>(query).channels, read<T>(value).channels, size);
    if (error != cudaSuccess) {
      return error;
    }
    const Tensor products = torch::stable::new_empty(delta, {size.products});
    const Tensor parts = torch::stable::new_empty(delta, {size.slots * size.images * axes.pixels});
    return Launchers<T>::attention_backward(axes, read<T>(query), read<T>(key), read<T>(value), read<T>(grad_out),
                                            {read_numbers<T>(largest), read_numbers<T>(sum)}, read_numbers<T>(gamma),
                                            {size, numbers<T>(products), numbers<T>(parts)}, numbers<T>(delta),
                                            write<T>(grad_query), write<T>(grad_key), write<T>(grad_value), stream);
  });
  return {in_format_of(query_, grad_query, stream), in_format_of(key_, grad_key, stream),
          in_format_of(value_, grad_value, stream), delta};
}

Tensor ca_weight(const Tensor& query_, const Tensor& key_, bool allow_tf32) {
  check_query_and_key(query_, key_, false);
  const OnDeviceOf device(query_);
  const cudaStream_t stream = device.stream();
  const Tensor query = in_packs(query_, stream), key = in_packs(key_, stream);
  Tensor energy = empty_channels_last(query, path_shape(query)[1]);
  run_for_type("ca_weight", query, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    return Launchers<T>::energy(axes_of(query, allow_tf32), read<T>(query), read<T>(key), write<T>(energy), stream);
  });
  return in_format_of(query_, path_shape(query_), energy, stream);
}

std::tuple<Tensor, Tensor> ca_weight_backward(const Tensor& grad_energy_, const Tensor& query_, const Tensor& key_,
                                              bool allow_tf32) {
  check_query_and_key(query_, key_, false);
  check("grad_energy", grad_energy_, query_, path_shape(query_));
  const OnDeviceOf device(query_);
  const cudaStream_t stream = device.stream();
  const Tensor query = in_packs(query_, stream), key = in_packs(key_, stream);
  const Tensor grad_energy = in_channels_last(grad_energy_, stream);
  const Tensor grad_query = empty_packs(query_), grad_key = empty_packs(key_);
  run_for_type("ca_weight_backward", query, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    return Launchers<T>::energy_backward(axes_of(query, allow_tf32), read<T>(query), read<T>(key), read<T>(grad_energy),
                                         write<T>(grad_query), write<T>(grad_key), stream);
  });
  return {in_format_of(query_, grad_query, stream), in_format_of(key_, grad_key, stream)};
}

Tensor ca_map(const Tensor& weight_, const Tensor& value_, bool allow_tf32) {
  check_dimensions("value", value_, false);
  check("weight", weight_, value_, path_shape(value_));
  const OnDeviceOf device(value_);
  const cudaStream_t stream = device.stream();
  const Tensor weight = in_channels_last(weight_, stream), value = in_packs(value_, stream);
  const Tensor out = empty_packs(value_);
  run_for_type("ca_map", value, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    return Launchers<T>::map(axes_of(value, allow_tf32), read<T>(weight), read<T>(value), write<T>(out), stream);
  });
  return in_format_of(value_, out, stream);
}

std::tuple<Tensor, Tensor> ca_map_backward(const Tensor& grad_out_, const Tensor& weight_, const Tensor& value_,
                                           bool allow_tf32) {
  check_dimensions("value", value_, false);
  check("weight", weight_, value_, path_shape(value_));
  check("grad_out", grad_out_, value_, shape_of(value_));
  const OnDeviceOf device(value_);
  const cudaStream_t stream = device.stream();
  const Tensor weight = in_channels_last(weight_, stream), value = in_packs(value_, stream);
  const Tensor grad_out = in_packs(grad_out_, stream);
  const Tensor grad_weight = empty_channels_last(value, path_shape(value)[1]);
  const Tensor grad_value = empty_packs(value_);
  run_for_type("ca_map_backward", value, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    return Launchers<T>::map_backward(axes_of(value, allow_tf32), read<T>(weight), read<T>(value), read<T>(grad_out),
                                      write<T>(grad_weight), write<T>(grad_value), stream);
  });
  return {in_format_of(weight_, grad_weight, stream), in_format_of(value_, grad_value, stream)};
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
