// The criss-cross attention operators on the CPU: checks, memory, and which kernel runs along the lines (each_line.h).
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>
#include <type_traits>

#include "cc_attention/csrc/cpu/each_line.h"
#include "cc_attention/csrc/cpu/line.h"
#include "cc_attention/csrc/cpu/planes.h"
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
  const int64_t bytes = x.numel() * x.element_size();
  prefer_huge_pages(x.mutable_data_ptr(), bytes);
  show_if_read(x.mutable_data_ptr(), bytes);
  return x;
}

// ---- tensors in NCHW ----

// Working memory for a tensor like x, which this thread keeps
void* working_memory(const Tensor& x, Kept what) {
  const int64_t bytes = x.numel() * x.element_size();
  void* memory = thread_block(what, bytes);
  STD_TORCH_CHECK(memory != nullptr || bytes == 0, "criss-cross attention: no memory for a copy in channels_last");
  show_if_read(memory, bytes);
  return memory;
}

// What makes a result. One in NCHW is made in channels_last, in working memory, and transposed by finish(); until then
// its own memory is spare.
class Output {
 public:
  Output(const Tensor& result, Kept what)
      : result_(result),
        in_place_(is_channels_last(result)),
        data_(in_place_ ? result.mutable_data_ptr() : working_memory(result, what)) {}

  template <class T>
  Images<T> images(bool path = false) const {
    return {static_cast<T*>(data_), nullptr, result_.size(1), path};
  }
  template <class T>
  Images<T> path() const {  // energies or weights
    return images<T>(true);
  }
  template <class T>
  void finish() const {
    if (!in_place_ && result_.numel() > 0) {
      const int64_t n = result_.size(0), channels = result_.size(1);
      to_planes(static_cast<const T*>(data_), n, channels, result_.numel() / n / channels,
                static_cast<T*>(result_.mutable_data_ptr()));
    }
  }
  void* spare() const { return in_place_ ? nullptr : result_.mutable_data_ptr(); }

 private:
  Tensor result_;
  bool in_place_;
  void* data_;
};

// An input that all axes read. One in NCHW is copied to channels_last, into what the result of its shape has to spare or
// into working memory.
class Input {
 public:
  Input(const Tensor& x, Kept what, void* spare = nullptr) : x_(dense(x)), in_place_(is_channels_last(x_)), copy_(spare) {
    if (!in_place_ && spare == nullptr) {
      copy_ = working_memory(x_, what);
    }
  }

  template <class T>
  Images<T> images() const {
    auto* data = static_cast<T*>(const_cast<void*>(x_.const_data_ptr()));
    return in_place_ ? Images<T>{data, nullptr, x_.size(1)} : Images<T>{static_cast<T*>(copy_), data, x_.size(1)};
  }
  // After all axes have read it
  template <class T>
  Images<T> images_again() const {
    const Images<T> x = images<T>();
    return {x.data, nullptr, x.channels};
  }

 private:
  Tensor x_;
  bool in_place_;
  void* copy_;
};

