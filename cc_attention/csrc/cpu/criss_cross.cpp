// The criss-cross attention operators on the CPU: checks, memory, and which kernel runs along the lines (each_line.h).
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <tuple>
#include <type_traits>

#include "cc_attention/csrc/cpu/each_line.h"
#include "cc_attention/csrc/cpu/line.h"
#include "cc_attention/csrc/criss_cross.h"
#include "libs/csrc/cpu/dtype.h"
#include "libs/csrc/cpu/memory.h"

namespace ccnet {
namespace {

// x, or a copy of it in a memory format of its own
Tensor dense(const Tensor& x) { return x.is_contiguous() || is_channels_last(x) ? x : torch::stable::contiguous(x, format_of(x)); }

// Uninitialised, of that shape, and otherwise as `like`
Tensor empty_as(const Tensor& like, const Shape& shape) {
  Tensor x = torch::stable::empty(shape, like.scalar_type(), std::nullopt, like.device(), std::nullopt, format_of(like));
  prefer_huge_pages(x.mutable_data_ptr(), x.numel() * x.element_size());
  return x;
}

template <class T>
Images<T> images_of(const Tensor& x, void* data, Access access, bool path = false) {
  return {static_cast<T*>(data), x.size(1), !is_channels_last(x), path, access};
}
template <class T>
Images<T> read(const Tensor& x, Access access = Access::read) {
  return images_of<T>(x, const_cast<void*>(x.const_data_ptr()), access);
}
template <class T>
Images<T> merge(const Tensor& x) {
  return images_of<T>(x, x.mutable_data_ptr(), Access::merge);
}
// Energies or weights
template <class T>
Images<T> read_path(const Tensor& x) {
  return images_of<T>(x, const_cast<void*>(x.const_data_ptr()), Access::read, true);
}
template <class T>
Images<T> write_path(const Tensor& x) {
  return images_of<T>(x, x.mutable_data_ptr(), Access::write, true);
}
// The numbers of empty_per_pixel
template <class T>
const Accumulate<T>* read_numbers(const Tensor& x) {
  return static_cast<const Accumulate<T>*>(x.const_data_ptr());
}
template <class T>
Accumulate<T>* write_numbers(const Tensor& x) {
  return static_cast<Accumulate<T>*>(x.mutable_data_ptr());
}

// ---- the operators ----

std::tuple<Tensor, Tensor, Tensor> criss_cross_attention(const Tensor& query_, const Tensor& key_, const Tensor& value_) {
  check_query_key_and_value(query_, key_, value_);
  const Tensor query = dense(query_), key = dense(key_), value = dense(value_);
  Tensor out = empty_as(value_, shape_of(value));
  Tensor largest = empty_per_pixel(query), sum = empty_per_pixel(query);
  for_type("query", query, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const PathSum<Accumulate<T>> path{write_numbers<T>(largest), write_numbers<T>(sum)};
    const std::array images{read<T>(query), read<T>(key), read<T>(value), merge<T>(out)};
    each_line<T>(query, query.size(1), value.size(1), images,
                 [=](const auto& kernels, const Line& line, const auto& x, int64_t u, char* scratch) {
                   kernels.attention(line, x[0], x[1], x[2], x[3], path.from(u), scratch);
                 });
  });
  return {out, largest, sum};
}

std::tuple<Tensor, Tensor, Tensor> criss_cross_attention_backward(const Tensor& grad_out_, const Tensor& query_,
                                                                  const Tensor& key_, const Tensor& value_,
                                                                  const Tensor& out_, const Tensor& largest_,
                                                                  const Tensor& sum_) {
  check_query_key_and_value(query_, key_, value_);
  check("grad_out", grad_out_, query_, shape_of(value_));
  check("out", out_, query_, shape_of(value_));
  Tensor delta = empty_per_pixel(query_);
  check("largest", largest_, delta, shape_of(delta));
  check("sum", sum_, delta, shape_of(delta));
  const Tensor query = dense(query_), key = dense(key_), value = dense(value_);
  const Tensor out = dense(out_), grad_out = dense(grad_out_);
  const Tensor largest = torch::stable::contiguous(largest_), sum = torch::stable::contiguous(sum_);
  Tensor grad_query = empty_as(query_, shape_of(query)), grad_key = empty_as(key_, shape_of(key));
  Tensor grad_value = empty_as(value_, shape_of(value));
  for_type("query", query, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const PathSum<const Accumulate<T>> path{read_numbers<T>(largest), read_numbers<T>(sum)};
    Accumulate<T>* d = write_numbers<T>(delta);
    const std::array images{read<T>(query),
                            read<T>(key),
                            read<T>(value),
                            read<T>(out, Access::read_on_first_axis),
                            read<T>(grad_out),
                            merge<T>(grad_query),
                            merge<T>(grad_key),
                            merge<T>(grad_value)};
    each_line<T>(query, query.size(1), value.size(1), images,
                 [=](const auto& kernels, const Line& line, const auto& x, int64_t u, char* scratch) {
                   kernels.attention_backward(line, x[0], x[1], x[2], x[3], x[4], path.from(u), d + u, x[5], x[6], x[7],
                                              scratch);
                 });
  });
  return {grad_query, grad_key, grad_value};
}

