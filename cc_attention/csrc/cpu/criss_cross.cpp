// The criss-cross attention operators on the CPU: each runs its line kernel (line.h) over every row, then every column
// (then every line along depth), the lines of an axis shared out among threads. No two lines of an axis write to the
// same pixel, so the result does not depend on how many threads there are.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <atomic>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "cc_attention/csrc/cpu/channels_last.h"
#include "cc_attention/csrc/cpu/line.h"
#include "libs/csrc/cpu/dtype.h"
#include "libs/csrc/cpu/memory.h"

namespace ccnet {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

std::string shape_of(const Tensor& x) {
  std::string text = "[";
  for (int64_t d = 0; d < x.dim(); ++d) {
    text += (d > 0 ? ", " : "") + std::to_string(x.size(d));
  }
  return text + "]";
}

// Users meet the checks of functional.py, which know more; these keep a direct call from reading beyond a tensor.
void check(const char* name, const Tensor& x, const Tensor& like, std::vector<int64_t> shape) {
  bool fits = x.dim() == static_cast<int64_t>(shape.size()) && x.is_cpu();
  for (size_t d = 0; fits && d < shape.size(); ++d) {
    fits = x.size(d) == shape[d];
  }
  std::string expected;
  for (int64_t size : shape) {
    expected += (expected.empty() ? "" : ", ") + std::to_string(size);
  }
  STD_TORCH_CHECK(fits, name, ": expected shape [", expected, "] on the CPU, got ", shape_of(x));
  STD_TORCH_CHECK(x.scalar_type() == like.scalar_type(), name, ": expected the first tensor's dtype");
}

// [N, C, (D,) H, W] with `channels` for C
std::vector<int64_t> shape_with(const Tensor& x, int64_t channels) {
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape[1] = channels;
  return shape;
}

void check_dimensions(const char* name, const Tensor& x, bool may_be_3d) {
  STD_TORCH_CHECK(x.dim() == 4 || (may_be_3d && x.dim() == 5), name, ": expected ",
                  may_be_3d ? "[N, C, H, W] or [N, C, D, H, W]" : "[N, C, H, W]", ", got ", shape_of(x));
}

// A number a pixel: [N, (D,) H, W]
Tensor empty_per_pixel(const Tensor& like) {
  std::vector<int64_t> shape(like.sizes().begin(), like.sizes().end());
  shape.erase(shape.begin() + 1);
  const auto dtype = like.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  return torch::stable::new_empty(like, shape, dtype);
}

template <class T>
const T* read(const Tensor& x) {
  return static_cast<const T*>(x.const_data_ptr());
}
template <class T>
T* write(const Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}

// run(line, first pixel, scratch) for every line of every axis of x, the last axis (rows) first. Pixels are numbered
// as they lie in memory.
template <class T, class F>
void each_line(const Tensor& x, int64_t query_channels, int64_t value_channels, const F& run) {
  const int64_t axes = x.dim() - 2;
  int64_t pixels = x.size(0);
  int64_t path = 1 - axes;
  int64_t last_axis = axes - 1;
  for (int64_t axis = axes - 1; axis >= 0; --axis) {
    const int64_t length = x.size(2 + axis);
    pixels *= length;
    path += length;
    last_axis = length > 1 ? axis : last_axis;
  }
  if (pixels == 0) {
    return;
  }
  const LineKernels<T>& kernels = line_kernels<T>();
  std::atomic<bool> out_of_memory{false};
  int64_t step = 1, path_begin = 0;
  for (int64_t axis = axes - 1; axis >= last_axis; --axis) {
    Line line{};
    line.length = x.size(2 + axis);
    line.step = step;
    line.query_channels = query_channels;
    line.value_channels = value_channels;
    line.first_axis = axis == axes - 1;
    line.last_axis = axis == last_axis;
    line.path = path;
    line.path_begin = path_begin;
    const auto first_pixel = [&](int64_t number) {
      return number / line.step * line.step * line.length + number % line.step;
    };
    const auto range = [&](int64_t begin, int64_t end) {  // must not throw: it may be called on another thread
      char* scratch = thread_block(kernels.scratch_bytes(line));
      if (scratch == nullptr) {
        out_of_memory = true;
        return;
      }
      Line one = line;
      for (int64_t number = begin; number < end; ++number) {
        const int64_t pixel = first_pixel(number);
        one.next = number + 1 < end ? first_pixel(number + 1) - pixel : 0;
        run(kernels, one, pixel, scratch);
      }
    };
    // A line of one pixel has no other pixel to take in, which on the first axis still leaves itself.
    if (line.first_axis || line.length > 1) {
      constexpr int64_t worth_a_thread = 1 << 16;  // multiplications
      const int64_t work = line.length * line.length * (query_channels + value_channels) + 1;
      torch::stable::parallel_for(0, pixels / line.length, 1 + worth_a_thread / work, range);
    }
    step *= line.length;
    path_begin += line.first_axis ? line.length : line.length - 1;
  }
  STD_TORCH_CHECK(!out_of_memory, "criss-cross attention: no memory for the working space of a line");
}

// ---- the operators ----

std::tuple<Tensor, Tensor> criss_cross_attention(const Tensor& query_, const Tensor& key_, const Tensor& value_) {
  check_dimensions("query", query_, true);
  check("key", key_, query_, shape_with(query_, query_.size(1)));
  check_dimensions("value", value_, true);
  check("value", value_, query_, shape_with(query_, value_.size(1)));
  const Tensor query = in_channels_last(query_), key = in_channels_last(key_), value = in_channels_last(value_);
  Tensor out = empty_channels_last(value, shape_with(value, value.size(1)));
  Tensor lse = empty_per_pixel(query);
  for_type("query", query, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const int64_t c = query.size(1), cv = value.size(1);
    const T *q = read<T>(query), *k = read<T>(key), *v = read<T>(value);
    T* o = write<T>(out);
    Accumulate<T>* l = write<Accumulate<T>>(lse);
    each_line<T>(query, c, cv, [=](const LineKernels<T>& kernels, const Line& line, int64_t u, char* scratch) {
      kernels.attention(line, q + u * c, k + u * c, v + u * cv, o + u * cv, l + u, scratch);
    });
  });
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> criss_cross_attention_backward(const Tensor& grad_out_, const Tensor& query_,
                                                                  const Tensor& key_, const Tensor& value_,
                                                                  const Tensor& out_, const Tensor& lse_) {
  check_dimensions("query", query_, true);
  check("key", key_, query_, shape_with(query_, query_.size(1)));
  check_dimensions("value", value_, true);
  check("value", value_, query_, shape_with(query_, value_.size(1)));
  check("grad_out", grad_out_, query_, shape_with(query_, value_.size(1)));
  check("out", out_, query_, shape_with(query_, value_.size(1)));
  Tensor delta = empty_per_pixel(query_);
  check("lse", lse_, delta, std::vector<int64_t>(delta.sizes().begin(), delta.sizes().end()));
  const Tensor query = in_channels_last(query_), key = in_channels_last(key_), value = in_channels_last(value_);
  const Tensor out = in_channels_last(out_), grad_out = in_channels_last(grad_out_);
  const Tensor lse = torch::stable::contiguous(lse_);
  Tensor grad_query = empty_channels_last(query, shape_with(query, query.size(1)));
  Tensor grad_key = empty_channels_last(query, shape_with(query, query.size(1)));
  Tensor grad_value = empty_channels_last(value, shape_with(value, value.size(1)));
  for_type("query", query, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using Real = Accumulate<T>;
    const int64_t c = query.size(1), cv = value.size(1);
    const T *q = read<T>(query), *k = read<T>(key), *v = read<T>(value), *o = read<T>(out), *g = read<T>(grad_out);
    T *dq = write<T>(grad_query), *dk = write<T>(grad_key), *dv = write<T>(grad_value);
    const Real* l = read<Real>(lse);
    Real* d = write<Real>(delta);
    each_line<T>(query, c, cv, [=](const LineKernels<T>& kernels, const Line& line, int64_t u, char* scratch) {
      kernels.attention_backward(line, q + u * c, k + u * c, v + u * cv, o + u * cv, g + u * cv, l + u, d + u,
                                 dq + u * c, dk + u * c, dv + u * cv, scratch);
    });
  });
  return {grad_query, grad_key, grad_value};
}