// An input of which there is to be no copy
template <class T>
Images<T> by_lines(const Tensor& x, bool path = false) {
  auto* data = static_cast<T*>(const_cast<void*>(x.const_data_ptr()));
  return is_channels_last(x) ? Images<T>{data, nullptr, x.size(1), path} : Images<T>{nullptr, data, x.size(1), path};
}
template <class T>
Images<T> path_by_lines(const Tensor& x) {
  return by_lines<T>(x, true);
}
template <class T>
Images<T> on_last_axis(const Tensor& x) {
  Images<T> images = by_lines<T>(x);
  images.last_axis_only = true;
  return images;
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

// dP of all axes but the last, a row for each pixel
template <class Real>
class Products {
 public:
  explicit Products(const Tensor& x) {
    int64_t axes = 0;
    for (int64_t d = x.dim() - 1; d > 2; --d, ++axes) {
      begin_[axes + 1] = begin_[axes] + x.size(0) * pixels_of(x) * row(x.size(d));
    }
    const int64_t bytes = begin_[axes] * static_cast<int64_t>(sizeof(Real));
    data_ = reinterpret_cast<Real*>(thread_block(Kept::products, bytes));
    STD_TORCH_CHECK(data_ != nullptr || bytes == 0, "criss-cross attention: no memory for the backward pass");
    show_if_read(data_, bytes);
  }
  Along<Real> along(const Line& line, int64_t u) const {
    return {data_ + begin_[line.first_axis ? 0 : 1] + u * row(line.length), line.step * row(line.length), 0};
  }

 private:
  static int64_t row(int64_t length) { return (length + 15) / 16 * 16; }  // whole vectors
  int64_t begin_[3] = {0, 0, 0};
  Real* data_;
};

// ---- the operators: their last argument, allow_tf32, is for GPUs ----

template <class T>
Accumulate<T> number_of(const std::optional<Tensor>& gamma) {
  return gamma ? *read_numbers<T>(*gamma) : 1;
}

std::tuple<Tensor, Tensor, Tensor> criss_cross_attention(const Tensor& query_, const Tensor& key_, const Tensor& value_,
                                                         std::optional<Tensor> residual_, std::optional<Tensor> gamma,
                                                         bool) {
  check_query_key_and_value(query_, key_, value_);
  Tensor result = empty_as(value_, shape_of(value_)), largest = empty_per_pixel(query_), sum = empty_per_pixel(query_);
  check_residual(residual_, gamma, value_, largest);
  const Output out(result, Kept::value);
  const Input query(query_, Kept::query), key(key_, Kept::key), value(value_, Kept::value, out.spare());
  const Tensor residual = residual_ ? dense(*residual_) : result;
  for_type("query", query_, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const PathSum<Accumulate<T>> path{write_numbers<T>(largest), write_numbers<T>(sum)};
    const Images<T> none{nullptr, nullptr, 0};
    const std::array images{query.images<T>(), key.images<T>(), value.images<T>(), out.images<T>(),
                            residual_ ? on_last_axis<T>(residual) : none};
    const Accumulate<T> factor = number_of<T>(gamma);
    each_line<T>(query_, query_.size(1), value_.size(1), images,
                 [=](const auto& kernels, const Line& line, const auto& x, int64_t u, char* scratch) {
                   kernels.attention(line, x[0], x[1], x[2], x[4], factor, x[3], path.from(u), scratch);
                 });
    out.finish<T>();
  });
  return {result, largest, sum};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> criss_cross_attention_backward(
    const Tensor& grad_out_, const Tensor& query_, const Tensor& key_, const Tensor& value_, const Tensor& largest_,
    const Tensor& sum_, std::optional<Tensor> gamma, bool) {
  check_query_key_and_value(query_, key_, value_);
  check("grad_out", grad_out_, query_, shape_of(value_));
  Tensor delta = empty_per_pixel(query_);
  check("largest", largest_, delta, shape_of(delta));
  check("sum", sum_, delta, shape_of(delta));
  check_gamma(gamma, delta);
  Tensor query_result = empty_as(query_, shape_of(query_)), key_result = empty_as(key_, shape_of(key_));
  Tensor value_result = empty_as(value_, shape_of(value_));
  const Output grad_query(query_result, Kept::query), grad_key(key_result, Kept::key);
  const Output grad_value(value_result, Kept::value);
  const Input query(query_, Kept::query, grad_query.spare()), key(key_, Kept::key, grad_key.spare());
  const Input value(value_, Kept::value, grad_value.spare());
  const Tensor grad_out = dense(grad_out_);
  const Tensor largest = torch::stable::contiguous(largest_), sum = torch::stable::contiguous(sum_);
  for_type("query", query_, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const PathSum<const Accumulate<T>> path{read_numbers<T>(largest), read_numbers<T>(sum)};
    Accumulate<T>* const d = write_numbers<T>(delta);
    const Products<Accumulate<T>> products(query_);
    const Accumulate<T> factor = number_of<T>(gamma);
    const std::array images{query.images<T>(),      key.images<T>(),      value.images<T>(),     by_lines<T>(grad_out),
                            grad_query.images<T>(), grad_key.images<T>(), grad_value.images<T>()};
    each_line<T>(query_, query_.size(1), value_.size(1), images,
                 [=](const auto& kernels, const Line& line, const auto& x, int64_t u, char* scratch) {
                   kernels.value_gradients(line, x[0], x[1], x[2], x[3], path.from(u), factor, products.along(line, u),
                                           d + u, x[4], x[5], x[6], scratch);
                 });
    const std::array again{query.images_again<T>(), key.images_again<T>(), grad_query.images<T>(),
                           grad_key.images<T>()};
    each_line<T>(
        query_, query_.size(1), 0, again,
        [=](const auto& kernels, const Line& line, const auto& x, int64_t u, char* scratch) {
          kernels.query_key_gradients(line, x[0], x[1], path.from(u), factor, products.along(line, u), d + u, x[2],
                                      x[3], scratch);
        },
        Which::all_but_the_last);
    grad_query.finish<T>();
    grad_key.finish<T>();
    grad_value.finish<T>();
  });
  return {query_result, key_result, value_result, delta};
}

