// What the criss-cross attention operators have in common on every device: shapes, and checks of inputs.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/MemoryFormat.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <string>
#include <vector>

namespace ccnet {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

using Shape = std::vector<int64_t>;

inline Shape shape_of(const Tensor& x) { return {x.sizes().begin(), x.sizes().end()}; }

inline int64_t pixels_of(const Tensor& x) {  // of an image
  int64_t pixels = 1;
  for (int64_t d = 2; d < x.dim(); ++d) {
    pixels *= x.size(d);
  }
  return pixels;
}

// [N, C, (D,) H, W] with `channels` for C
inline Shape shape_with(const Tensor& x, int64_t channels) {
  Shape shape = shape_of(x);
  shape[1] = channels;
  return shape;
}

inline std::string text_of(const Shape& shape) {
  std::string text;
  for (int64_t size : shape) {
    text += (text.empty() ? "[" : ", ") + std::to_string(size);
  }
  return text + "]";
}

// Users meet the checks of functional.py, which know more; these keep a direct call from reading beyond a tensor.
inline void check(const char* name, const Tensor& x, const Tensor& like, const Shape& shape) {
  STD_TORCH_CHECK(shape_of(x) == shape, name, ": expected shape ", text_of(shape), ", got ", text_of(shape_of(x)));
  STD_TORCH_CHECK(x.device() == like.device(), name, ": expected on the first tensor's device");
  STD_TORCH_CHECK(x.scalar_type() == like.scalar_type(), name, ": expected the first tensor's dtype");
}

inline void check_dimensions(const char* name, const Tensor& x, bool may_be_3d) {
  STD_TORCH_CHECK(x.dim() == 4 || (may_be_3d && x.dim() == 5), name, ": expected ",
                  may_be_3d ? "[N, C, H, W] or [N, C, D, H, W]" : "[N, C, H, W]", ", got ", text_of(shape_of(x)));
}

// A number a pixel: [N, (D,) H, W]
inline Tensor empty_per_pixel(const Tensor& like) {
  Shape shape = shape_of(like);
  shape.erase(shape.begin() + 1);
  const auto dtype = like.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  return torch::stable::new_empty(like, shape, dtype);
}

inline void check_query_and_key(const Tensor& query, const Tensor& key, bool may_be_3d) {
  check_dimensions("query", query, may_be_3d);
  check("key", key, query, shape_with(query, query.size(1)));
}

inline void check_query_key_and_value(const Tensor& query, const Tensor& key, const Tensor& value) {
  check_query_and_key(query, key, true);
  check_dimensions("value", value, true);
  check("value", value, query, shape_with(query, value.size(1)));
}

// gamma and the numbers of empty_per_pixel have the same dtype.
inline void check_gamma(const std::optional<Tensor>& gamma, const Tensor& numbers) {
  if (gamma) {
    check("gamma", *gamma, numbers, {1});
  }
}
inline void check_residual(const std::optional<Tensor>& residual, const std::optional<Tensor>& gamma,
                           const Tensor& value, const Tensor& numbers) {
  STD_TORCH_CHECK(residual.has_value() == gamma.has_value(), "residual and gamma: expected both or neither");
  if (residual) {
    check("residual", *residual, value, shape_of(value));
    check_gamma(gamma, numbers);
  }
}

// ---- memory formats ----

// Whether memory holds the elements without gaps with channels last; dimensions of one element may have any stride.
inline bool is_channels_last(const Tensor& x) {
  int64_t stride = 1;
  const auto in_order = [&](int64_t d) {
    const bool fits = x.size(d) == 1 || x.stride(d) == stride;
    stride *= x.size(d);
    return fits;
  };
  bool fits = in_order(1);
  for (int64_t d = x.dim() - 1; d > 1; --d) {
    fits = in_order(d) && fits;
  }
  return in_order(0) && fits;
}

// The memory format that PyTorch's own modules give to what they make of x: channels_last where strides order the
// dimensions so, also where elements are missing in between, otherwise contiguous. As c10's suggest_memory_format.
inline MemoryFormat format_of(const Tensor& x) {
  const bool is_3d = x.dim() == 5;
  int64_t least = 0;
  Shape order{1};  // of the dimensions, from the smallest stride on
  for (int64_t d = x.dim() - 1; d > 1; --d) {
    order.push_back(d);
  }
  order.push_back(0);
  for (int64_t d : order) {
    const int64_t size = x.size(d), stride = x.stride(d);
    const bool ambiguous = (d == 1 && stride == 0) || (d == 0 && least == x.stride(1));
    if (size == 0 || stride < least || ambiguous) {
      return MemoryFormat::Contiguous;
    }
    least = stride * (size > 1 ? size : 1);
  }
  return is_3d ? MemoryFormat::ChannelsLast3d : MemoryFormat::ChannelsLast;
}

// [N, H+W-1, H, W]
inline Shape path_shape(const Tensor& x) { return shape_with(x, x.size(2) + x.size(3) - 1); }

}  // namespace ccnet