int64_t path_length(const Tensor& x) { return x.size(2) + x.size(3) - 1; }

Tensor ca_weight(const Tensor& query_, const Tensor& key_) {
  check_dimensions("query", query_, false);
  check("key", key_, query_, shape_with(query_, query_.size(1)));
  const Tensor query = in_channels_last(query_), key = in_channels_last(key_);
  const int64_t path = path_length(query);
  Tensor weight = empty_channels_last(query, shape_with(query, path));
  Tensor lse = empty_per_pixel(query);
  for_type("query", query, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const int64_t c = query.size(1);
    const T *q = read<T>(query), *k = read<T>(key);
    T* w = write<T>(weight);
    Accumulate<T>* l = write<Accumulate<T>>(lse);
    each_line<T>(query, c, 0, [=](const LineKernels<T>& kernels, const Line& line, int64_t u, char* scratch) {
      kernels.attention(line, q + u * c, k + u * c, nullptr, nullptr, l + u, scratch);
    });
    each_line<T>(query, c, 0, [=](const LineKernels<T>& kernels, const Line& line, int64_t u, char* scratch) {
      kernels.weight(line, q + u * c, k + u * c, l + u, w + u * path, scratch);
    });
  });
  return weight;
}

std::tuple<Tensor, Tensor> ca_weight_backward(const Tensor& grad_weight_, const Tensor& query_, const Tensor& key_,
                                              const Tensor& weight_) {
  check_dimensions("query", query_, false);
  check("key", key_, query_, shape_with(query_, query_.size(1)));
  const int64_t path = path_length(query_);
  check("weight", weight_, query_, shape_with(query_, path));
  check("grad_weight", grad_weight_, query_, shape_with(query_, path));
  const Tensor query = in_channels_last(query_), key = in_channels_last(key_);
  const Tensor weight = in_channels_last(weight_), grad_weight = in_channels_last(grad_weight_);
  Tensor grad_query = empty_channels_last(query, shape_with(query, query.size(1)));
  Tensor grad_key = empty_channels_last(query, shape_with(query, query.size(1)));
  Tensor delta = empty_per_pixel(query);
  for_type("query", query, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const int64_t c = query.size(1);
    const T *q = read<T>(query), *k = read<T>(key), *w = read<T>(weight), *g = read<T>(grad_weight);
    T *dq = write<T>(grad_query), *dk = write<T>(grad_key);
    Accumulate<T>* d = write<Accumulate<T>>(delta);
    each_line<T>(query, c, 0, [=](const LineKernels<T>& kernels, const Line& line, int64_t u, char* scratch) {
      kernels.weight_backward(line, q + u * c, k + u * c, w + u * path, g + u * path, d + u, dq + u * c, dk + u * c,
                              scratch);
    });
  });
  return {grad_query, grad_key};
}