Tensor ca_weight(const Tensor& query_, const Tensor& key_, bool) {
  check_query_and_key(query_, key_, false);
  Tensor result = empty_as(query_, path_shape(query_));
  const Output energy(result, Kept::path);
  const Input query(query_, Kept::query), key(key_, Kept::key);
  for_type("query", query_, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const std::array images{query.images<T>(), key.images<T>(), energy.path<T>()};
    each_line<T>(query_, query_.size(1), 0, images,
                 [=](const auto& kernels, const Line& line, const auto& x, int64_t, char* scratch) {
                   kernels.energy(line, x[0], x[1], x[2], scratch);
                 });
    energy.finish<T>();
  });
  return result;
}

std::tuple<Tensor, Tensor> ca_weight_backward(const Tensor& grad_energy_, const Tensor& query_, const Tensor& key_,
                                              bool) {
  check_query_and_key(query_, key_, false);
  check("grad_energy", grad_energy_, query_, path_shape(query_));
  Tensor query_result = empty_as(query_, shape_of(query_)), key_result = empty_as(key_, shape_of(key_));
  const Output grad_query(query_result, Kept::query), grad_key(key_result, Kept::key);
  const Input query(query_, Kept::query, grad_query.spare()), key(key_, Kept::key, grad_key.spare());
  const Tensor grad_energy = dense(grad_energy_);
  for_type("query", query_, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const std::array images{query.images<T>(), key.images<T>(), path_by_lines<T>(grad_energy), grad_query.images<T>(),
                            grad_key.images<T>()};
    each_line<T>(query_, query_.size(1), 0, images,
                 [=](const auto& kernels, const Line& line, const auto& x, int64_t, char* scratch) {
                   kernels.energy_backward(line, x[0], x[1], x[2], x[3], x[4], scratch);
                 });
    grad_query.finish<T>();
    grad_key.finish<T>();
  });
  return {query_result, key_result};
}

Tensor ca_map(const Tensor& weight_, const Tensor& value_, bool) {
  check_dimensions("value", value_, false);
  check("weight", weight_, value_, path_shape(value_));
  Tensor result = empty_as(value_, shape_of(value_));
  const Output out(result, Kept::value);
  const Input value(value_, Kept::value, out.spare());
  const Tensor weight = dense(weight_);
  for_type("value", value_, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const std::array images{path_by_lines<T>(weight), value.images<T>(), out.images<T>()};
    each_line<T>(value_, 0, value_.size(1), images,
                 [=](const auto& kernels, const Line& line, const auto& x, int64_t, char* scratch) {
                   kernels.map(line, x[0], x[1], x[2], scratch);
                 });
    out.finish<T>();
  });
  return result;
}

std::tuple<Tensor, Tensor> ca_map_backward(const Tensor& grad_out_, const Tensor& weight_, const Tensor& value_,
                                           bool) {
  check_dimensions("value", value_, false);
  check("weight", weight_, value_, path_shape(value_));
  check("grad_out", grad_out_, value_, shape_of(value_));
  Tensor weight_result = empty_as(weight_, path_shape(value_)), value_result = empty_as(value_, shape_of(value_));
  const Output grad_weight(weight_result, Kept::path), grad_value(value_result, Kept::value);
  const Input value(value_, Kept::value, grad_value.spare());
  const Tensor weight = dense(weight_), grad_out = dense(grad_out_);
  for_type("value", value_, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const std::array images{path_by_lines<T>(weight), value.images<T>(), by_lines<T>(grad_out), grad_weight.path<T>(),
                            grad_value.images<T>()};
    each_line<T>(value_, 0, value_.size(1), images,
                 [=](const auto& kernels, const Line& line, const auto& x, int64_t, char* scratch) {
                   kernels.map_backward(line, x[0], x[1], x[2], x[3], x[4], scratch);
                 });
    grad_weight.finish<T>();
    grad_value.finish<T>();
  });
  return {weight_result, value_result};
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