Tensor ca_weight(const Tensor& query_, const Tensor& key_) {
  check_query_and_key(query_, key_, false);
  const Tensor query = dense(query_), key = dense(key_);
  Tensor energy = empty_as(query_, path_shape(query));
  for_type("query", query, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const std::array images{read<T>(query), read<T>(key), write_path<T>(energy)};
    each_line<T>(query, query.size(1), 0, images,
                 [=](const auto& kernels, const Line& line, const auto& x, int64_t, char* scratch) {
                   kernels.energy(line, x[0], x[1], x[2], scratch);
                 });
  });
  return energy;
}

std::tuple<Tensor, Tensor> ca_weight_backward(const Tensor& grad_energy_, const Tensor& query_, const Tensor& key_) {
  check_query_and_key(query_, key_, false);
  check("grad_energy", grad_energy_, query_, path_shape(query_));
  const Tensor query = dense(query_), key = dense(key_), grad_energy = dense(grad_energy_);
  Tensor grad_query = empty_as(query_, shape_of(query)), grad_key = empty_as(key_, shape_of(key));
  for_type("query", query, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const std::array images{read<T>(query), read<T>(key), read_path<T>(grad_energy), merge<T>(grad_query),
                            merge<T>(grad_key)};
    each_line<T>(query, query.size(1), 0, images,
                 [=](const auto& kernels, const Line& line, const auto& x, int64_t, char* scratch) {
                   kernels.energy_backward(line, x[0], x[1], x[2], x[3], x[4], scratch);
                 });
  });
  return {grad_query, grad_key};
}

Tensor ca_map(const Tensor& weight_, const Tensor& value_) {
  check_dimensions("value", value_, false);
  check("weight", weight_, value_, path_shape(value_));
  const Tensor weight = dense(weight_), value = dense(value_);
  Tensor out = empty_as(value_, shape_of(value));
  for_type("value", value, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const std::array images{read_path<T>(weight), read<T>(value), merge<T>(out)};
    each_line<T>(value, 0, value.size(1), images,
                 [=](const auto& kernels, const Line& line, const auto& x, int64_t, char* scratch) {
                   kernels.map(line, x[0], x[1], x[2], scratch);
                 });
  });
  return out;
}

std::tuple<Tensor, Tensor> ca_map_backward(const Tensor& grad_out_, const Tensor& weight_, const Tensor& value_) {
  check_dimensions("value", value_, false);
  check("weight", weight_, value_, path_shape(value_));
  check("grad_out", grad_out_, value_, shape_of(value_));
  const Tensor weight = dense(weight_), value = dense(value_), grad_out = dense(grad_out_);
  Tensor grad_weight = empty_as(weight_, path_shape(value)), grad_value = empty_as(value_, shape_of(value));
  for_type("value", value, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const std::array images{read_path<T>(weight), read<T>(value), read<T>(grad_out), write_path<T>(grad_weight),
                            merge<T>(grad_value)};
    each_line<T>(value, 0, value.size(1), images,
                 [=](const auto& kernels, const Line& line, const auto& x, int64_t, char* scratch) {
                   kernels.map_backward(line, x[0], x[1], x[2], x[3], x[4], scratch);
                 });
  });
  return {grad_weight, grad_value};
}

}  // namespace
}  // namespace ccnet

STABLE_TORCH_LIBRARY_IMPL(ccnet, CPU, m) {
  m.impl("criss_cross_attention", TORCH_BOX(&ccnet::criss_cross_attention));
  m.impl("criss_cross_attention_backward", TORCH_BOX(&ccnet::criss_cross_attention_backward));
  m.impl("ca_weight", TORCH_BOX(&ccnet::ca_weight));
  m.impl("ca_weight_backward", TORCH_BOX(&ccnet::ca_weight_backward));
  m.impl("ca_map", TORCH_BOX(&ccnet::ca_map));
  m.impl("ca_map_backward", TORCH_BOX(&ccnet::ca_map_backward));
}