Tensor ca_map(const Tensor& weight_, const Tensor& value_) {
  check_dimensions("value", value_, false);
  const int64_t path = path_length(value_);
  check("weight", weight_, value_, shape_with(value_, path));
  const Tensor weight = in_channels_last(weight_), value = in_channels_last(value_);
  Tensor out = empty_channels_last(value, shape_with(value, value.size(1)));
  for_type("value", value, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const int64_t cv = value.size(1);
    const T *w = read<T>(weight), *v = read<T>(value);
    T* o = write<T>(out);
    each_line<T>(value, 0, cv, [=](const LineKernels<T>& kernels, const Line& line, int64_t u, char* scratch) {
      kernels.map(line, w + u * path, v + u * cv, o + u * cv, scratch);
    });
  });
  return out;
}

std::tuple<Tensor, Tensor> ca_map_backward(const Tensor& grad_out_, const Tensor& weight_, const Tensor& value_) {
  check_dimensions("value", value_, false);
  const int64_t path = path_length(value_);
  check("weight", weight_, value_, shape_with(value_, path));
  check("grad_out", grad_out_, value_, shape_with(value_, value_.size(1)));
  const Tensor weight = in_channels_last(weight_), value = in_channels_last(value_);
  const Tensor grad_out = in_channels_last(grad_out_);
  Tensor grad_weight = empty_channels_last(value, shape_with(value, path));
  Tensor grad_value = empty_channels_last(value, shape_with(value, value.size(1)));
  for_type("value", value, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const int64_t cv = value.size(1);
    const T *w = read<T>(weight), *v = read<T>(value), *g = read<T>(grad_out);
    T *dw = write<T>(grad_weight), *dv = write<T>(grad_value);
    each_line<T>(value, 0, cv, [=](const LineKernels<T>& kernels, const Line& line, int64_t u, char* scratch) {
      kernels.map_backward(line, w + u * path, v + u * cv, g + u * cv, dw + u * path, dv + u * cv, scratch);
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
